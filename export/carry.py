"""Carrying a GGUF's own blocks into the graph: its weights are not rounded a second time.

ONNX Runtime's MatMulNBits and GatherBlockQuantized hold (q − z) · d in 4 or 8 bits, with a whole zero point z a block. Blocks
without offsets fit as they are. An offset m a block is split: d·q + m = d·(q − z) + r with z = −m/d rounded. What is left,
|r| ≤ d/2, is the same for a whole block and so multiplies the mean of its activations. The means are appended to the
activations, and the r of a row, rounded to as many bits (with 4 to d/30 at most where the blocks of the row are alike, with 8 to
d/500), to its weights, so that one product does both:

    y = [x, mean(x)] · [d·(q − z), size·r]ᵀ

A table of embeddings has no activations. There the step is made finer, d·q + m = (d/k)·(k·q − z), with the k that 8 bits have
room for: 17 for codes of 4 bits, so that the offset is rounded to d/34 at most.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import safe_open

from reft_edge.export.data_file import DataFile
from reft_edge.export.gguf_blocks import KINDS, Blocks, Kind, Stored, read_matrices, read_rows
from reft_edge.export.nbits import (
    Bytes,
    Floats,
    Form,
    Rows,
    replace_lookup,
    replace_product,
    stored_blocks,
    write_matrices,
)
from reft_edge.export.rounding import HEAD
from reft_edge.files import read_text

CARRIED = "Carried blocks: "
"""What the builder's process says before the two counts of `carry_blocks`."""

_PRODUCT = re.compile(r"(/model/layers\.(\d+)/\w+/)(\w+)/MatMul")
_EMBEDDING = re.compile(r"/model/embed_tokens/Gather\w*")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_NAMES = {
    "q_proj": ("attn_q", "self_attn.q_proj"),
    "k_proj": ("attn_k", "self_attn.k_proj"),
    "v_proj": ("attn_v", "self_attn.v_proj"),
    "o_proj": ("attn_output", "self_attn.o_proj"),
    "gate_proj": ("ffn_gate", "mlp.gate_proj"),
    "up_proj": ("ffn_up", "mlp.up_proj"),
    "down_proj": ("ffn_down", "mlp.down_proj"),
}
_TABLE = ("token_embd.weight", "model.embed_tokens.weight")
_FILLED_TO = 32  # columns that CUDA's kernels want a multiple of
_AT_ONCE = 1 << 22  # weights that are unpacked at a time


@dataclass(frozen=True)
class Carrying:
    """How blocks are to be stored in the graph."""

    precision: str
    """int4: codes of up to 4 bits in 4 and all others in 8. int8: all in 8."""
    accuracy_level: int
    """Of quantised products, as in `Quantisation`."""
    whole_blocks: bool
    """Whether further columns are filled up to a multiple of 32, which CUDA's kernels want."""


