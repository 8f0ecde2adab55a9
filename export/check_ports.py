"""Checking ports in a graph from elsewhere: against numpy inside the graph, and against the PyTorch model's own blocks.

A quantised graph's logits cannot be held to PyTorch's within a small tolerance. What can: that unused ports change no bit,
that each port computes h + ((hA + b) · gate) B as numpy does from the same h, and that what is added to the residual stream
between two ports is what the model's block there adds, rather than any other block. (Whole outputs of neighbouring blocks are too
alike in a deep model to tell blocks apart after rounding; what each block adds is not.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from reft_edge.adapter.algebra import apply
from reft_edge.errors import ReftEdgeError
from reft_edge.export.checks import (
    TOLERANCE,
    all_at_once,
    largest_difference,
    off_ports,
    random_adapters,
    torch_logits,
)
from reft_edge.export.exact import write_exact
from reft_edge.export.ports import edited_values
from reft_edge.export.residual import Site
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.manifest import Manifest
from reft_edge.model.places import Place
from reft_edge.runtime.binding import PortInputs, port_inputs
from reft_edge.runtime.onnx_runtime import open_graph, plain_failure, plain_feeds
from reft_edge.runtime.session import GraphSession, Logits
from reft_edge.steering.hooks import steered

PORT_TOLERANCE = 1e-4
_UNRELATED = 1.0
"""The distance at which nothing at all would be as near."""
_DECODED = 3

Stream = NDArray[np.float32]
"""A block's output for one row, `[tokens, hidden size]`."""


@dataclass(frozen=True)
class Tap:
    """The names of the values whose sum is a block's output; `skip` is empty where it is one value."""

    layer: int
    value: str
    skip: str = ""


def tap(site: Site) -> Tap:
    """What to read to see the output of a site's block; take it before ports are inserted."""
    return Tap(site.place.layer, str(site.uses[0].value.name), str(site.skip.value.name) if site.skip else "")


@dataclass(frozen=True)
class Probe:
    """What the untouched graph computes at the places found."""

    streams: list[list[Stream]]
    """For each row, the output of every block."""
    dtype: np.dtype[np.generic]
    hidden_size: int
    head_reads_all: bool
    """Whether the value that was taken for the head's input is `[batch, tokens, hidden size]`."""


def probe(
    graph: Path, taps: Sequence[Tap], head: str | None, rows: Sequence[Sequence[int]], head_size: int
) -> Probe:
    """Run the untouched graph and read block outputs, and the head's input, from inside.

    Raises ReftEdgeError unless every block's output is `[batch, tokens, d]` with the same d and type.
    """
    names = [name for part in taps for name in (part.value, part.skip) if name]
    wanted = [*names, *([head] if head else [])]
    streams, kinds, whole = [], set(), bool(head)
    for row, found in zip(rows, _run(graph, wanted, rows, head_size, {}), strict=True):
        for name in names:
            array = found[name]
            if array.ndim != 3 or array.shape[:2] != (1, len(row)):
                raise ReftEdgeError(
                    f"cannot place ports: {name}, taken for a block's output, is {list(array.shape)} for a row of "
                    f"{len(row)} tokens; expected [1, {len(row)}, hidden size]"
                )
            kinds.add((array.dtype, array.shape[2]))
        if head:
            whole = whole and found[head].ndim == 3 and found[head].shape[1] == len(row)
        streams.append([_stream(found, (part.value, part.skip)) for part in taps])
    if len(kinds) != 1:
        raise ReftEdgeError(
            "cannot place ports: the values taken for block outputs have different types or sizes: "
            + ", ".join(sorted(f"{kind} × {size}" for kind, size in kinds))
        )
    ((dtype, size),) = kinds
    return Probe(streams, dtype, size, whole)


@dataclass(frozen=True)
class Found:
    """What the graphs said, before PyTorch is asked."""

    plain: list[Logits]
    """The untouched graph."""
    shipped: list[Logits]
    """With ports, no adapter bound."""
    steered: list[Logits]
    """With a random adapter at every port."""
    same_unfused: bool
    """Whether the two are equal bit for bit where ONNX Runtime fuses no nodes."""
    port_error: float
    decode_error: float | None


