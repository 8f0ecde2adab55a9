"""A KV cache in 8 bits, for any exported graph whose attention is ONNX Runtime's GroupQueryAttention.

The graph is changed in memory: its caches become int8, and each attention gets a scale for every channel of its keys and of
its values. The scales come from what the graph itself computes for a few sentences, with room for adapters that move it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.model.prompts import Prompts
from reft_edge.runtime.onnx_file import bytes_field, number_field, read_fields, read_text
from reft_edge.runtime.session import GraphSession

CACHE_TYPES = ("auto", "int8")
SENTENCES = (
    "The river rises in the mountains, runs through 3 countries and meets the sea after 1,230 kilometres. In spring, when the "
    "snow melts, it floods the meadows; farmers wait for that, because the water leaves good soil behind.",
    'Who wrote this? I don\'t know. Ask her: "What is 17 × 4?" def answer(x): return {\'value\': x * 2, "text": [1, 2, 3]}',
    "Bonjour, comment allez-vous ? Das Wetter ist heute schön. 今日は天気がいいです。 Привет, как дела?",
)
"""What the scales are measured on."""
_ROOM = 1.5
"""How much larger a number may become before it is cut off."""
_GRAPH, _NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE = 7, 1, 5, 11, 12, 13
_FLOAT, _INT8 = 1, 3
_ATTENTION = "GroupQueryAttention"
_PAST, _SCALES = (3, 4), 12
"""Places among the inputs of such a node."""

Scales = dict[str, NDArray[np.float32]]
"""For every channel, heads × head size, by the names of the graph's inputs."""


def open_session(
    folder: Path,
    manifest: Manifest,
    prompts: Prompts,
    cache_type: str,
    device: str,
    threads: int | None,
    provider_options: Mapping[str, str] | None,
) -> GraphSession:
    """An exported folder's session, its caches of one of CACHE_TYPES. Raises ReftEdgeError for another type, for int8 on
    devices other than the CPU, and as `GraphSession` and `with_int8_cache` do."""
    if cache_type not in CACHE_TYPES:
        raise ReftEdgeError(f"unknown type of cache {cache_type!r}; choose one of {', '.join(CACHE_TYPES)}")
    whole = cache_type == "auto"
    plain = GraphSession(folder, manifest, device, threads, prepack=whole, provider_options=provider_options)
    if whole:
        return plain
    if plain.device != "cpu":
        raise ReftEdgeError(
            f"a cache in int8 is for the CPU, and this runs on {plain.device}; use --device cpu"
        )
    plain.check_cache()
    rows = [prompts.encode_raw(text) for text in SENTENCES]
    if prompts.template is not None:
        with suppress(ReftEdgeError):  # of a template that asks for more than one message of the user's
            rows.append(prompts.encode_prompt(SENTENCES[0], "chat"))
    changed = with_int8_cache(folder / manifest.graph, measure_scales(plain, rows))
    del plain
    return GraphSession(folder, manifest, "cpu", threads, changed=changed)


def measure_scales(graph: GraphSession, rows: Sequence[Sequence[int]]) -> Scales:
    """What one step of 8 bits stands for, from what `graph` computes for these rows of tokens."""
    largest: Scales = {}
    for row in rows:
        ids = list(row)[: graph.context_length]
        cache = graph.take_cache(1, len(ids))
        graph.bind(cache, {}).prefill(np.array([ids], np.int64))
        for name in graph.cache_shapes:
            seen = (
                np.abs(cache.values[name].numpy()[0, :, : len(ids)].astype(np.float32))
                .max(axis=1)
                .reshape(-1)
            )
            largest[name] = np.maximum(largest[name], seen) if name in largest else seen
    return {name: np.maximum(most, 1e-4) * np.float32(_ROOM / 127) for name, most in largest.items()}


def with_int8_cache(path: Path, scales: Scales) -> bytes:
    """The graph in this file with int8 caches. Raises ReftEdgeError where one of its caches cannot be that."""
    try:
        content = path.read_bytes()
        return b"".join(
            bytes_field(_GRAPH, _changed(content[start:end], scales))
            if number == _GRAPH
            else content[begin:end]
            for number, begin, start, end in read_fields(content)
        )
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except (IndexError, KeyError, StopIteration, ValueError) as error:
        raise ReftEdgeError(f"cannot read the graph in {path}: it is no whole ONNX model") from error


def _changed(graph: bytes, scales: Scales) -> bytes:
    parts: list[bytes] = []
    left = set(scales)
    presents = {name.replace("past_key_values", "present") for name in scales}
    for number, begin, start, end in read_fields(graph):
        field = graph[start:end]
        if number == _NODE and read_text(field, 4) == _ATTENTION:
            names = [field[a:b].decode() for kind, _, a, b in read_fields(field) if kind == 1]
            pasts = [names[place] for place in _PAST]
            if len(names) <= _SCALES and left.issuperset(pasts):
                left -= set(pasts)
                field = _attention(field, names, pasts)
            parts.append(bytes_field(_NODE, field))
        elif number in (_INPUT, _OUTPUT, _VALUE) and read_text(field, 1) in scales.keys() | presents:
            parts.append(bytes_field(number, _as_int8(field)))
        else:
            parts.append(graph[begin:end])
    if left:
        raise ReftEdgeError(
            f"this folder's KV cache cannot be int8: {', '.join(sorted(left)[:2])} of its graph go into another operator than "
            f"{_ATTENTION}, or one with scales of its own; leave the type of the cache as it is"
        )
    return b"".join([*parts, *(_initializer(name, values) for name, values in scales.items())])


def _attention(node: bytes, names: Sequence[str], pasts: Sequence[str]) -> bytes:
    others = b"".join(node[begin:end] for kind, begin, _, end in read_fields(node) if kind != 1)
    inputs = [*names, *[""] * (_SCALES - len(names)), *map(_scale_name, pasts)]
    written = b"".join(bytes_field(1, name.encode()) for name in inputs)
    texts = {"k_quant_type": b"PER_CHANNEL", "v_quant_type": b"PER_CHANNEL"}
    kinds = [
        bytes_field(1, name.encode()) + bytes_field(4, text) + number_field(20, 3)
        for name, text in texts.items()
    ]
    kinds.append(bytes_field(1, b"kv_cache_bit_width") + number_field(3, 8) + number_field(20, 2))
    return written + others + b"".join(bytes_field(5, kind) for kind in kinds)


def _as_int8(value: bytes) -> bytes:
    """A ValueInfoProto whose tensors are int8: elem_type is field 1 of tensor_type, field 1 of type, field 2."""

    def within(message: bytes, path: Sequence[int]) -> bytes:
        return b"".join(
            message[begin:end]
            if number != path[0]
            else number_field(path[0], _INT8)
            if len(path) == 1
            else bytes_field(path[0], within(message[start:end], path[1:]))
            for number, begin, start, end in read_fields(message)
        )

    return within(value, (2, 1, 1))


def _initializer(past: str, values: NDArray[np.float32]) -> bytes:
    tensor = (
        number_field(1, values.size) + number_field(2, _FLOAT) + bytes_field(8, _scale_name(past).encode())
    )
    return bytes_field(_INITIALIZER, tensor + bytes_field(9, values.astype("<f4").tobytes()))


def _scale_name(past: str) -> str:
    return f"{past}.scale"
