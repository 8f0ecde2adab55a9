"""Checking an exported decoder against the PyTorch model it was made from, before anybody runs it."""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.export.checks import (
    all_at_once,
    batch_logits,
    largest_difference,
    off_ports,
    off_pytorch,
    random_adapters,
)
from reft_edge.export.exact import write_exact
from reft_edge.model.checkpoint import Change, Reference, leave
from reft_edge.model.exported_weights import GraphWeights
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.binding import PortInputs, port_inputs
from reft_edge.runtime.onnx_runtime import open_graph
from reft_edge.runtime.session import GraphSession, Logits
from reft_edge.steering.hooks import steered

_MOST_ROUNDED = 0.5
"""Of a matrix: rounding to 4 bits takes about a tenth of its RMS, another matrix in its place differs by more than all."""


@dataclass(frozen=True)
class Verification:
    """Figures of one export; logits are compared at every token of a few prompts.

    A graph in 16 bits or with quantised weights is run in exact arithmetic and compared with the PyTorch model under
    the graph's own weights, so that the check is as sharp as for fp32: it is about the graph and its ports, not about
    what rounding costs.
    """

    base_error: float
    """max |logits(ONNX Runtime) − logits(PyTorch)| without an adapter."""
    steered_error: float
    """The same with random LoReFT adapters active at every port."""
    effect: float
    """max |logits with − logits without that adapter| in PyTorch: what the error is to be seen against."""
    agreement: float
    """Share of tokens whose likeliest next token is that of the original PyTorch model, without an adapter."""
    rank0_bitwise: bool
    """Whether the graph with unused ports equals the graph before ports, bit for bit."""
    rounding: float = 0.0
    """RMS of what rounding took from a quantised matrix, of the matrix's RMS: the largest of all."""

    def failures(self) -> list[str]:
        """What is off, in words; empty if the export can be trusted."""
        found = off_ports(self.rank0_bitwise) + off_pytorch(
            "logits", max(self.base_error, self.steered_error)
        )
        if not self.rounding <= _MOST_ROUNDED:
            found.append(f"weights differ from the model's by {self.rounding:.2g} of their size")
        return found


@dataclass(frozen=True)
class GraphLogits:
    """Logits of the same rows from the graphs of one export, `[tokens, vocabulary]` a row."""

    rank0_bitwise: bool
    """Whether the graph with ports, no adapter bound, gives what the builder's graph gives, bit for bit."""
    likeliest: list[NDArray[np.intp]]
    """The likeliest next tokens of the graph with ports, no adapter bound, as it ships."""
    exact: list[Logits]
    """Its logits in exact arithmetic: float32 activations, weights as rounded as they ship."""
    steered: list[Logits]
    """In exact arithmetic, with `random_adapters`."""


def run_graphs(
    folder: Path, plain_graph: Path, manifest: Manifest, rows: Sequence[Sequence[int]]
) -> GraphLogits:
    """Run `rows` of token ids through the graph with ports and the one without, one session at a time.

    A 16-bit graph is run without its ports in exact arithmetic, too: a CPU has no kernels for bf16, and where ONNX
    Runtime computes fp16 in float32 it is free to round elsewhere once nodes are added.
    """
    ports = port_inputs(all_at_once(random_adapters(manifest)), manifest, np.dtype(np.float32))
    exact_path, exact_plain = folder / "exact.onnx", folder / "exact_plain.onnx"
    in_16_bits = manifest.precision in ("fp16", "bf16") or manifest.device == "cuda"
    exact_manifest = replace(manifest, graph=exact_path.name, precision="fp32", float_type="fp32")
    if manifest.precision == "fp32":
        exact_manifest = manifest
    else:
        write_exact(folder / manifest.graph, exact_path)
    if in_16_bits:
        _check_types(folder / manifest.graph)
        write_exact(plain_graph, exact_plain)
        plain_graph = exact_plain
    plain_manifest = replace(exact_manifest if in_16_bits else manifest, graph=plain_graph.name)
    (plain,) = _logits(folder, plain_manifest, rows, in_16_bits, {})
    exact, steered = _logits(folder, exact_manifest, rows, in_16_bits, {}, ports)
    alike = in_16_bits or manifest.precision == "fp32"
    shipped = exact if alike else _logits(folder, manifest, rows, False, {})[0]
    for path in (exact_path, exact_plain):
        for written in (path, Path(f"{path}.data")):
            written.unlink(missing_ok=True)
    _give_back_memory()
    alike_bitwise = all(np.array_equal(a, b) for a, b in zip(shipped, plain, strict=True))
    return GraphLogits(alike_bitwise, _likeliest(shipped), exact, steered)


def compare(
    found: GraphLogits,
    graph: Path,
    manifest: Manifest,
    reference: Reference,
    rows: Sequence[Sequence[int]],
) -> Verification:
    """Hold what the graphs said against the PyTorch model, which is given the weights of `graph` in the process."""
    with reference.filled() as model:
        base = batch_logits(model, rows)
    original = _likeliest(base)
    weights: GraphWeights | None = None
    change: Change = leave
    if manifest.precision != "fp32":
        weights = GraphWeights(reference.model, graph)
        weights.prepare(reference.model)
        change = weights.change
    with reference.filled(change) as model:
        if manifest.precision != "fp32":
            base = batch_logits(model, rows)
        with steered(model, *((part, 1.0) for part in random_adapters(manifest))):
            steered_base = batch_logits(model, rows)
    return Verification(
        base_error=largest_difference(found.exact, base),
        steered_error=largest_difference(found.steered, steered_base),
        effect=largest_difference(steered_base, base),
        agreement=float(np.mean(np.concatenate(found.likeliest) == np.concatenate(original))),
        rank0_bitwise=found.rank0_bitwise,
        rounding=weights.largest_change if weights else 0.0,
    )


def _check_types(graph: Path) -> None:
    """Raise ReftEdgeError unless ONNX Runtime accepts the graph, lacking kernels for this machine's CPU apart."""
    try:
        open_graph(graph, device="cpu", prepack=False, spare=True)
    except ReftEdgeError as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise


def _logits(
    folder: Path, manifest: Manifest, rows: Sequence[Sequence[int]], spare: bool, *bindings: PortInputs
) -> list[list[Logits]]:
    # Quantised products without packed weights unpack each matrix anew in every run, which takes three to eight times as long.
    # Other weights would be in memory twice.
    graph = GraphSession(folder, manifest, device="cpu", prepack=bool(manifest.quantisation), spare=spare)
    return [graph.score(rows, ports) for ports in bindings]


def _give_back_memory() -> None:
    """Have the C library return what sessions have freed: of packed weights it would keep most for later."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _likeliest(logits: Sequence[Logits]) -> list[NDArray[np.intp]]:
    return [row.argmax(axis=1) for row in logits]
