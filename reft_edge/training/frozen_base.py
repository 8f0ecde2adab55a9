"""How a frozen base computes in training: weights rounded once, attention, compiled blocks, activations kept or not."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.training.replaced_forwards import replaced_forwards

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


def quicker_attention(kind: str, columns: int, device: torch.device) -> str:
    """Within short rows on a CPU plain products in place of torch's fused attention, which are the same sums."""
    return "eager" if kind == "sdpa" and columns < SHORT and device.type == "cpu" else kind


@contextmanager
def quick_attention(model: Any) -> Iterator[None]:
    """Inside the block, a model attends within batches of short rows as `quicker_attention` says; an attention that is none of
    the model's own is left as it is.
    """
    config = model.config
    before = getattr(config, "_attn_implementation", None)
    if before != "sdpa":
        yield
        return

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and config._attn_implementation in ("eager", before):
            config._attn_implementation = quicker_attention(before, ids.shape[1], ids.device)

    handle = model.register_forward_pre_hook(choose, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        config._attn_implementation = before


def checkpointed(model: Any, every: int = 1, **options: Any) -> AbstractContextManager[None]:
    """Inside the block, a block keeps only its input for the backward pass and then computes the rest again.

    `every`: the first of so many blocks does, the others keep all. `options` are those of
    `torch.utils.checkpoint.checkpoint`.
    """

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return _blocks_run_by(again, model, every)


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Inside the block, the model's blocks are compiled, one code for all of them; edits stay outside, in their hooks.

    Raises ReftEdgeError where torch.compile has no compiler to work with.
    """
    if next(model.parameters()).device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ReftEdgeError(
                "--compile needs a C++ compiler, such as g++; install one, or leave it out"
            ) from error
    with _blocks_run_by(torch.compile, model):
        yield


def _blocks_run_by(
    run: Callable[[Callable[..., Any]], Callable[..., Any]], model: Any, every: int = 1
) -> AbstractContextManager[None]:
    return replaced_forwards((block, run(block.forward)) for block in list(decoder_layers(model))[::every])


@contextmanager
def frozen(model: Any, autocast: bool = False) -> Iterator[None]:
    """Inside the block, no parameter of the model takes a gradient and the model is in evaluation mode.

    With `autocast` its linear layers hold bfloat16 weights.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        with rounded_once(model) if autocast else nullcontext(), quick_attention(model):
            yield
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)
