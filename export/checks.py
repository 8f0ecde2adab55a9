"""What every check of an export is made with: texts to run, adapters to bind, and how far two results may be apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reft_edge.adapter.algebra import ACTS, Edit, concat
from reft_edge.adapter.config import AdapterConfig
from reft_edge.adapter.linear import fold
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.session import Logits
from reft_edge.steering.interventions import Interventions

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees.",
)
TOLERANCE = 1e-3


def random_adapters(manifest: Manifest, positions: str = "f7+l7", rank: int = 4) -> list[Interventions]:
    """A LoReFT adapter for each component, with random weights at every port, strong enough to move logits by several
    units. Where ports are of further kinds, one adapter for each activation and one that multiplies are beside them."""
    found = [
        _random_adapter(manifest, component, positions, rank, seed)
        for seed, component in enumerate(manifest.components)
    ]
    component = manifest.components[0]
    if "act" in manifest.port_kinds:
        found += [
            _random_adapter(manifest, component, positions, 1, seed, "direft", act)
            for seed, act in enumerate(ACTS[1:])
        ]
    if "diagonal" in manifest.port_kinds:
        red = _random_adapter(manifest, component, positions, 1, 0, "red")
        random = torch.Generator().manual_seed(0)
        for tensor in red.trained.values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=random) / 30)
        found.append(red)
    return found


def all_at_once(interventions: Sequence[Interventions]) -> Edit:
    """Several adapters as one edit."""
    return concat([fold(part.to_adapter()) for part in interventions])


def _random_adapter(
    manifest: Manifest,
    component: str,
    positions: str,
    rank: int,
    seed: int,
    intervention: str = "loreft",
    act_fn: str = "linear",
) -> Interventions:
    config = AdapterConfig(
        intervention,
        manifest.base_name,
        manifest.base_fingerprint,
        manifest.hidden_size,
        manifest.num_layers,
        manifest.layers,
        rank,
        positions,
        act_fn=act_fn,
        component=component,
    )
    return Interventions(config, seed=seed)


@torch.no_grad()
def torch_logits(model: Any, row: Sequence[int]) -> Logits:
    """PyTorch's logits for one row of tokens, `[tokens, vocabulary]`, float32."""
    return batch_logits(model, [row])[0]


@torch.no_grad()
def batch_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Logits]:
    """The same of several rows, in one pass over the model's weights."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    given = {} if mask.all() else {"attention_mask": mask}
    logits = model(input_ids=ids, **given).logits.float().numpy()
    return [logits[number, : len(row)] for number, row in enumerate(rows)]


def largest_difference(left: Sequence[Logits], right: Sequence[Logits]) -> float:
    """max |left − right| over all rows, each `[tokens, n]`."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(left, right, strict=True)]))


def off_ports(rank0_bitwise: bool) -> list[str]:
    """What is off with unused ports, in words; empty if nothing is."""
    return (
        []
        if rank0_bitwise
        else ["with no adapter bound, the graph with ports differs from the graph without"]
    )


def off_pytorch(what: str, error: float) -> list[str]:
    """What is off with numbers that are `error` from PyTorch's, in words; empty if nothing is. NaN is off."""
    return (
        []
        if error <= TOLERANCE
        else [f"{what} differ from PyTorch's by {error:.2g}, more than {TOLERANCE:g}"]
    )
