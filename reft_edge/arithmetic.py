"""How a frozen base computes in training: weights rounded once for bfloat16, attention by what is faster on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SHORT = 200
"""Tokens a row below which plain matrix products are faster than torch's fused attention on CPUs (measured: torch 2.13)."""


@contextmanager
def rounded_once(model: Any) -> Iterator[None]:
    """Inside the block, linear layers of a frozen float32 model have bfloat16 weights, for use under autocast.

    Autocast would round a weight that takes no gradient at every use, and keep each copy for the backward pass; the
    products are the same.
    """
    rounded = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32
    ]
    weights = [module.weight for module in rounded]
    for module in rounded:
        module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(rounded, weights, strict=True):
            module.weight = weight


@contextmanager
def quick_attention(model: Any) -> Iterator[None]:
    """Inside the block, a model on a CPU attends within batches of short rows by plain products, which are the same sums."""
    config = model.config
    before = getattr(config, "_attn_implementation", None)
    if before != "sdpa" or next(model.parameters()).device.type != "cpu":
        yield
        return

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        config._attn_implementation = "eager" if ids is not None and ids.shape[1] < SHORT else before

    handle = model.register_forward_pre_hook(choose, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        config._attn_implementation = before
