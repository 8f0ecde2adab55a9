"""The bytes that each token stands for: a token alone is often no text, but a part of a character."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders

_CACHED = 8192
_Step = Callable[[str], str]


def _byte_level() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, turned round)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTES = _byte_level()


class TokenBytes:
    """Of one tokenizer, whatever its decoder is made of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        steps = _flat(json.loads(decoder.__getstate__())) if decoder is not None else []
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._steps = [made for step in steps if (made := _step(step))]
        self._spaced = decoder is None
        """Without a decoder, tokens are joined by spaces."""
        self.strips_space = decoder is None or bool(kinds & {"Metaspace", "WordPiece"} or _strips(steps))
        """Whether a text begins without the space of its first token."""
        self.special = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        """Tokens that do not show in answers."""
        self.of = lru_cache(_CACHED)(self._of)

    def _of(self, token: int) -> bytes:
        """The token's bytes behind others; empty for a number that is no token."""
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self.special:
            return text.encode()
        if self._byte_level:
            found = [_BYTES.get(mark) for mark in text]
            return text.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self._byte_fallback and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)):
            return bytes([int(byte[1], 16)])
        for step in self._steps:
            text = step(text)
        return (" " + text if self._spaced else text).encode()

    def first(self, token: int) -> bytes:
        """The token's bytes where it begins an answer."""
        found = self.of(token)
        return found[1:] if self.strips_space and found.startswith(b" ") else found


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        [part for inner in step["decoders"] for part in _flat(inner)]
        if step["type"] == "Sequence"
        else [step]
    )


def _strips(steps: list[dict[str, Any]]) -> bool:
    return any(step["type"] == "Strip" and step.get("content") == " " and step.get("start") for step in steps)


def _step(step: dict[str, Any]) -> _Step | None:
    """What one step of a decoder makes of a token that is not the first."""
    kind = step["type"]
    if kind == "Replace":
        pattern, content = step["pattern"], step["content"]
        if "String" in pattern:
            return lambda text: text.replace(pattern["String"], content)
        replace = decoders.Replace(
            Regex(pattern["Regex"]), content
        )  # its regular expressions are not Python's
        return lambda text: str(replace.decode([text]))
    if kind == "Metaspace":
        return lambda text: text.replace(step["replacement"], " ")
    if kind == "WordPiece":
        prefix = step["prefix"]
        return lambda text: text.removeprefix(prefix) if text.startswith(prefix) else " " + text
    if kind == "BPEDecoder":
        return lambda text: text.replace(step["suffix"], " ")
    return None
