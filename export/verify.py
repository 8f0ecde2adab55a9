"""Checking an exported graph against the PyTorch model it was made from, before anybody runs it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from reft_edge.adapter import AdapterConfig, fold
from reft_edge.errors import ReftEdgeError
from reft_edge.export.quantised import exact_activations, use_graph_weights
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
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """Figures of one export; logits are compared at every token of a few prompts.

    A quantised graph is compared with the PyTorch model under the graph's own dequantised weights, so that the check
    is as sharp as for fp32: it is about the graph and its ports, not about what quantisation costs.
    """

    base_error: float
    """max |logits(ONNX Runtime) − logits(PyTorch)| without an adapter."""
    steered_error: float
    """The same with a random LoReFT adapter active at every port."""
    effect: float
    """max |logits with − logits without that adapter| in PyTorch: what the error is to be seen against."""
    agreement: float
    """Share of tokens whose likeliest next token is that of the unquantised PyTorch model, without an adapter."""
    rank0_bitwise: bool
    """Whether the graph with unused ports equals the graph before ports, bit for bit."""

    def failures(self) -> list[str]:
        """What is off, in words; empty if the export can be trusted."""
        found = []
        if not self.rank0_bitwise:
            found.append("with no adapter bound, the graph with ports differs from the graph without")
        error = max(self.base_error, self.steered_error)
        if not error <= TOLERANCE:
            found.append(f"logits differ from PyTorch's by {error:.2g}, more than {TOLERANCE:g}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_adapter(
    manifest: Manifest, positions: str = "f7+l7", rank: int = 4, seed: int = 0
) -> Interventions:
    """A LoReFT adapter with random weights at every port, strong enough to move logits by several units."""
    config = AdapterConfig(
        "loreft",
        manifest.base_name,
        manifest.base_fingerprint,
        manifest.hidden_size,
        manifest.num_layers,
        manifest.layers,
        rank,
        positions,
    )
    return Interventions(config, seed=seed)


def verify(
    folder: Path, plain_graph: Path, manifest: Manifest, model: Any, rows: Sequence[Sequence[int]]
) -> Verification:
    """Run `rows` of token ids through the graph with ports, the one without, and the PyTorch model.

    A quantised graph's weights are copied into `model`.
    """
    unquantised = [torch_logits(model, row) for row in rows]
    graph = GraphSession(folder, manifest, device="cpu")
    shipped = [graph.score([row], {})[0] for row in rows]
    plain = _plain_logits(plain_graph, manifest, rows)

    if manifest.precision == "fp32":
        base, found = unquantised, shipped
    else:
        exact = ir.load(folder / manifest.graph)
        use_graph_weights(model, exact.graph)
        exact_activations(exact)
        ir.save(exact, folder / "exact.onnx")
        graph = GraphSession(folder, replace(manifest, graph="exact.onnx"), device="cpu")
        (folder / "exact.onnx").unlink()
        base, found = [torch_logits(model, row) for row in rows], [graph.score([row], {})[0] for row in rows]

    interventions = random_adapter(manifest)
    ports = port_inputs(fold(interventions.to_adapter()), manifest, graph.dtype)
    with steered(model, (interventions, 1.0)):
        steered_base = [torch_logits(model, row) for row in rows]
    steered_found = [graph.score([row], ports)[0] for row in rows]
    return Verification(
        base_error=_largest_difference(found, base),
        steered_error=_largest_difference(steered_found, steered_base),
        effect=_largest_difference(steered_base, base),
        agreement=float(np.mean(np.concatenate(shipped).argmax(1) == np.concatenate(unquantised).argmax(1))),
        rank0_bitwise=all(np.array_equal(a, b) for a, b in zip(shipped, plain, strict=True)),
    )


@torch.no_grad()
def torch_logits(model: Any, row: Sequence[int]) -> Logits:
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
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            **{value.name: empty for value in pasts},
        }
        with plain_failure():
            logits.append(session.run(["logits"], feeds)[0][0].astype(np.float32, copy=False))
    return logits


def _largest_difference(left: Sequence[Logits], right: Sequence[Logits]) -> float:
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).max())


def require(verification: Verification) -> None:
    """Raise ReftEdgeError with the figures if the export cannot be trusted."""
    if failures := verification.failures():
        raise ReftEdgeError(
            "the exported graph failed its verification and was not kept: " + "; ".join(failures)
        )
