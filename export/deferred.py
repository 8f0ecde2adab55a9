"""Weights that onnxruntime-genai's builder handles without having them: they are read when the graph is written.

The builder slices, joins, transposes and adds to the parameters of a PyTorch model. Here these are tensors without content
that remember what was done to them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from reft_edge.errors import ReftEdgeError
from reft_edge.model.checkpoint import Checkpoint

_AT_ONCE = 1 << 22  # numbers that are converted at a time
_ATEN = torch.ops.aten
_MOVES = {
    _ATEN.alias, _ATEN.cat, _ATEN.clone, _ATEN.detach, _ATEN.expand, _ATEN.permute, _ATEN.reshape, _ATEN.select,
    _ATEN.slice, _ATEN.split, _ATEN.split_with_sizes, _ATEN.squeeze, _ATEN.stack, _ATEN.t, _ATEN.transpose, _ATEN.unbind,
    _ATEN.unsqueeze, _ATEN.view, _ATEN._unsafe_view,
}  # fmt: skip
"""What leaves numbers as they are, so that it can be done in the type in which they are stored."""


class CannotDeferError(ReftEdgeError):
    """Something was done to weights that cannot be put off."""


class Deferred(Tensor):
    """A float32 tensor whose content is computed when it is asked for."""

    compute: Callable[[], Tensor]
    moved: bool
    """Whether the content is stored numbers in another order, in whatever type they are stored."""

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor], moved: bool) -> "Deferred":
        """`like` has the shape and no content."""
        made: Deferred = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.compute, made.moved = compute, moved
        return made

    def numpy(self, *, force: bool = False) -> Any:
        """The content, float32."""
        return self.compute().to(self.dtype).numpy(force=force)

    def tolist(self) -> Any:
        """The content, as Python's numbers."""
        return self.compute().to(self.dtype).tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note what is to be done."""
        given = (args, kwargs or {})
        if func._schema.is_mutable:
            raise CannotDeferError(f"weights are changed in place by {func}")
        found = list[Tensor]()
        tree_map_only(Tensor, found.append, given)
        moved = func.overloadpacket in _MOVES and all(
            isinstance(part, Deferred) and part.moved for part in found
        )

        def run() -> Any:
            positional, named = tree_map_only(Deferred, lambda part: _content(part, moved), given)
            return func(*positional, **named)

        positional, named = tree_map_only(Tensor, _shape_of, given)
        try:
            shaped = func(*positional, **named)
        except Exception:  # what depends on content
            return run()
        if isinstance(shaped, Tensor):
            return cls(shaped, run, moved)
        if isinstance(shaped, list | tuple):
            return type(shaped)(
                cls(part, partial(_one_of, run, number), moved) for number, part in enumerate(shaped)
            )
        return run()


def _one_of(run: Callable[[], Any], number: int) -> Tensor:
    found: Tensor = run()[number]
    return found


def _content(part: Deferred, moved: bool) -> Tensor:
    return part.compute() if moved else part.compute().to(part.dtype)


def _shape_of(part: Tensor) -> Tensor:
    if isinstance(part, Deferred):
        return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")
    return part.to("meta")


def defer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model with deferred parameters."""
    made: dict[str, nn.Parameter] = {}
    for path, module in checkpoint.model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            key = checkpoint.keys[f"{path}.{name}"]
            if key not in made:
                leaf = Deferred(parameter.detach(), partial(checkpoint.read, key), True)
                made[key] = nn.Parameter(leaf, requires_grad=False)
            module._parameters[name] = made[key]
    return checkpoint.model


class DeferredTensor(ir.LazyTensor):
    """A deferred weight in a graph."""

    def __init__(self, source: Deferred, dtype: ir.DataType, name: str) -> None:
        """`dtype` is the graph's."""
        self.source = source
        super().__init__(self._load, dtype, ir.Shape(source.shape), name=name)

    def _load(self) -> ir.TensorProtocol:
        return TorchTensor(self.source.compute().to(to_torch_dtype(self.dtype)).contiguous(), name=self.name)

    def pieces(self) -> Iterator[ir.TensorProtocol]:
        """The content, some rows at a time."""
        content, dtype = self.source.compute(), to_torch_dtype(self.dtype)
        if not content.ndim:
            yield self._load()
            return
        step = max(1, _AT_ONCE * len(content) // max(1, content.numel()))
        for start in range(0, len(content), step):
            yield TorchTensor(content[start : start + step].to(dtype).contiguous())
