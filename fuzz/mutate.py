"""Mutations that keep a file's frame whole: a safetensors header with the right length, JSON that parses."""

import json
import random
from collections.abc import Callable
from typing import Any

_VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 8, 127, 4096, 4097, 2**20, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, True, None, "", "\x1b[2J", "é", "\ud800",
    "..", "/etc/passwd", "F16", "I8", "F32", "U64", "1", "2", "int8", "a" * 300, [], {}, [0], [0, 2], [[0]], {"a": 1},
)  # fmt: skip


def mutate_json(text: str, source: random.Random) -> str:
    """One random change of a JSON document, or of one that stands as text in it. Raises ValueError if it does not parse."""
    document = json.loads(text)
    spots = list(_spots(document))
    if not spots:
        return json.dumps(source.choice(_VALUES))
    holder, key = source.choice(spots)
    value = holder[key]
    change = source.randrange(6)
    if isinstance(value, str) and value.startswith("{") and change:
        holder[key] = mutate_json(value, source)
    elif change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[source.choice(("x", key + ".scale", "R", "W", "version"))] = value
    elif change == 2:
        other, name = source.choice(spots)
        holder[key] = other[name]
        return json.dumps(document, separators=(",", ":"), check_circular=True)
    elif isinstance(value, int) and change < 5:
        holder[key] = value + source.choice((-1, 1, -4, 4, 8, value))
    else:
        holder[key] = source.choice(_VALUES)
    return json.dumps(document, separators=(",", ":"), ensure_ascii=source.random() < 0.9)


def mutate_safetensors(content: bytes, source: random.Random) -> bytes:
    """One change of the header, its length put right; sometimes the tensor data are made to fit its offsets."""
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(content[8 : 8 + length].decode(), source).encode(errors="surrogatepass")
    data = content[8 + length :]
    if source.random() < 0.2:
        data = (data + bytes(4096))[: source.randrange(len(data) + 64)]
    return len(header).to_bytes(8, "little") + header + data


def mutator(
    frame: Callable[[bytes, random.Random], bytes], plain: Callable[[bytes, int], bytes]
) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's custom mutator: half the time a change within the frame, else one of libFuzzer's own."""

    def mutate(content: bytes, limit: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.random() < 0.5:
            try:
                changed = frame(content, source)
                if len(changed) <= limit:
                    return changed
            except (ValueError, RecursionError):
                pass
        return plain(content, limit)

    return mutate


def json_frame(content: bytes, source: random.Random) -> bytes:
    return mutate_json(content.decode(), source).encode(errors="surrogatepass")


def body_frame(content: bytes, source: random.Random) -> bytes:
    """The byte that chooses the route stays."""
    return content[:1] + json_frame(content[1:], source)


FRAMES = {
    **dict.fromkeys(("adapter", "checkpoint"), mutate_safetensors),
    **dict.fromkeys(
        ("manifest", "signature", "pyreft-config", "adapterhub-config", "index", "oci-manifest"), json_frame
    ),
    "server-bodies": body_frame,
}
"""By target."""


def _spots(document: Any) -> Any:
    """Every place in a document that a value can be put, with its key."""
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _spots(value)
