"""The one way from a graph to an exported folder, whatever kind of graph it is.

    build     write the graph without ports, and the files that go with it
    place     say where in that graph ports go; they are inserted
    run       run the graph with ports and the one without, before PyTorch's model takes memory
    compare   hold what they said against PyTorch's model

Only a graph that passes is kept. decoder.py, encoder.py and add_ports.py say what each step is for their kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.nbits import share_external_data
from reft_edge.export.ports import insert_ports
from reft_edge.export.residual import Site
from reft_edge.folders import replace_folder
from reft_edge.model.manifest import MANIFEST, Manifest, save_manifest
from reft_edge.model.places import PORT_KINDS

GRAPH = "model.onnx"
"""The graph with ports."""
PLAIN = "plain.onnx"
"""The graph without ports, while the folder is being made. Both read their weights from one data file."""
FLOAT_TYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}

Report = Callable[[str], None]
"""Told each step in words."""
Said = TypeVar("Said")


@dataclass(frozen=True)
class Places:
    """Where ports go in a graph."""

    sites: Sequence[Site]
    """A site whose hidden state depends on another's within the same layer comes after it."""
    float_type: ir.DataType
    """Of the residual stream."""
    keep_logits: bool = True
    """Whether the graph's head can be told to give the logits of the last tokens only."""


class Checked(Protocol):
    """Figures that can tell what is wrong with an export; a dataclass, which goes into the manifest."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def failures(self) -> list[str]:
        """What is off, in words; empty if the export can be trusted."""


class Draft(Protocol[Said]):
    """A graph that was written as PLAIN to a folder, and what else its kind has to say. `Said` is what its graphs gave."""

    @property
    def manifest(self) -> Manifest:
        """What is known before there are ports and PyTorch's model."""

    def place(self, graph: ir.Graph) -> Places:
        """Where ports go in PLAIN, read anew. Raises ReftEdgeError if that cannot be told."""

    def run(self, folder: Path, manifest: Manifest) -> Said:
        """What GRAPH and PLAIN in `folder` give for a few rows of tokens."""

    def load(self, report: Report) -> tuple[Any, str]:
        """PyTorch's model, in whatever shape `compare` takes it, and its fingerprint."""

    def compare(self, said: Said, folder: Path, manifest: Manifest, model: Any) -> Checked:
        """What `run` gave, held against PyTorch's model, which may be given other weights for it."""


Made = TypeVar("Made", bound=Draft[Any])


def export_graph(output: Path, build: Callable[[Path], Made], report: Report) -> tuple[Made, Manifest]:
    """Write the folder `output`: the graph that `build` writes to the folder it is given, with ports, verified.

    Gives what `build` made, and the folder's manifest. Nothing is left at `output` unless everything succeeded; an
    earlier export there is replaced only then. Raises ReftEdgeError if the graph cannot be built, ported or verified.
    """
    with replace_folder(output, MANIFEST) as folder:
        draft = build(folder)
        report("inserting ports")
        manifest = _insert_ports(draft, folder)
        report("running the graph")
        said = draft.run(folder, manifest)
        model, known = draft.load(report)
        manifest = replace(manifest, base_fingerprint=known)
        report("verifying against PyTorch")
        figures = draft.compare(said, folder, manifest, model)
        _require(figures)
        (folder / PLAIN).unlink()
        manifest = replace(manifest, verification=asdict(figures))
        save_manifest(manifest, folder)
    return draft, manifest


def _insert_ports(draft: Draft[Any], folder: Path) -> Manifest:
    """Write GRAPH, which is PLAIN with ports; the manifest that names them."""
    graph = ir.load(folder / PLAIN)
    places = draft.place(graph.graph)
    size, dtype = draft.manifest.hidden_size, places.float_type.numpy()
    ports = insert_ports(graph, places.sites, size, dtype, places.keep_logits, draft.manifest.port_kinds)
    share_external_data(graph)
    ir.save(graph, folder / GRAPH)
    return replace(draft.manifest, ports=ports, float_type=FLOAT_TYPES[places.float_type])


def port_kinds_of(chosen: Sequence[str]) -> tuple[str, ...]:
    """In the order of PORT_KINDS. Raises ReftEdgeError for an unknown one, and without affine, which all others stand on."""
    if unknown := sorted(set(chosen) - set(PORT_KINDS)):
        raise ReftEdgeError(
            f"unknown ports {', '.join(map(repr, unknown))}; choose among {', '.join(PORT_KINDS)}"
        )
    if "affine" not in chosen:
        raise ReftEdgeError("every port is affine; give --ports affine, and act or diagonal beside it")
    return tuple(kind for kind in PORT_KINDS if kind in chosen)


def _require(figures: Checked) -> None:
    if failures := figures.failures():
        raise ReftEdgeError(
            "the exported graph failed its verification and was not kept: " + "; ".join(failures)
        )
