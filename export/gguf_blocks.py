"""What a GGUF file's quantised tensors hold: whole numbers in blocks that share a scale, and for some kinds an offset.

A weight is (code − middle) · scale + offset. The kinds with a name `Qn_0` or `Qn_1` have blocks of 32 with a 16-bit scale (and
offset); those with a name `Qn_K` have super-blocks of 256 whose 16 or 8 blocks have small whole-number scales (and offsets) that a
16-bit factor multiplies. The layouts are ggml's (`block_q4_0` and so on). The kinds `IQn` are looked up in tables, and are not
whole numbers times a scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.model.gguf_header import MAX_GGUF_HEADER, read_gguf_header

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Read = Callable[[Bytes], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Kind:
    """One of GGUF's kinds of quantised tensors."""

    stored: int
    """Bytes of a block, or of a super-block."""
    weights: int
    """Weights in those bytes."""
    size: int
    """Weights that share a scale."""
    levels: int
    """Codes are 0 to levels − 1."""
    middle: int
    """The code of weight 0 where there are no offsets, else 0."""
    has_offsets: bool
    read: Read
    """Of `[..., stored]` bytes: codes `[..., weights]`, scales and offsets `[..., blocks]`."""


@dataclass(frozen=True)
class Blocks:
    """Rows of a matrix: (code − middle) · scale, plus an offset a block."""

    codes: Bytes
    """[rows, blocks, size]"""
    scales: Floats
    """[rows, blocks]"""
    offsets: Floats | None
    """[rows, blocks]"""
    middle: int

    def dequantised(self) -> Floats:
        """[rows, columns]"""
        values = (self.codes.astype(np.float32) - np.float32(self.middle)) * self.scales[..., None]
        if self.offsets is not None:
            values += self.offsets[..., None]
        rows: Floats = values.reshape(len(values), -1)
        return rows


@dataclass(frozen=True)
class Stored:
    """A matrix in the file."""

    kind: str
    """ggml's name for its type."""
    rows: int
    columns: int
    file: Path
    start: int
    """Of the matrix in the file, in bytes."""
    width: int
    """Bytes of a row."""

    def read(self, rows: slice) -> Bytes:
        """Neighbouring rows, `[rows, bytes]`."""
        first, last, _ = rows.indices(self.rows)
        count = max(0, last - first) * self.width
        with self.file.open("rb") as file:
            file.seek(self.start + first * self.width)
            found = np.frombuffer(file.read(count), np.uint8)
        return found.reshape(-1, self.width)


def read_matrices(gguf: Path) -> dict[str, Stored]:
    """The file's matrices by name. Raises ReftEdgeError for a malformed file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = {}
    for tensor in read_gguf_header(gguf, MAX_GGUF_HEADER).tensors:
        if len(tensor.shape) == 2:
            kind = GGMLQuantizationType(tensor.kind)
            columns, rows = tensor.shape
            weights, stored = GGML_QUANT_SIZES[kind]
            width = columns // weights * stored
            found[tensor.name] = Stored(kind.name, rows, columns, gguf, tensor.start, width)
    return found


def read_rows(data: Bytes, kind: Kind, rows: slice | NDArray[np.int64]) -> Blocks:
    """Some rows of the tensor `data [rows, bytes]`."""
    stored = np.ascontiguousarray(data[rows])
    codes, scales, offsets = kind.read(stored.reshape(len(stored), -1, kind.stored))
    count = len(codes)
    return Blocks(
        codes.reshape(count, -1, kind.size),
        scales.reshape(count, -1),
        None if offsets is None else offsets.reshape(count, -1),
        kind.middle,
    )


def _float16(blocks: Bytes, start: int) -> Floats:
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16).astype(np.float32)


def _bits(packed: Bytes, width: int) -> Bytes:
    """Numbers of `width` bits: the lowest of all bytes first, then the next."""
    parts = [(packed >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)]
    return np.concatenate(parts, axis=-1)


def _by_groups(packed: Bytes, width: int, group: int) -> Bytes:
    """`_bits` of each `group` bytes, one after the other."""
    grouped = packed.reshape(*packed.shape[:-1], -1, group)
    return _bits(grouped, width).reshape(*packed.shape[:-1], -1)


def _fifth_bit(blocks: Bytes, start: int) -> Bytes:
    """16 for each of 32 weights whose bit is set in the 4 bytes from `start`."""
    bits: Bytes = np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little")
    fifth: Bytes = bits * np.uint8(16)
    return fifth


def _q4_0(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _bits(blocks[..., 2:], 4), _float16(blocks, 0), None


def _q4_1(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _bits(blocks[..., 4:], 4), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _bits(blocks[..., 6:], 4) | _fifth_bit(blocks, 2), _float16(blocks, 0), None


def _q5_1(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _bits(blocks[..., 8:], 4) | _fifth_bit(blocks, 4), _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Any, Any, Any]:
    # Two's complement, shifted by wrapping around.
    return blocks[..., 2:] + np.uint8(128), _float16(blocks, 0), None


def _q2_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    fine, codes = blocks[..., :16], _by_groups(blocks[..., 16:80], 2, 32)
    return codes, _float16(blocks, 80) * (fine & 0xF), -_float16(blocks, 82) * (fine >> 4)


def _q3_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    high, low, packed = blocks[..., :32], blocks[..., 32:96], blocks[..., 96:108]
    third = np.concatenate([(high >> bit) & 1 for bit in range(8)], axis=-1) << 2
    fine = _bits(packed[..., :8], 4) | (_bits(packed[..., 8:], 2) << 4)
    return _by_groups(low, 2, 32) | third, _float16(blocks, 108) * (fine.astype(np.float32) - 32), None


def _six_bit(packed: Bytes) -> tuple[Bytes, Bytes]:
    """8 scales and 8 offsets of 6 bits in 12 bytes, of Q4_K and Q5_K."""
    first, second, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (rest & 0xF) | ((first >> 6) << 4)], axis=-1)
    offsets = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales, offsets


def _q4_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    fine, offset = _six_bit(blocks[..., 4:16])
    return _by_groups(blocks[..., 16:], 4, 32), _float16(blocks, 0) * fine, -_float16(blocks, 2) * offset


def _q5_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    fine, offset = _six_bit(blocks[..., 4:16])
    high = np.concatenate([(blocks[..., 16:48] >> bit) & 1 for bit in range(8)], axis=-1) << 4
    return (
        _by_groups(blocks[..., 48:], 4, 32) | high,
        _float16(blocks, 0) * fine,
        -_float16(blocks, 2) * offset,
    )


def _q6_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    codes = _by_groups(blocks[..., :128], 4, 64) | (_by_groups(blocks[..., 128:192], 2, 32) << 4)
    fine = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return codes, _float16(blocks, 208) * fine, None


KINDS = {
    "Q4_0": Kind(18, 32, 32, 16, 8, False, _q4_0),
    "Q4_1": Kind(20, 32, 32, 16, 0, True, _q4_1),
    "Q5_0": Kind(22, 32, 32, 32, 16, False, _q5_0),
    "Q5_1": Kind(24, 32, 32, 32, 0, True, _q5_1),
    "Q8_0": Kind(34, 32, 32, 256, 128, False, _q8_0),
    "Q2_K": Kind(84, 256, 16, 4, 0, True, _q2_k),
    "Q3_K": Kind(110, 256, 16, 8, 4, False, _q3_k),
    "Q4_K": Kind(144, 256, 32, 16, 0, True, _q4_k),
    "Q5_K": Kind(176, 256, 32, 32, 0, True, _q5_k),
    "Q6_K": Kind(210, 256, 16, 64, 32, False, _q6_k),
}
