"""The header of a GGUF file, read strictly before any library sees the file, in memory that the file's own size bounds."""

import math
import os
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from reft_edge.errors import ReftEdgeError
from reft_edge.files import open_regular

MAGIC = b"GGUF"
MAX_GGUF_HEADER = 128 << 20
"""Bytes that are read of a file's header at most."""
_PIECE = 1 << 20
_MAX_PAIRS, _MAX_TENSORS = 1 << 12, 1 << 16
_MAX_NAME = 1 << 10
_MAX_ALIGNMENT = 1 << 20
_INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
FIXED = {**{kind: struct.calcsize(f"<{code}") for kind, code in _INTEGERS.items()}, 6: 4, 7: 1, 12: 8}
"""Bytes of GGUF's metadata types of fixed size."""
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_FEW = 1 << 16
_MAX_ENTRIES = 1 << 21
"""Of all arrays. Readers take some hundred bytes for each; Gemma 3, whose vocabulary is among the largest, has 1,300,000."""
TOKENS = "tokenizer.ggml.tokens"
_LONG = {
    TOKENS: _STRING,
    "tokenizer.ggml.merges": _STRING,
    "tokenizer.ggml.scores": 6,
    "tokenizer.ggml.token_type": 5,
}
"""Arrays that have an entry a token, or a few, and their types."""
_CHARACTERS, _MAX_CHARACTERS = "tokenizer.ggml.precompiled_charsmap", 1 << 20
LONG_LISTS = frozenset({*_LONG, _CHARACTERS})
"""Metadata that are lists as long as the vocabulary, or longer."""
_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,5})\.")
_MAX_EXPERTS = 1 << 12
_CONTEXT, _WEIGHTS_A_POSITION = 1 << 18, 64
"""A graph keeps some hundred bytes for each position of the context: so many are accepted of any model, and more of one that
has as many weights for each."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor's bytes lie and what they are."""

    name: str
    shape: tuple[int, ...]
    """The row's length first, as GGML counts."""
    kind: int
    """GGML's number for its type."""
    start: int
    """In the file."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its tensors' bytes."""

    architecture: str
    numbers: dict[str, int]
    """Its metadata that are single whole numbers."""
    arrays: dict[str, tuple[int, int]]
    """Type and number of entries of the metadata that are lists."""
    tensors: tuple[GgufTensor, ...]
    places: dict[str, tuple[int, int]]
    """Where each of the metadata begins and ends in the file, its name included."""


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, whatever its name. Raises OSError for what is no regular file."""
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path, limit: int) -> GgufHeader:
    """Read at most `limit` bytes, each only once it is known to be in the file.

    Raises ReftEdgeError for a malformed file, and for one that ends before its last tensor does.
    """
    try:
        with open_regular(path) as file:
            return parse_gguf_header(file, os.fstat(file.fileno()).st_size, limit)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"cannot read {path}: {error}") from error


def parse_gguf_header(file: BinaryIO, size: int, limit: int) -> GgufHeader:
    """The same from an open file of `size` bytes."""
    header = _Bytes(file, size, limit)
    if size < len(MAGIC) or header.take(len(MAGIC)) != MAGIC:
        raise ReftEdgeError("it is not a GGUF file")
    version = header.number("I")
    if version not in (2, 3):
        raise ReftEdgeError(f"it has version {version} of GGUF; expected 2 or 3, little-endian")
    tensors, pairs = header.number("Q"), header.number("Q")
    if tensors > _MAX_TENSORS or pairs > _MAX_PAIRS:
        raise ReftEdgeError(
            f"it claims {tensors:,} tensors and {pairs:,} metadata entries; {_MAX_TENSORS:,} and {_MAX_PAIRS:,} are accepted"
        )
    architecture, places, numbers, arrays = _metadata(header, pairs)
    _check_whole("general.alignment", places, numbers)
    alignment = numbers.get("general.alignment", 32)
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise ReftEdgeError(f"it aligns tensors to {alignment} bytes; expected a multiple of 8")
    described = [_tensor(header) for _ in range(tensors)]
    if len({part.name for part in described}) < tensors:
        raise ReftEdgeError("it has two tensors of one name (twice)")
    start = -(-header.at // alignment) * alignment
    placed = tuple(_placed(described, start, alignment, size))
    return GgufHeader(architecture, numbers, arrays, placed, places)


def check_model(header: GgufHeader) -> None:
    """Raise ReftEdgeError for a model whose metadata would take more memory than its tensors account for."""
    shapes = {part.name: part.shape for part in header.tensors}
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ReftEdgeError("it holds no language model: there is no matrix token_embd.weight")
    tokens = header.arrays.get(TOKENS, (_STRING, 0))[1]
    if tokens > embedding[1]:
        raise ReftEdgeError(f"it names {tokens:,} tokens, and its embedding has {embedding[1]:,}")
    for name, (kind, count) in header.arrays.items():
        if name == _CHARACTERS:
            most = _MAX_CHARACTERS
        elif _LONG.get(name) == kind:
            most = 4 * tokens if kind == _STRING else tokens
        else:
            most = _FEW
        if count > max(most, 1):
            raise ReftEdgeError(
                f"its metadata {name!r:.80} is a list of {count:,} entries; at most {most:,} are accepted"
            )
    if (total := sum(count for _, count in header.arrays.values())) > _MAX_ENTRIES:
        raise ReftEdgeError(
            f"its metadata are lists of {total:,} entries; at most {_MAX_ENTRIES:,} are accepted"
        )
    blocks = {match[1] for name in shapes if (match := _BLOCK.match(name))}
    weights = sum(math.prod(shape) for shape in shapes.values())
    limits = {
        "block_count": len(blocks),
        "context_length": max(_CONTEXT, weights // _WEIGHTS_A_POSITION),
        "expert_count": _MAX_EXPERTS,
        "vocab_size": embedding[1],
    }
    for what, most in limits.items():
        name = f"{header.architecture}.{what}"
        _check_whole(name, header.places, header.numbers)
        found = header.numbers.get(name, 0)
        if not 0 <= found <= most:
            raise ReftEdgeError(f"its metadata say {what} {found:,}; its tensors account for {most:,}")
    said = header.numbers.get(f"{header.architecture}.block_count", len(blocks))
    if said < len(blocks):
        raise ReftEdgeError(f"its metadata say block_count {said:,}, and it holds {len(blocks):,} blocks")


def _check_whole(name: str, names: Collection[str], numbers: Mapping[str, int]) -> None:
    """Raise ReftEdgeError for metadata that some readers take for a number although they are a list, a text or a fraction."""
    if name in names and name not in numbers:
        raise ReftEdgeError(f"its metadata {name!r:.80} is no whole number; it is malformed")


class _Bytes:
    """The first bytes of a file, taken piece by piece, none of them beyond its end or a limit."""

    def __init__(self, file: BinaryIO, size: int, limit: int) -> None:
        self._file, self._size, self._limit = file, size, min(size, limit)
        self._content = b""
        self._start = 0
        self.at = 0

    def take(self, count: int) -> bytes:
        begin = self._need(count)
        self.at += count
        return self._content[begin : begin + count]

    def number(self, code: str) -> int:
        found: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return found

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def name(self) -> str:
        length = self.number("Q")
        if not 0 < length <= _MAX_NAME:
            raise ReftEdgeError(
                f"it has a name of {length:,} bytes; expected 1 to {_MAX_NAME:,}; it is malformed"
            )
        return self.take(length).decode(errors="replace")

    def skip_texts(self, count: int) -> None:
        if count > (self._limit - self.at) // _LENGTH.size:
            self._runs_past()
        while count:
            count -= self._skip_held_texts(count)
            if count:
                self.skip(self.number("Q"))
                count -= 1

    def _skip_held_texts(self, count: int) -> int:
        """Skip at most `count` texts, as long as they are whole in what is held; says how many."""
        at = self.at - self._start
        last = len(self._content) - _LENGTH.size
        done = 0
        while done < count and at <= last:
            length: int = _LENGTH.unpack_from(self._content, at)[0]
            if length > last - at:
                break
            at += _LENGTH.size + length
            done += 1
        self.at = self._start + at
        return done

    def skip(self, count: int) -> None:
        while count > 0:
            step = min(count, _PIECE)
            self._need(step)
            self.at += step
            count -= step

    def _need(self, count: int) -> int:
        """Where in what is held the next `count` bytes begin."""
        if count > self._limit - self.at:
            self._runs_past()
        begin = self.at - self._start
        if begin + count > len(self._content):
            self._content = self._content[begin:]
            self._start, begin = self.at, 0
            wanted = max(count, min(_PIECE, self._limit - self.at)) - len(self._content)
            self._content += self._file.read(wanted)
            if len(self._content) < count:
                raise ReftEdgeError("it became shorter while it was read")
        return begin

    def _runs_past(self) -> None:
        if self._limit < self._size:
            raise ReftEdgeError(f"its header runs past {self._limit:,} bytes; it is malformed or too large")
        raise ReftEdgeError(
            f"it ends early, within its header: its header runs past the file's {self._size:,} bytes; the file is truncated or malformed"
        )


def _metadata(
    header: _Bytes, pairs: int
) -> tuple[str, dict[str, tuple[int, int]], dict[str, int], dict[str, tuple[int, int]]]:
    """The architecture, where each of the metadata is, single whole numbers, and lists' types and lengths."""
    architecture = ""
    numbers: dict[str, int] = {}
    arrays: dict[str, tuple[int, int]] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(pairs):
        begin = header.at
        name, kind = header.name(), header.number("I")
        if name in places:
            raise ReftEdgeError(f"its metadata name {name!r:.80} twice")
        if name == "general.architecture" and kind == _STRING:
            architecture = header.name()
        elif kind in _INTEGERS:
            numbers[name] = header.number(_INTEGERS[kind])
        elif kind in FIXED:
            header.skip(FIXED[kind])
        elif kind == _STRING:
            header.skip(header.number("Q"))
        elif kind == _ARRAY:
            inner, count = header.number("I"), header.number("Q")
            if inner in FIXED:
                header.skip(count * FIXED[inner])
            elif inner == _STRING:
                header.skip_texts(count)
            else:
                raise ReftEdgeError(f"its metadata has an array of type {inner}; it is malformed")
            arrays[name] = (inner, count)
        else:
            raise ReftEdgeError(f"its metadata has an unknown type {kind}; it is malformed")
        places[name] = begin, header.at
    return architecture, places, numbers, arrays


