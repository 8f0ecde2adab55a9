"""Frozen matrices in the form in which they are stored, quantised or in 16 bits: what is multiplied is unpacked, some rows at
a time, and forgotten."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_AT_ONCE = 1 << 22
"""Weights that a product unpacks at a time."""
_IN_CACHE = 1 << 20
"""Weights that are unpacked at a time, so that they stay in a processor's cache between the operations."""


class Blocks(nn.Module):
    """Rows in ONNX Runtime's blockwise layout: (q − zero point) · scale, low bits first, blocks along the last axis."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, data: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, size: int, columns: int, own: int
    ) -> None:
        """`data [rows, bytes]` of `bits` a number, `scales [rows, blocks]`, `zeros [rows, bytes]` or None for the middle.

        `size`: columns that share a scale. `columns`: those stored; of the model are `own`, the others multiply means
        (`reft_edge.export.gguf_blocks`).
        """
        super().__init__()
        self.bits, self.size, self.columns, self.own = bits, size, columns, own
        for name, tensor in (("data", data), ("scales", scales), ("zeros", zeros)):
            self.register_buffer(name, tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.data)

    def part(self, first: int, count: int) -> "Blocks":
        """Some of the rows, which share their memory."""
        rows = slice(first, first + count)
        zeros = None if self.zeros is None else self.zeros[rows]
        return Blocks(self.data[rows], self.scales[rows], zeros, self.bits, self.size, self.columns, self.own)

    def take(self, rows: slice | Tensor) -> Tensor:
        """Some of the rows in float32, `[rows, columns of the model]`."""
        scales = self.scales[rows].float()[..., None]
        values = _numbers(self.data[rows], self.bits).view(*scales.shape[:2], -1)
        if self.zeros is None:
            values -= 1 << (self.bits - 1)
        else:
            values -= _numbers(self.zeros[rows], self.bits)[:, : scales.shape[1], None]
        values *= scales
        return _without_means(values.flatten(1)[:, : self.columns], self.own, self.size)


class Stored(nn.Module):
    """Rows of numbers as they are, in 16 bits."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, rows: slice | Tensor) -> Tensor:
        """Some of the rows in float32."""
        return self.weight[rows].float()


class PackedMatrix(nn.Module):
    """A frozen matrix, `[rows, columns]`, of one part below the other."""

    def __init__(self, parts: list[Blocks | Stored], columns: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.rows, self.columns = sum(len(part) for part in parts), columns

    def take(self, rows: Tensor) -> Tensor:
        """These rows in float32, `[rows, columns]`."""
        found = torch.empty(len(rows), self.columns, device=rows.device)
        first = 0
        for part in self._parts():
            here = (rows >= first) & (rows < first + len(part))
            found[here] = part.take(rows[here] - first)
            first += len(part)
        return found

    def unpacked(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All rows in turn, in `dtype`, each time so many as there is room for."""
        at_once, in_cache = (max(1, count // self.columns) for count in (_AT_ONCE, _IN_CACHE))
        first = 0
        for part in self._parts():
            if isinstance(part, Stored) and part.weight.dtype == dtype:
                yield slice(first, first + len(part)), part.weight
            else:
                for start in range(0, len(part), at_once):
                    stop = min(start + at_once, len(part))
                    found = torch.empty(stop - start, self.columns, dtype=dtype, device=_device(part))
                    for lower in range(start, stop, in_cache):
                        upper = min(lower + in_cache, stop)
                        found[lower - start : upper - start] = part.take(slice(lower, upper))
                    yield slice(first + start, first + stop), found
            first += len(part)

    def _parts(self) -> Iterator[Any]:
        yield from self.parts


class _Product(torch.autograd.Function):
    """x Wᵀ for a packed W that takes no gradient; it is unpacked once for the product and again for x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix) -> Tensor:  # type: ignore[override]
        ctx.matrix = matrix
        product = x.new_empty(len(x), matrix.rows)
        for rows, weight in matrix.unpacked(x.dtype):
            product[:, rows] = x @ weight.mT
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        matrix: PackedMatrix = ctx.matrix
        total = torch.zeros(len(gradient), matrix.columns, device=gradient.device)
        for rows, weight in matrix.unpacked(gradient.dtype):
            total += gradient[:, rows] @ weight
        return total.to(gradient.dtype), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    found: Tensor = _Product.apply(x, matrix)  # type: ignore[no-untyped-call]
    return found


class PackedLinear(nn.Module):
    """`nn.Linear` by a packed matrix; under autocast in its type, else in that of the input."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            flat: Tensor = _product(x.to(dtype).flatten(0, -2), self.matrix)
            product = flat.view(*x.shape[:-1], self.out_features)
            return product if self.bias is None else product + self.bias.to(dtype)


class PackedEmbedding(nn.Module):
    """An embedding by a packed table; what its class does to a looked up vector, such as scaling, is done in float32."""

    def __init__(self, embedding: nn.Embedding, matrix: PackedMatrix) -> None:
        super().__init__()
        embedding.padding_idx = None
        embedding._parameters["weight"] = None
        self.embedding, self.matrix = embedding, matrix

    @property
    def num_embeddings(self) -> int:
        """Tokens."""
        return self.matrix.rows

    def forward(self, ids: Tensor) -> Tensor:
        tokens, places = torch.unique(ids, return_inverse=True)
        if len(tokens) and int(tokens[-1]) >= self.matrix.rows:
            raise IndexError(f"token {int(tokens[-1])} of {self.matrix.rows}")
        found: Tensor = functional_call(self.embedding, {"weight": self.matrix.take(tokens)}, (places,))
        return found


def packed_module(module: nn.Module, matrix: PackedMatrix) -> PackedLinear | PackedEmbedding:
    """What does as a linear layer or an embedding does, by a packed matrix."""
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(module, matrix)
    bias = module._parameters["bias"]
    return PackedLinear(matrix, None if bias is None else bias.data)


def count_parameters(model: Any) -> int:
    """Of a base, however its matrices are held; those that share a tensor count once."""
    return int(getattr(model, "base_parameters", None) or model.num_parameters())


def is_quantised(model: Any) -> bool:
    """Whether bitsandbytes holds it (`reft_edge.model.quantised`)."""
    return bool(getattr(model, "is_quantized", False))


def _numbers(data: Tensor, bits: int) -> Tensor:
    """`[rows, numbers]` in float32 of `data [rows, bytes]`."""
    if bits == 8:
        return data.float()
    found = torch.empty(*data.shape, 2, device=data.device)
    found[..., 0], found[..., 1] = data & 0xF, data >> 4
    return found.flatten(1)


def _without_means(weight: Tensor, columns: int, size: int) -> Tensor:
    """`[out, columns]` of a matrix that also multiplies the mean of each `size` activations, with further columns."""
    means = columns // size
    if not means or weight.shape[1] not in (columns + means, columns + means + -means % 32):
        return weight
    of_means = weight[:, columns : columns + means]
    return weight[:, :columns] + of_means.repeat_interleave(size, dim=1) / size


def _device(part: nn.Module) -> torch.device:
    return next(part.buffers()).device
