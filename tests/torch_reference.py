"""What PyTorch says: the reference for exported graphs."""

import inspect
from pathlib import Path

import torch
from torch import nn

from reft_edge.adapter import Adapter, AdapterConfig, save_adapter
from reft_edge.fingerprint import fingerprint
from reft_edge.interventions import Interventions


def random_adapter(
    model: nn.Module,
    intervention: str = "loreft",
    positions: str = "f7+l7",
    tied: bool = False,
    rank: int = 3,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    path: Path | None = None,
    strength: float = 1.0,
    **fields: object,
) -> Adapter:
    """An adapter with random weights for this model; written to `path` if one is given."""
    num_layers = model.config.num_hidden_layers
    config = AdapterConfig(
        intervention,
        "tiny",
        fingerprint(model),
        model.config.hidden_size,
        num_layers,
        layers if layers is not None else tuple(range(num_layers)),
        1 if intervention == "steering" else rank,
        positions,
        tied,
        **fields,
    )
    adapter = Interventions(config, seed=seed).to_adapter()
    if intervention == "steering":
        torch.manual_seed(seed)
        adapter = Adapter(
            config, {name: torch.randn(shape).numpy() for name, shape in config.shapes().items()}
        )
    for name in ("b", "alpha"):
        if name in adapter.tensors:
            adapter.tensors[name][:] *= strength
    if path is not None:
        save_adapter(adapter, path)
    return adapter


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]`."""
    return model(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, with a KV cache, up to the end-of-sequence token."""
    eos, tokens = model.config.eos_token_id, []
    # transformers 5.24 renamed `past_key_values`
    argument = next(
        name for name in inspect.signature(model.forward).parameters if name in ("cache", "past_key_values")
    )
    output = model(input_ids=torch.tensor([ids]), use_cache=True)
    while len(tokens) < count:
        token = int(output.logits[0, -1].argmax())
        if token == eos:
            break
        tokens.append(token)
        cache = {argument: output[argument]}
        output = model(input_ids=torch.tensor([[token]]), **cache, use_cache=True)
    return tokens
