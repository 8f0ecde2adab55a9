"""A base model's fingerprint: the same for the same weights however they are stored or loaded, else another."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

SAMPLES = 1024
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into the names of parameters whose module it compiled, sharded or checkpoints."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hex digits of a SHA-256 over every parameter's name, shape and up to 1,024 evenly spaced values.

    Interventions that are attached to the model, as hooks or as modules in it, are no part of it, nor are torch's wrappers
    around its modules.

    Values are rounded to bfloat16 first, so that the fingerprint does not depend on the precision in which the
    weights were loaded, as long as that kept at least bfloat16's 8 bits of mantissa. It tells models apart; it is
    no proof against someone who builds a model to collide. A model that was quantised while it was loaded keeps its
    `base_fingerprint`, that of the weights as they are stored.
    """
    if kept := getattr(model, "base_fingerprint", None):
        return str(kept)
    return fingerprint_of(sorted(_own_parameters(model), key=lambda found: found[0]))


@torch.no_grad()
def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The same of weights that come one at a time, each with its parameter's name, in the order of the names."""
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().flatten()
        index = (
            torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
            .round()
            .long()
        )
        sample = flat[index.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(sample.numpy().astype("<i2").tobytes())
    return digest.hexdigest()[:16]


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the base once, by the name it has in the model as it was loaded."""
    attached = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "is_intervention", False)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in attached:
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            yield name, parameter