def run_graphs(
    folder: Path, plain: str, manifest: Manifest, taps: Sequence[Tap], rows: Sequence[Sequence[int]]
) -> Found:
    """Run the untouched graph `plain` and the one with ports, both in `folder`.

    A 16-bit graph is run in float32 arithmetic: where ONNX Runtime computes fp16 in float32 on a CPU, it is free to
    round elsewhere once nodes are added.
    """
    graph, untouched = folder / manifest.graph, folder / plain
    temporary: list[Path] = []
    spare = manifest.float_type != "fp32"
    if spare:
        graph, untouched = folder / "exact.onnx", folder / "exact_plain.onnx"
        temporary = [graph, untouched]
        write_exact(folder / manifest.graph, graph)
        write_exact(folder / plain, untouched)
    exact = replace(manifest, graph=graph.name, float_type="fp32")
    edit = all_at_once(random_adapters(manifest))
    ports = port_inputs(edit, manifest, np.dtype(np.float32))
    reference = [
        found["logits"][0] for found in _run(untouched, [], rows, manifest.head_size, {}, spare=spare)
    ]

    session = GraphSession(folder, exact, device="cpu", prepack=False, spare=spare)
    shipped = [session.score([row], {})[0] for row in rows]
    steered_logits = [session.score([row], ports)[0] for row in rows]
    decode_error = None if manifest.cache == "none" else _decode_error(session, rows, shipped)
    del session

    same = all(
        np.array_equal(mine["logits"], theirs["logits"])
        for mine, theirs in zip(
            _run(graph, [], rows, manifest.head_size, {}, fuse=False, spare=spare),
            _run(untouched, [], rows, manifest.head_size, {}, fuse=False, spare=spare),
            strict=True,
        )
    )
    in_32_bits = manifest.float_type == "fp32"
    edits = {
        part: edited_values(Place(part.layer), part.skip, in_32_bits, manifest.port_kinds) for part in taps
    }
    inside = [name for part in taps for name in (part.value, part.skip, *edits[part]) if name]
    port_error = 0.0
    for row, found in zip(
        rows, _run(graph, inside, rows, manifest.head_size, ports, spare=spare), strict=True
    ):
        t = np.arange(len(row))
        for part in taps:
            expected = apply(edit, Place(part.layer), _stream(found, (part.value, part.skip)), t, len(row))
            edited = _stream(found, edits[part])
            scale = max(1.0, float(np.abs(expected).max()))
            port_error = max(port_error, float(np.abs(edited - expected).max()) / scale)
    for path in temporary:
        path.unlink()
        Path(f"{path}.data").unlink(missing_ok=True)
    return Found(reference, shipped, steered_logits, same, port_error, decode_error)


@dataclass(frozen=True)
class PortVerification:
    """Figures of one graph that got ports; everything is compared at every token of a few prompts."""

    rank0_bitwise: bool
    """Whether the graph with unused ports equals the graph before ports, bit for bit, each node run as it stands."""
    rank0_error: float
    """max |difference of their logits| as ONNX Runtime runs them: ports can stand between nodes that it would fuse, and
    the fused ones round differently. 0 if they are bitwise equal here, too."""
    port_error: float
    """max |edited block output − what numpy makes of the unedited one|, relative to the largest value."""
    block_error: float
    """How far what a block adds to the residual stream is from what it adds in PyTorch, relative to the latter's norm:
    the median over tokens, of the worst block."""
    misplaced: tuple[int, ...]
    """Blocks that add what is nearer to another block's addition in PyTorch than to their own."""
    effect: float
    """max |logits with a random adapter at every port − logits without|, in the graph."""
    agreement: float
    """Share of tokens whose likeliest next token is PyTorch's, without an adapter."""
    decode_error: float | None
    """max |logits of tokens given one at a time − logits of the row in one run|; None without a KV cache."""
    base_error: float | None = None
    """max |logits − PyTorch's| without an adapter; None for quantised and 16-bit graphs, as are the next."""
    steered_error: float | None = None
    """The same with the random adapter."""

    def failures(self) -> list[str]:
        """What is off, in words; empty if the ports can be trusted."""
        found = off_ports(self.rank0_bitwise)
        if not self.port_error <= PORT_TOLERANCE:
            found.append(f"a port's edit differs from numpy's by {self.port_error:.2g} of its size")
        if self.misplaced:
            found.append(
                f"what blocks {list(self.misplaced)} were found to add is nearer to other blocks' additions in PyTorch: the "
                "model is not the one that the graph was exported from, the places are wrong, or the graph is rounded too "
                "coarsely to tell"
            )
        elif not self.block_error < _UNRELATED:
            found.append(
                f"what a block adds is {self.block_error:.2g} of its size away from PyTorch's; the model is not the one "
                "that the graph was exported from"
            )
        if not self.effect > 0:
            found.append("an adapter at every port does not move the logits")
        if self.base_error is not None and self.steered_error is not None:
            if not self.base_error <= TOLERANCE:
                found.append(
                    f"without an adapter, logits differ from PyTorch's by {self.base_error:.2g}: the graph does not compute "
                    "this model (another model's weights, or something that its exporter left out)"
                )
            elif not self.steered_error <= TOLERANCE:
                found.append(f"with an adapter, logits differ from PyTorch's by {self.steered_error:.2g}")
            if self.decode_error is not None and not self.decode_error <= TOLERANCE:
                found.append(f"with the KV cache, logits differ by {self.decode_error:.2g}")
        return found