@dataclass(frozen=True)
class _Matrix:
    """A quantised tensor of the file, its rows in PyTorch's order, and how it is stored in the graph."""

    tensor: Stored
    kind: Kind
    order: NDArray[np.int64] | None
    form: Form

    @property
    def rows(self) -> int:
        return self.tensor.rows

    @property
    def columns(self) -> int:
        return self.tensor.columns

    def chunks(self) -> Iterator[tuple[slice, Blocks]]:
        """The blocks of some rows at a time."""
        step = max(1, _AT_ONCE // self.columns)
        whole = None if self.order is None else self.tensor.read(slice(None))
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            if whole is None or self.order is None:
                yield rows, read_rows(self.tensor.read(rows), self.kind, slice(None))
            else:
                yield rows, read_rows(whole, self.kind, self.order[rows])

    def stored(self) -> Iterator[Rows]:
        """All rows as the graph has them, some at a time."""
        for _, blocks in self.chunks():
            yield _store(blocks, self)


def can_carry(gguf: Path) -> bool:
    """Whether most of the file's matrices are in blocks that a graph can hold."""
    kinds = _matrix_kinds(gguf)
    return sum(kind in KINDS for kind in kinds) > len(kinds) / 2


def kinds_that_cannot(gguf: Path) -> list[str]:
    """The names of the other kinds among the file's matrices, such as IQ4_NL."""
    return sorted({kind for kind in _matrix_kinds(gguf) if kind not in KINDS})


def _matrix_kinds(gguf: Path) -> list[str]:
    return [matrix.kind for matrix in read_matrices(gguf).values()]


def carry_blocks(graph: ir.Graph, data: DataFile, gguf: Path, model: Path, how: Carrying) -> tuple[int, int]:
    """Put the file's blocks in place of a graph's matrices; returns how many were, and of how many.

    `graph` is what onnxruntime-genai's builder made before it quantises. `model` is the Hugging Face folder that `gguf`
    was converted to. A matrix is only carried if its blocks give that folder's weights, so a file whose rows are in
    another order than expected is quantised anew, never wrong. The blocks are written to `data`.
    """
    file = _File(read_matrices(gguf), _Weights(model), how)
    table = file.find(*_TABLE, gathered=True)
    widened: dict[tuple[ir.Value, int], ir.Value] = {}
    head: list[ir.Value] = []
    carried = of = 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[1].const_value is None:
            continue
        of += 1
        parts = file.parts(node, table)
        if not parts:
            continue
        products = replace_product(graph, data, node, parts, widened, how.accuracy_level)
        carried += 1
        if node.name == HEAD and parts[0][1] is table:
            head = [value for value in products[0].inputs[1:] if value is not None]
    lookup = next((node for node in graph if _EMBEDDING.fullmatch(node.name or "")), None)
    if lookup is not None:
        of += 1
        if table is not None:
            floats = lookup.outputs[0].dtype or ir.DataType.FLOAT
            stored = head or write_matrices(graph, data, "model.embed_tokens", [table], floats)
            replace_lookup(graph, lookup, table.form, (table.rows, table.columns), stored)
            carried += 1
    return carried, of


class _File:
    """What a GGUF holds of a model."""

    def __init__(self, tensors: Mapping[str, Stored], weights: "_Weights", how: Carrying) -> None:
        self._tensors, self._weights, self._how = tensors, weights, how

    def parts(self, node: ir.Node, table: _Matrix | None) -> list[tuple[str, _Matrix]]:
        """The matrices that are stacked in a product, with the names of the products that they are; none if not all
        can be carried."""
        name = node.name or ""
        if name == HEAD:
            untied = "output.weight" in self._tensors
            matrix = self.find("output.weight", "lm_head.weight") if untied else table
            return [] if matrix is None else [(name, matrix)]
        match = _PRODUCT.fullmatch(name)
        if not match:
            return []
        found = []
        for part in _FUSED.get(match[3], (match[3],)):
            if part not in _NAMES:
                return []
            ours, theirs = _NAMES[part]
            matrix = self.find(f"blk.{match[2]}.{ours}.weight", f"model.layers.{match[2]}.{theirs}.weight")
            if matrix is None:
                return []
            found.append((f"{match[1]}{part}/MatMul", matrix))
        return found

    def find(self, name: str, expected: str, gathered: bool = False) -> _Matrix | None:
        """A tensor by its name, if it is in blocks and is PyTorch's `expected`. `gathered`: rows are looked up in it."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.kind not in KINDS:
            return None
        kind = KINDS[tensor.kind]
        plain = _Matrix(tensor, kind, None, Form(8, kind.size))
        for order in (None, *_rotary_orders(plain.rows, self._weights.heads)):
            matrix = replace(plain, order=order)
            if self._weights.equal(expected, matrix):
                form = _choose_form(matrix, self._how, gathered)
                return None if form is None else replace(matrix, form=form)
        return None


def _rotary_orders(rows: int, heads: Sequence[int]) -> list[NDArray[np.int64]]:
    """With each head's rotary halves, which llama.cpp's converter interleaves for Llama, apart again."""
    return [
        np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1)
        for count in dict.fromkeys(heads)
        if rows % (2 * count) == 0
    ]


def _choose_form(matrix: _Matrix, how: Carrying, gathered: bool) -> Form | None:
    kind = matrix.kind
    bits = 4 if how.precision == "int4" and kind.levels <= 16 else 8
    if not kind.has_offsets:
        return Form(bits, kind.size)
    if gathered:
        room = 255 // (kind.levels - 1)
        finer = (Form(8, kind.size, zeros=True, finer=room >> shift) for shift in range(room.bit_length()))
        return next((form for form in finer if _whole_zeros_fit(matrix, form)), None)
    means = matrix.columns // kind.size
    filled = -(-means // _FILLED_TO) * _FILLED_TO if how.whole_blocks else means
    form = Form(bits, kind.size, zeros=True, means=filled)
    return form if bits == 8 or _whole_zeros_fit(matrix, form) else replace(form, bits=8)


def _whole_zeros_fit(matrix: _Matrix, form: Form) -> bool:
    """Whether zero points leave no more than half a step of each offset."""
    for _, blocks in matrix.chunks():
        step, _, _, left = _split_offsets(blocks, matrix.kind.levels, form)
        if (np.abs(left) > 0.501 * np.abs(step)).any():
            return False
    return True


def _split_offsets(blocks: Blocks, levels: int, form: Form) -> tuple[Floats, Bytes, Bytes, Floats]:
    """Of blocks with offsets: the step, what is added to codes, the zero point, and what is left, `[rows, blocks]` each:

    d·q + m = step · (finer·q + added − zero) + left.
    """
    assert blocks.offsets is not None
    constant = blocks.scales == 0  # as (0 − 1) · −m, exactly
    step = np.where(constant, -blocks.offsets, blocks.scales / np.float32(form.finer)).astype(np.float32)
    zero = np.rint(-blocks.offsets / np.where(step == 0, 1, step))
    most = (1 << form.bits) - 1
    added = np.clip(-zero, 0, most - form.finer * (levels - 1))
    zero = np.clip(zero + added, 0, most)
    left = blocks.offsets - step * (added - zero).astype(np.float32)
    return step, added.astype(np.uint8), zero.astype(np.uint8), left


def _store(blocks: Blocks, matrix: _Matrix) -> Rows:
    form = matrix.form
    middle = 1 << (form.bits - 1)
    if blocks.offsets is None:
        zeros = np.full(blocks.scales.shape, middle, np.uint8)
        return Rows(blocks.codes + np.uint8(middle - blocks.middle), blocks.scales, zeros)
    step, added, zero, left = _split_offsets(blocks, matrix.kind.levels, form)
    codes = np.where(blocks.scales[..., None] == 0, 0, blocks.codes * np.uint8(form.finer))
    codes = codes.astype(np.uint8) + added[..., None]
    if not form.means:
        return Rows(codes, step, zero)
    rows, count = left.shape
    further = stored_blocks(matrix) - count
    columns = np.zeros((rows, further * form.size), np.float32)
    columns[:, :count] = form.size * left
    q, scales = _round(columns.reshape(rows, further, form.size), middle)
    return Rows(
        np.concatenate([codes, q], axis=1),
        np.concatenate([step, scales], axis=1),
        np.concatenate([zero, np.full((rows, further), middle, np.uint8)], axis=1),
    )


def _round(values: Floats, middle: int) -> tuple[Bytes, Floats]:
    """`values [..., size]` as (q − middle) · scale; of a few scales for each block, the one with the least squared error."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    best_q, best_scale = np.full(values.shape, middle, np.uint8), np.zeros_like(largest)
    best_error = np.square(values).sum(axis=-1, keepdims=True)
    for level in (*np.linspace(middle - 2.5, middle + 0.5, 7), *np.linspace(-middle - 0.5, 2.5 - middle, 7)):
        scale = np.where(largest == 0, 1, largest / np.float32(level))
        q = np.clip(np.rint(values / scale) + middle, 0, 2 * middle - 1)
        error = np.square((q - middle) * scale - values).sum(axis=-1, keepdims=True)
        better = error < best_error
        best_q = np.where(better, q.astype(np.uint8), best_q)
        best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    return best_q, best_scale[..., 0].astype(np.float32)


class _Weights:
    """Tensors of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        config = json.loads(read_text(folder / "config.json"))
        heads = int(config["num_attention_heads"])
        self.heads = (heads, int(config.get("num_key_value_heads") or heads))
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _open(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def equal(self, name: str, matrix: _Matrix) -> bool:
        """Whether a tensor is `matrix`, a millionth of its largest weights apart."""
        path = self._files.get(name)
        if path is None:
            return False
        with _open(path) as file:
            if list(file.get_slice(name).get_shape()) != [matrix.rows, matrix.columns]:
                return False
        for rows, blocks in matrix.chunks():
            # Opened each time: what was read of a mapped file counts as this process's memory until it is closed.
            with _open(path) as file:
                expected = file.get_slice(name)[rows.start : rows.stop].astype(np.float32, copy=False)
            near = 1e-6 * np.abs(expected).max()
            if not np.allclose(blocks.dequantised(), expected, rtol=0, atol=near):
                return False
        return True


def _open(path: Path) -> Any:
    return safe_open(path, "np")
