"""What an exported graph really multiplies with: its 16-bit or quantised weights, read back into a PyTorch model."""

import mmap
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.packed import Blocks, PackedMatrix, Stored

_HALF = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
_IN_BLOCK = re.compile(r"/model/layers\.(\d+)/\w+/(\w+)/MatMul(?:_Q\d)?")
_ALIASES = {
    "o_proj": ("dense", "out_proj"),
    "gate_proj": ("w1",),
    "up_proj": ("w3",),
    "down_proj": ("w2", "output_linear"),
    "qkv_proj": ("in_proj_qkv",),
    "z_proj": ("in_proj_z",),
    "a_proj": ("in_proj_a",),
    "b_proj": ("in_proj_b",),
}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_OFFSET_NORMS = re.compile(r"Gemma(?!4).*Norm|Norm1P|Qwen3_5RMSNorm$")
"""Norms that multiply by 1 + weight, which is the sum that the graph stores."""
_IN_FLOAT32 = ("A_log", "dt_bias")
"""Parameters of linear attention that the graph stores so, whatever its own type is."""
_AT_ONCE = 1 << 22  # weights that are dequantised at a time
_SPLIT = {"gate_proj": 0, "up_proj": 1}
_HALVES = ("gate_up_proj", "input_linear")
"""Layers of which those are one half each."""


@dataclass(frozen=True)
class _Part:
    """Rows of a parameter that are rows of a quantised matrix."""

    weight: "_Quantised"
    first: int
    """Of the matrix's rows."""
    rows: slice
    """Of the parameter's."""


