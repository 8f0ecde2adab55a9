"""Small GGUF files made of parts of a large one, for readers that take a file whole."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from reft_edge.model.gguf_header import FIXED, LONG_LISTS, MAGIC, TOKENS, GgufHeader, GgufTensor, stored_bytes

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _STRING, _LIST = 4, 8, 9
_TOKEN_IDS = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")]
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Piece:
    """What of a file's content a piece holds."""

    tensors: Mapping[str, GgufTensor]
    """By the names that they get."""
    block: int | None = None
    """The only block that it has, as its first; none for all blocks."""
    tokens: int | None = None
    """How many of the vocabulary's tokens it has; none for all."""
    empty: bool = False
    """Whether tensors have their shapes and types, and no content."""


def piece_of_block(header: GgufHeader, block: int) -> Piece:
    """A model of one block and two tokens (a list of one is no list to some readers)."""
    prefix = f"blk.{block}."
    tensors = {
        f"blk.0.{part.name.removeprefix(prefix)}": part
        for part in header.tensors
        if part.name.startswith(prefix)
    }
    return Piece(tensors, block, tokens=2)


def piece_with_first(header: GgufHeader, tokens: int) -> Piece:
    """A model of the first block, all that is in no block, and the first `tokens` tokens."""
    cut = {part.name: _cut(part, tokens) for part in vocabulary_tensors(header)}
    tensors = {
        part.name: cut.get(part.name, part)
        for part in header.tensors
        if not part.name.startswith("blk.") or part.name.startswith("blk.0.")
    }
    return Piece(tensors, 0, tokens)


def vocabulary_tensors(header: GgufHeader) -> list[GgufTensor]:
    """Tables with a row for each token."""
    rows = next(part.shape[1] for part in header.tensors if part.name == "token_embd.weight")
    return [
        part
        for part in header.tensors
        if not part.name.startswith("blk.") and len(part.shape) == 2 and part.shape[1] == rows
    ]


def write_piece(source: Path, header: GgufHeader, piece: Piece, target: Path) -> None:
    """Write a GGUF file; tokens are empty texts in it."""
    with source.open("rb") as file, target.open("wb") as out:
        pairs = list(_pairs(file, header, piece))
        infos, at = [], 0
        for name, part in piece.tensors.items():
            sizes = struct.pack(f"<{len(part.shape)}Q", *part.shape)
            infos.append(
                _text(name) + struct.pack("<I", len(part.shape)) + sizes + struct.pack("<IQ", part.kind, at)
            )
            at += _aligned(stored_bytes(part))
        out.write(MAGIC + struct.pack("<IQQ", _VERSION, len(infos), len(pairs)) + b"".join(pairs + infos))
        out.seek(_aligned(out.tell()))
        start = out.tell()
        if not piece.empty:
            for part in piece.tensors.values():
                _copy(file, part, out)
        out.truncate(start + at)


def _pairs(file: BinaryIO, header: GgufHeader, piece: Piece) -> list[bytes]:
    """The metadata, as bytes."""
    changed = {"general.alignment": _ALIGNMENT}
    blocks = header.numbers.get(f"{header.architecture}.block_count")
    if piece.block is not None:
        changed[f"{header.architecture}.block_count"] = 1
    if piece.tokens is not None:
        changed |= {f"{header.architecture}.vocab_size": piece.tokens, **dict.fromkeys(_TOKEN_IDS, 0)}
    made = [_text(name) + struct.pack("<II", _UINT32, value) for name, value in changed.items()]
    tokens = header.arrays.get(TOKENS, (_STRING, 0))[1] if piece.tokens is None else piece.tokens
    made.append(_text(TOKENS) + struct.pack("<IIQ", _LIST, _STRING, tokens) + bytes(8 * tokens))
    for name, (begin, end) in header.places.items():
        if name in changed or name in LONG_LISTS:
            continue
        file.seek(begin)
        content = file.read(end - begin)
        kind, count = header.arrays.get(name, (_STRING, 0))
        if piece.block is not None and count == blocks and kind in FIXED:
            one = content[len(content) - (count - piece.block) * FIXED[kind] :][: FIXED[kind]]
            content = _text(name) + struct.pack("<IIQ", _LIST, kind, 1) + one
        made.append(content)
    return made


def _cut(part: GgufTensor, rows: int) -> GgufTensor:
    return replace(part, shape=(part.shape[0], rows))


def _copy(file: BinaryIO, part: GgufTensor, out: BinaryIO) -> None:
    file.seek(part.start)
    left = stored_bytes(part)
    padding = _aligned(left) - left
    while left:
        content = file.read(min(left, _AT_ONCE))
        out.write(content)
        left -= len(content)
    out.write(bytes(padding))


def _text(content: str) -> bytes:
    encoded = content.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
