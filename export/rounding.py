"""Rounding a graph's matrices to 4 or 8 bits, a few rows at a time."""

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from reft_edge.export.data_file import DataFile
from reft_edge.export.deferred import DeferredTensor
from reft_edge.export.nbits import Floats, Form, Rows, replace_lookup, replace_product, write_matrices

HEAD = "/lm_head/MatMul"
LOOKUP = ("Gather", "GatherBlockQuantized")
_AT_ONCE = 1 << 20  # weights that are rounded at a time
_THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded."""

    algorithm: str
    """rtn or k_quant, see `Quantisation`."""
    bits: int
    """4 or 8."""
    bits_of: Mapping[str, int]
    """Of products that get others, by the name of their node."""
    size: int
    """Weights that share a scale."""
    accuracy_level: int
    """Of quantised products, as in `Quantisation`."""
    excluded: Collection[str] = ()
    """Products that stay as they are."""

    def form(self, bits: int) -> Form:
        """How a matrix of so many bits is stored."""
        return Form(bits, self.size, zeros=self.algorithm == "k_quant")


@dataclass(frozen=True)
class Rounded:
    """A matrix that is rounded as it is stored."""

    load: Callable[[], torch.Tensor]
    """[rows, columns], in any float type."""
    rows: int
    columns: int
    form: Form
    algorithm: str

    def stored(self) -> Iterator[Rows]:
        """All rows, some at a time."""
        content = self.load()
        step = max(1, _AT_ONCE // self.columns)
        starts = range(0, self.rows, step)
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(starts), 2 * _THREADS):
                group = starts[first : first + 2 * _THREADS]
                yield from pool.map(lambda start: self._round(content[start : start + step]), group)

    def _round(self, content: torch.Tensor) -> Rows:
        size = self.form.size
        filled = torch.nn.functional.pad(content.float(), (0, -self.columns % size))
        values: Floats = filled.numpy().reshape(len(filled), -1, size)
        scales, zeros = _ALGORITHMS[self.algorithm](values, self.form.bits)
        codes = values * (1 / scales)[..., None]
        codes += zeros[..., None]
        np.rint(codes, out=codes)
        np.clip(codes, 0, (1 << self.form.bits) - 1, out=codes)
        return Rows(codes.astype(np.uint8), scales, zeros)


def round_matrices(graph: ir.Graph, data: DataFile, how: Rounding, done: Callable[[str], None]) -> None:
    """Round every product of activations with a stored matrix, and the table of embeddings, and write them to `data`.

    `done` is told the name of each product. A table that is the head's matrix is stored once.
    """
    head: Rounded | None = None
    stored: list[ir.Value] = []
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or weight.const_value.shape.rank() != 2:
            continue
        name = str(node.name)
        if name in how.excluded:
            continue
        form = how.form(how.bits_of.get(name, how.bits))
        matrix = _rounded(weight.const_value, form, how.algorithm, transposed=True)
        (product,) = replace_product(graph, data, node, [(name, matrix)], {}, how.accuracy_level)
        if name == HEAD:
            head, stored = matrix, [value for value in product.inputs[1:] if value is not None]
        done(name)
    _round_table(graph, data, how, head, stored)


def _round_table(
    graph: ir.Graph, data: DataFile, how: Rounding, head: Rounded | None, stored: list[ir.Value]
) -> None:
    lookup = next(
        (
            node
            for node in graph
            if (node.name or "").startswith("/model/embed_tokens/") and node.op_type in LOOKUP
        ),
        None,
    )
    if lookup is None or lookup.name in how.excluded:
        return
    if lookup.op_type == "GatherBlockQuantized":
        _use_head(lookup, stored)
        return
    table = lookup.inputs[0]
    if table is None or table.const_value is None:
        return
    matrix = _rounded(table.const_value, how.form(how.bits), how.algorithm)
    if matrix.columns % how.size:
        return
    if head is not None and _alike(matrix, head):
        matrix, values = head, stored
    else:
        values = write_matrices(graph, data, "model.embed_tokens", [matrix], table.const_value.dtype)
    replace_lookup(graph, lookup, matrix.form, (matrix.rows, matrix.columns), values)


def _use_head(lookup: ir.Node, stored: list[ir.Value]) -> None:
    """Have the builder's lookup in the head's blocks find them, unless it reads others already."""
    reshape = lookup.inputs[0].producer() if lookup.inputs[0] is not None else None
    source = reshape.inputs[0] if reshape is not None else None
    if source is None or source.const_value is not None:
        return
    wanted = [(reshape, 0), *((lookup, index) for index in range(2, len(lookup.inputs)))]
    for (node, index), value in zip(wanted, stored, strict=True):
        assert node is not None
        node.replace_input_with(index, value)


def _rounded(stored: Any, form: Form, algorithm: str, transposed: bool = False) -> Rounded:
    def load() -> torch.Tensor:
        if isinstance(stored, DeferredTensor):
            source = stored.source.t() if transposed else stored.source
            content: torch.Tensor = source.compute()  # type: ignore[attr-defined]
            return content
        content = torch.from_numpy(stored.numpy())
        return content.t() if transposed else content

    rows, columns = (int(count) for count in stored.shape.numpy())
    if transposed:
        rows, columns = columns, rows
    return Rounded(load, rows, columns, form, algorithm)


def _alike(one: Rounded, other: Rounded) -> bool:
    if (one.rows, one.columns) != (other.rows, other.columns):
        return False
    return torch.equal(one.load(), other.load())


def _nearest(values: Floats, bits: int) -> tuple[Floats, Any]:
    """Scales and zero points of rtn, `[rows, blocks]`: blocks are symmetric about zero."""
    levels = (1 << bits) - 1
    largest = np.abs(values).max(axis=-1)
    scales = np.where(largest == 0, 1, largest * np.float32(2 / levels)).astype(np.float32)
    return scales, np.full(scales.shape, 1 << (bits - 1), np.uint8)


def _searched(values: Floats, bits: int) -> tuple[Floats, Any]:
    """Scales and zero points of k_quant, `[rows, blocks]`: those of a few with the least weighted squared error."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")
        _, scales, zeros = quant_tensor_k_quant_cpu(values, bits, values.shape[-1])
    shape = values.shape[:-1]
    return scales.reshape(shape).astype(np.float32), zeros.reshape(shape)


_ALGORITHMS: dict[str, Callable[[Floats, int], tuple[Floats, Any]]] = {"rtn": _nearest, "k_quant": _searched}