class GraphWeights:
    """What a graph multiplies with, by the names of a PyTorch model's parameters."""

    def __init__(self, model: Any, source: Path) -> None:
        """`source` is the graph file; of `model`, only names and shapes are read.

        Raises ReftEdgeError if a quantised matrix has no counterpart in the model.
        """
        graph = ir.load(source).graph
        self._mapped = [
            value.const_value
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        ]
        stored = {value.dtype for value in graph.initializers.values()}
        halves = [half for half in _HALF if half in stored]
        self._dtype = _HALF[halves[0]] if halves else None
        self._exact_norms = not any(
            name.endswith("norm.weight") and ".v_norm." not in name and value.dtype in halves
            for name, value in graph.initializers.items()
        )
        self._exact_tables = any(
            name.startswith("cos_cache") and value.dtype == ir.DataType.FLOAT
            for name, value in graph.initializers.items()
        )
        self._modules = dict(model.named_modules())
        self._parts: dict[str, list[_Part]] = {}
        self._shapes: dict[str, Sequence[int]] = {}
        self._unties = self._find(model, graph)
        self._sums: dict[str, list[float]] = {}

    @property
    def largest_change(self) -> float:
        """Of the quantised parameters that were changed: the RMS of what rounding took, of the RMS of the values."""
        return max(((taken / before) ** 0.5 for taken, before in self._sums.values() if before), default=0.0)

    def _find(self, model: Any, graph: ir.Graph) -> bool:
        """Note where each quantised matrix belongs; says whether the head is another matrix than the embedding."""
        names = {module: name for name, module in self._modules.items()}
        blocks, embedding = decoder_layers(model), model.get_input_embeddings()
        table: _Quantised | None = None
        unties = False
        for node in graph:
            if node.op_type == "GatherBlockQuantized":
                table = _Quantised.of_lookup(node, embedding.weight.shape)
                self._add(table, [(names[embedding], embedding.weight.shape, 1, 0)])
            if node.op_type != "MatMulNBits":
                continue
            weight = _Quantised.of_product(node)
            match = _IN_BLOCK.fullmatch(node.name or "")
            if match:
                targets = _targets(blocks[int(match[1])], match[2])
                self._add(
                    weight, [(names[module], module.weight.shape, *share) for module, *share in targets]
                )
            elif (node.name or "").startswith("/lm_head/"):
                head = model.get_output_embeddings()
                unties = not weight.equals(table)
                self._add(weight, [(names[head], head.weight.shape, 1, 0)])
            else:
                raise ReftEdgeError(
                    f"cannot check the quantised matrix {node.name}: it is in no block of the model"
                )
        return unties

    def _add(self, weight: "_Quantised", targets: Sequence[tuple[str, Sequence[int], int, int]]) -> None:
        """A matrix's rows are those of one parameter after the other, or one of so many equal shares of a parameter's."""
        first, columns = 0, int(targets[0][1][1])
        for name, shape, shares, share in targets:
            count = shape[0] // shares
            self._shapes[f"{name}.weight"] = shape
            self._parts.setdefault(f"{name}.weight", []).append(
                _Part(weight, first, slice(share * count, (share + 1) * count))
            )
            first += count
        found = weight.blocks(columns, 0, 1).take(slice(0, 1)).shape[1]
        if (weight.rows, found) != (first, columns):
            raise ReftEdgeError(
                f"a quantised matrix is {[weight.rows, found]}, the model's {[first, columns]}"
            )

    def prepare(self, model: Any) -> None:
        """Have the model's head be a parameter of its own where the graph's is, and its rotary tables be rounded."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if self._unties and head.weight is embedding.weight:
            head.weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)
        self.round_tables()

    def round_tables(self) -> None:
        """Have the model's rotary tables be rounded as the graph's are."""
        for module in self._modules.values():
            rounded = self._dtype is not None and not self._exact_tables
            if rounded and type(module).__name__.endswith("RotaryEmbedding"):
                module.register_forward_hook(
                    lambda _module, _inputs, out: tuple(x.to(self._dtype).float() for x in out)
                )

    def __contains__(self, name: object) -> bool:
        """Whether a parameter, or some rows of it, are quantised."""
        return name in self._parts

    def packed(self, name: str) -> PackedMatrix | None:
        """A quantised parameter as the graph has it; None if some of its rows are not quantised."""
        parts = sorted(self._parts[name], key=lambda part: part.rows.start)
        rows, columns = self._shapes[name]
        if sum(part.rows.stop - part.rows.start for part in parts) != rows:
            return None
        return PackedMatrix(
            [part.weight.blocks(columns, part.first, part.rows.stop - part.rows.start) for part in parts],
            columns,
        )

    def halved(self, stored: Tensor) -> PackedMatrix | None:
        """A matrix that is not quantised in the graph's 16 bits, or in those in which it is stored; None for float32."""
        dtype = self._dtype or stored.dtype
        if dtype not in _HALF.values():
            return None
        return PackedMatrix([Stored(stored.to(dtype))], stored.shape[1])

    def changed(self, name: str, stored: Tensor) -> Tensor:
        """What the graph has for a parameter, in float32; `stored` may be written over."""
        values = stored.float()
        self.change(name, values, 0)
        return values

    def change(self, name: str, values: Tensor, first: int) -> None:
        """Put the graph's numbers in place of some rows of a parameter, float32; `first` is the number of the first."""
        changes = [_copy(part, values, first) for part in self._parts.get(name, ())]
        sums = self._sums.setdefault(name, [0.0, 0.0])
        for taken, before in changes:
            sums[0] += taken
            sums[1] += before
        for stored in self._mapped:
            _forget_pages(stored)
        if self._dtype is None or name in self._parts:
            return
        path, _, own = name.rpartition(".")
        kind = type(self._modules[path]).__name__
        if (self._exact_norms and "Norm" in kind) or own in _IN_FLOAT32:
            return
        plus = 1.0 if own == "weight" and _OFFSET_NORMS.search(kind) else 0.0
        values.copy_((values + plus).to(self._dtype).float() - plus)