def compare(
    found: Found,
    streams: Sequence[Sequence[Stream]],
    manifest: Manifest,
    model: Any,
    rows: Sequence[Sequence[int]],
) -> PortVerification:
    """Hold what the graphs said against the PyTorch model they were exported from."""
    own = [torch_streams(model, row) for row in rows]
    distances = _distances(_additions(streams), _additions(own))
    base = [torch_logits(model, row) for row in rows]
    base_error = steered_error = None
    if manifest.precision == "fp32":
        with steered(model, *((part, 1.0) for part in random_adapters(manifest))):
            steered_base = [torch_logits(model, row) for row in rows]
        base_error, steered_error = (
            largest_difference(found.shipped, base),
            largest_difference(found.steered, steered_base),
        )
    return PortVerification(
        rank0_bitwise=found.same_unfused,
        rank0_error=largest_difference(found.shipped, found.plain),
        port_error=found.port_error,
        block_error=float(distances.diagonal().max()),
        misplaced=tuple(int(i) for i in np.flatnonzero(distances.argmin(1) != np.arange(len(distances)))),
        effect=largest_difference(found.steered, found.shipped),
        agreement=float(np.mean(np.concatenate(found.shipped).argmax(1) == np.concatenate(base).argmax(1))),
        decode_error=found.decode_error,
        base_error=base_error,
        steered_error=steered_error,
    )


@torch.no_grad()
def torch_streams(model: Any, row: Sequence[int]) -> list[Stream]:
    """The output of every block of the PyTorch model for one row."""
    streams: list[Stream] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        streams.append(hidden[0].float().numpy())

    handles = [block.register_forward_hook(keep) for block in decoder_layers(model)]
    try:
        model(input_ids=torch.tensor([list(row)]))
    finally:
        for handle in handles:
            handle.remove()
    return streams


def _additions(streams: Sequence[Sequence[Stream]]) -> NDArray[np.float32]:
    """What each block adds at every token of all rows, `[blocks, tokens, d]`; the first block's includes the embedding."""
    outputs = np.concatenate([np.stack(row) for row in streams], axis=1)
    return np.diff(outputs, axis=0, prepend=np.zeros_like(outputs[:1]))


def _distances(mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """`[mine, theirs]`: the median over tokens of how far each of mine is from each of theirs, relative to the latter."""
    return np.array(
        [
            [
                np.median(np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-12))
                for b in theirs
            ]
            for a in mine
        ],
        np.float64,
    )


def _decode_error(session: GraphSession, rows: Sequence[Sequence[int]], whole: Sequence[Logits]) -> float:
    error = 0.0
    for row, expected in zip(rows, whole, strict=True):
        cache = session.take_cache(1, len(row))
        bound = session.bind(cache, {})
        start = max(1, len(row) - _DECODED)
        found = [bound.prefill(np.array([row[:start]]))[0].copy()]
        found += [bound.step(np.array([[token]]))[0].copy() for token in row[start:]]
        session.return_cache(cache)
        error = max(error, float(np.abs(np.stack(found) - expected[start - 1 :]).max()))
    return error


def _run(
    graph: Path,
    inside: Sequence[str],
    rows: Sequence[Sequence[int]],
    head_size: int,
    ports: PortInputs,
    fuse: bool = True,
    spare: bool = False,
) -> list[dict[str, NDArray[np.float32]]]:
    """`logits` and values from inside the graph, for each row by itself."""
    path = graph
    if inside:
        path = graph.with_name(f"tapped_{graph.name}")
        model = ir.load(graph)
        known = {output.name for output in model.graph.outputs}
        values = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(values[name] for name in dict.fromkeys(inside) if name not in known)
        ir.save(model, path)
        del model
    session = open_graph(path, device="cpu", prepack=False, fuse=fuse, spare=spare)
    names = list(dict.fromkeys(["logits", *inside]))
    found = []
    for row in rows:
        with plain_failure():
            found.append(
                dict(
                    zip(
                        names,
                        session.run(names, {**plain_feeds(session, row, head_size), **ports}),
                        strict=True,
                    )
                )
            )
    if inside:
        path.unlink()
    return found


def _stream(found: dict[str, NDArray[np.float32]], summands: Sequence[str]) -> Stream:
    stream: Stream = np.sum([found[name][0].astype(np.float32) for name in summands if name], axis=0)
    return stream
