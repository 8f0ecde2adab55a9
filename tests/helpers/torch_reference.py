"""What PyTorch says: the reference for exported graphs."""

import inspect
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reft_edge.adapter.config import OF_RANK_1, Adapter, AdapterConfig
from reft_edge.adapter.file import save_adapter
from reft_edge.model.encoders import load_text_tokens
from reft_edge.model.exported_weights import GraphWeights
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.manifest import load_manifest
from reft_edge.steering.heads import class_scores
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions


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
        1 if intervention in OF_RANK_1 else rank,
        positions,
        tied,
        **fields,
    )
    adapter = Interventions(config, seed=seed).to_adapter()
    if intervention in OF_RANK_1:
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


def random_classifier(model, path=None, intervention="loreft", labels=("no", "yes", "?"), seed=0, **fields):
    """A classification adapter with a head of some size; without labels, no head."""
    layers = model.config.num_hidden_layers
    config = AdapterConfig(
        intervention,
        "tiny",
        fingerprint(model),
        model.config.hidden_size,
        layers,
        tuple(range(layers)),
        1 if intervention in OF_RANK_1 else 3,
        **{"positions": "f3+l3", "labels": labels, "pooling": "mean" if labels else "", **fields},
    )
    random = np.random.default_rng(seed)
    tensors = dict(Interventions(config, seed=seed).to_adapter().tensors)
    for name in ("head.weight", "head.bias", "v", "s"):
        if name in tensors:
            tensors[name] = random.normal(size=tensors[name].shape).astype(np.float32)
    adapter = Adapter(config, tensors)
    if path is not None:
        save_adapter(adapter, path)
    return adapter


def torch_probabilities(source, model, adapter, texts):
    """Of every label, `[labels]` a text."""
    tokens = load_text_tokens(source)
    interventions = Interventions.from_adapter(adapter)
    with torch.no_grad(), steered(model, (interventions, 1.0)):
        return [
            class_scores(model, interventions, [tokens(text)], torch.device("cpu"))[0].softmax(0).numpy()
            for text in texts
        ]


def take_graph_weights(model, folder):
    """Give a float32 model what the graph of an exported folder multiplies with, in float32, too; returns the model."""
    weights = GraphWeights(model, folder / load_manifest(folder).graph)
    weights.prepare(model)
    for name, parameter in model.named_parameters():
        weights.change(name, parameter.data, 0)
    return model