@dataclass(frozen=True)
class _Quantised:
    """A matrix in ONNX Runtime's blockwise layout: (q − zero point) · scale, low bits first, blocks along the last axis."""

    data: Any
    """uint8, `bits` a number"""
    place: tuple[Any, ...] | None
    """Of `data`: its file, offset and length, if it is in a file of its own."""
    scales: Any
    zeros: Any
    """None for the middle."""
    bits: int
    size: int
    """Columns that share a scale."""
    rows: int
    columns: int
    """With those that multiply means (`reft_edge.export.carry`)."""

    @classmethod
    def of_product(cls, node: ir.Node) -> "_Quantised":
        """The weight of a MatMulNBits."""
        bits, size, rows, columns = (
            int(node.attributes[name].as_int()) for name in ("bits", "block_size", "N", "K")
        )
        data, scales, zeros = (_array(_optional(node, index)) for index in (1, 2, 3))
        return cls(data, _place(node.inputs[1]), scales, zeros, bits, size, rows, columns)

    @classmethod
    def of_lookup(cls, node: ir.Node, shape: Sequence[int]) -> "_Quantised":
        """The table of a GatherBlockQuantized, of a model whose embedding has `shape`."""
        bits = int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4
        data, scales, zeros = (_array(_optional(node, index)) for index in (0, 2, 3))
        size = int(node.attributes["block_size"].as_int())
        return cls(data, _place(node.inputs[0]), scales, zeros, bits, size, shape[0], shape[1])

    def equals(self, other: "_Quantised | None") -> bool:
        """Whether both are the same numbers."""
        if other is None:
            return False
        pairs = [(self.scales, other.scales), (self.zeros, other.zeros)]
        if self.place is None or self.place != other.place:
            pairs.append((self.data, other.data))
        return all(
            a is b or (a is not None and b is not None and np.array_equal(a.reshape(-1), b.reshape(-1)))
            for a, b in pairs
        )

    def blocks(self, own: int, first: int, count: int) -> Blocks:
        """Some of the rows, of a matrix that has `own` columns in the model; they share the graph's memory."""
        data, scales, zeros = (
            None if part is None else _tensor(part.reshape(self.rows, -1)[first : first + count])
            for part in (self.data, self.scales, self.zeros)
        )
        assert data is not None
        assert scales is not None
        return Blocks(data, scales, zeros, self.bits, self.size, self.columns, own)


def _targets(block: nn.Module, name: str) -> list[tuple[Any, int, int]]:
    """The linear layers that a product of a block stands for, each with the number of shares of it and which one it is."""
    linear = {
        path.rsplit(".", 1)[-1]: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    if own := next((alias for alias in (name, *_ALIASES.get(name, ())) if alias in linear), None):
        return [(linear[own], 1, 0)]
    if name in _FUSED and all(part in linear for part in _FUSED[name]):
        return [(linear[part], 1, 0) for part in _FUSED[name]]
    whole = next((alias for alias in _HALVES if alias in linear), None)
    if name in _SPLIT and whole is not None:
        return [(linear[whole], 2, _SPLIT[name])]
    raise ReftEdgeError(
        f"cannot check the quantised matrix {name}: the block has {', '.join(sorted(linear))}"
    )


def _forget_pages(stored: ir.ExternalTensor) -> None:
    """Have what was read of a mapped file no longer count as this process's memory; it is read again when it is used."""
    if sys.platform != "win32" and stored.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
        stored.raw.madvise(mmap.MADV_DONTNEED)


def _copy(part: _Part, values: Tensor, first: int) -> tuple[float, float]:
    """Write a matrix's rows over a parameter's, some at a time: it may be larger than what memory has left.

    `values` are the parameter's from row `first` on. Returns the sums of the squares of what that changed, and of what was
    there.
    """
    lower, upper = max(part.rows.start, first), min(part.rows.stop, first + len(values))
    target = values[max(0, lower - first) : max(0, upper - first)]
    blocks = part.weight.blocks(target.shape[1], part.first + lower - part.rows.start, len(target))
    step = max(1, _AT_ONCE // part.weight.columns)
    taken = before = 0.0
    for start in range(0, len(target), step):
        stop = min(start + step, len(target))
        rows = blocks.take(slice(start, stop))
        taken += float((target[start:stop] - rows).square().sum())
        before += float(target[start:stop].square().sum())
        target[start:stop] = rows
    return taken, before


def _tensor(array: NDArray[Any]) -> Tensor:
    """That shares the array's memory, which may be a file that is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _place(value: ir.Value | None) -> tuple[Any, ...] | None:
    stored = None if value is None else _initializer(value).const_value
    return (stored.path, stored.offset, stored.length) if isinstance(stored, ir.ExternalTensor) else None


def _initializer(value: ir.Value) -> ir.Value:
    """What a value is stored in, looked up through a reshape."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        return _initializer(producer.inputs[0])
    return value


def _array(value: ir.Value | None) -> Any:
    """An initializer's content as bytes or floats; None if the input is absent."""
    if value is None:
        return None
    stored = _initializer(value).const_value
    if stored is None:
        raise ReftEdgeError(f"the weight {value.name} is not stored in the graph")
    return stored.numpy()
