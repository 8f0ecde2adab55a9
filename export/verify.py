"""Checking an exported graph against the PyTorch model it was made from, before anybody runs it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reft_edge.adapter import AdapterConfig, fold
from reft_edge.errors import ReftEdgeError
from reft_edge.interventions import Interventions
from reft_edge.manifest import Manifest
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.session import GraphSession, Logits, open_graph, plain_failure
from reft_edge.steering import steered

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees.",
)
_FP32_TOLERANCE = 1e-3
_QUANTISED_SHARE = 0.5


@dataclass(frozen=True)
class Verification:
    """Figures of one export; logits are compared at every token of a few prompts."""

    base_error: float
    """max |logits(ONNX Runtime) − logits(PyTorch)| without an adapter."""
    steered_error: float
    """The same with a random LoReFT adapter active at every port."""
    effect: float
    """max |logits with − logits without that adapter| in PyTorch: what the error is to be seen against."""
    steered_rms_share: float
    """Root mean square of the error with the adapter, as a share of the effect's."""
    agreement: float
    """Share of tokens, adapter active, whose likeliest next token is PyTorch's."""
    rank0_bitwise: bool
    """Whether the graph with unused ports equals the graph before ports, bit for bit."""

    def failures(self, precision: str) -> list[str]:
        """What is off, in words; empty if the export can be trusted.

        fp32 must agree with PyTorch to 1e-3. A quantised graph differs from its base anyway: its error with the
        adapter must stay below half of the adapter's effect, which a misplaced port would not.
        """
        found = []
        if not self.rank0_bitwise:
            found.append("with no adapter bound, the graph with ports differs from the graph without")
        if precision == "fp32" and max(self.base_error, self.steered_error) > _FP32_TOLERANCE:
            found.append(f"logits differ from PyTorch's by {max(self.base_error, self.steered_error):.2g}, "
                         f"more than {_FP32_TOLERANCE:g}")
        if precision != "fp32" and self.steered_rms_share > _QUANTISED_SHARE:
            found.append(f"the error with an adapter is {self.steered_rms_share:.0%} of the adapter's effect, "
                         f"more than {_QUANTISED_SHARE:.0%}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {name: value if isinstance(value, bool) else float(value) for name, value in asdict(self).items()}


def random_adapter(manifest: Manifest, positions: str = "f7+l7", rank: int = 4, seed: int = 0) -> Interventions:
    """A LoReFT adapter with random weights at every port, strong enough to move logits by several units."""
    config = AdapterConfig("loreft", manifest.base_name, manifest.base_fingerprint, manifest.hidden_size,
                           manifest.num_layers, manifest.layers, rank, positions)
    return Interventions(config, seed=seed)


def verify(folder: Path, plain_graph: Path, manifest: Manifest, model: nn.Module, rows: Sequence[Sequence[int]]) -> Verification:
    """Run `rows` of token ids through the graph with ports, the one without, and the PyTorch model."""
    interventions = random_adapter(manifest)
    expected = [torch_logits(model, row) for row in rows]
    with steered(model, (interventions, 1.0)):
        expected_steered = [torch_logits(model, row) for row in rows]

    plain = _plain_logits(plain_graph, manifest, rows)
    graph = GraphSession(folder, manifest, device="cpu")
    found = [graph.score([row], {})[0] for row in rows]
    ports = port_inputs(fold(interventions.to_adapter()), manifest, graph.dtype)
    found_steered = [graph.score([row], ports)[0] for row in rows]

    effect = _flat(expected_steered) - _flat(expected)
    error = _flat(found_steered) - _flat(expected_steered)
    return Verification(
        base_error=float(np.abs(_flat(found) - _flat(expected)).max()),
        steered_error=float(np.abs(error).max()),
        effect=float(np.abs(effect).max()),
        steered_rms_share=float(np.sqrt(np.square(error).mean() / np.square(effect).mean())),
        agreement=float(np.mean([a == b for found_row, row in zip(found_steered, expected_steered, strict=True)
                                 for a, b in zip(found_row.argmax(1), row.argmax(1), strict=True)])),
        rank0_bitwise=all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True)),
    )


@torch.no_grad()
def torch_logits(model: nn.Module, row: Sequence[int]) -> Logits:
    """PyTorch's logits for one row of tokens, `[tokens, vocabulary]`, float32."""
    logits: NDArray[np.float32] = model(input_ids=torch.tensor([list(row)])).logits[0].float().numpy()
    return logits


def _plain_logits(graph: Path, manifest: Manifest, rows: Sequence[Sequence[int]]) -> list[Logits]:
    session = open_graph(graph, device="cpu")
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[pasts[0].type]
    empty = np.zeros((1, pasts[0].shape[1], 0, manifest.head_size), kind)
    logits = []
    for row in rows:
        ids = np.array([row], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **{value.name: empty for value in pasts}}
        with plain_failure():
            logits.append(session.run(["logits"], feeds)[0][0].astype(np.float32, copy=False))
    return logits


def _flat(rows: Sequence[Logits]) -> NDArray[np.float32]:
    return np.concatenate(rows)


def require(verification: Verification, precision: str) -> None:
    """Raise ReftEdgeError with the figures if the export cannot be trusted."""
    if failures := verification.failures(precision):
        raise ReftEdgeError("the exported graph failed its verification and was not kept: " + "; ".join(failures))
