"""Work on tokens alone that matter: matrix products leave padding out, and in the last block only tokens with a label have
a query.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import component_module, decoder_layers
from reft_edge.model.packed import PackedLinear
from reft_edge.training.replaced_forwards import replaced_forwards

_PADDING = 0.05
"""Share of padding from which it is left out: gathering the other tokens costs something, too."""
_LINEAR = (nn.Linear, PackedLinear, Conv1D)
_QUERIES = ("q_proj", "o_proj", "dense", "out_proj")
"""Parts of an attention that work on each query by itself."""


@dataclass
class _Needed:
    """Tokens of the pass under way, as indices in the flattened batch; None for all."""

    real: Tensor | None = None
    labelled: Tensor | None = None


class NeededTokens:
    """Inside `attached`, passes leave out what no label depends on, once `of` has said of a pass what that is."""

    def __init__(self) -> None:
        self._needed = _Needed()

    def of(self, mask: Tensor, counts: Tensor) -> None:
        """The next pass is of `mask` and `counts [rows, columns]`: tokens that are no padding, and those with a label."""
        real = mask.flatten().nonzero().squeeze(1) if much_padding(mask) else None
        self._needed = _Needed(real, counts.flatten().nonzero().squeeze(1))

    def nothing(self) -> None:
        """The next pass leaves nothing out."""
        self._needed = _Needed()

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Inside the block, the model works so."""
        blocks = list(decoder_layers(model))
        some = (
            (module, self._only(module, of_labels))
            for block in blocks
            for module, of_labels in _by_token(block, block is blocks[-1])
        )
        try:
            with replaced_forwards(some):
                yield
        finally:
            self.nothing()

    def _only(self, module: nn.Module, of_labels: bool) -> Any:
        forward = module.forward

        def some(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            tokens = self._needed.labelled if of_labels else self._needed.real
            if tokens is None:
                return forward(x, *args, **kwargs)
            output = forward(x.flatten(0, 1).index_select(0, tokens)[None], *args, **kwargs)
            if isinstance(output, tuple):
                return (_spread(output[0], tokens, x), *output[1:])
            return _spread(output, tokens, x)

        return some


def much_padding(mask: Tensor) -> bool:
    """Whether it is worth something to leave it out."""
    return mask.numel() > 0 and 1 - float(mask.float().mean()) > _PADDING


def _by_token(block: nn.Module, last: bool) -> Iterator[tuple[nn.Module, bool]]:
    """Parts of a block that do the same with each token by itself, and whether only labels depend on them."""
    for component in ("mlp", "attention"):
        try:
            part = component_module(block, component)
        except ReftEdgeError:
            continue
        if component == "mlp":
            yield part, last
            continue
        for name, module in part.named_children():
            if isinstance(module, _LINEAR):
                yield module, last and name in _QUERIES


def _spread(output: Tensor, tokens: Tensor, x: Tensor) -> Tensor:
    """Zeros elsewhere."""
    flat = output.new_zeros(x.shape[0] * x.shape[1], output.shape[-1])
    return flat.index_copy(0, tokens, output.flatten(0, -2)).view(*x.shape[:2], -1)