@dataclass(frozen=True)
class _Described:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor(header: _Bytes) -> _Described:
    name, dimensions = header.name(), header.number("I")
    if not 0 < dimensions <= 4:
        raise ReftEdgeError(f"tensor {name!r:.60} has {dimensions} dimensions; expected 1 to 4")
    shape = tuple(header.number("Q") for _ in range(dimensions))
    return _Described(name, shape, header.number("I"), header.number("Q"))


def _placed(described: list[_Described], start: int, alignment: int, size: int) -> list[GgufTensor]:
    """The tensors with their places in the file, once these are known to be in it and apart from each other."""
    placed = []
    end = 0
    for part in sorted(described, key=lambda part: part.offset):
        if part.offset % alignment or part.offset < end:
            raise ReftEdgeError(
                f"tensor {part.name!r:.60} is not at a place of its own; the file is malformed"
            )
        end = part.offset + stored_bytes(part)
        placed.append(GgufTensor(part.name, part.shape, part.kind, start + part.offset))
    if start + end > size:
        raise ReftEdgeError(
            f"it ends early: its tensors need {start + end:,} bytes, it has {size:,}; the file is truncated, get it again"
        )
    return placed


def stored_bytes(part: _Described | GgufTensor) -> int:
    """Bytes of a tensor in a file. Raises ReftEdgeError for an unknown type, and for rows that are no whole blocks of it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if part.kind not in set(GGMLQuantizationType):
        raise ReftEdgeError(f"tensor {part.name!r:.60} has GGML type {part.kind}, which is unknown")
    numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(part.kind)]
    if part.shape[0] % numbers:
        raise ReftEdgeError(
            f"tensor {part.name!r:.60} has rows of {part.shape[0]:,}; expected a multiple of {numbers}"
        )
    blocks: int = math.prod(part.shape) // numbers
    return blocks * int(nbytes)
