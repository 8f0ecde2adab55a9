"""Exporting a model folder, whichever kind of model it holds."""

from collections.abc import Sequence
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.export.build import Quantisation
from reft_edge.export.decoder import export_decoder
from reft_edge.export.encoder import export_encoder
from reft_edge.export.recipe import Report, port_kinds_of
from reft_edge.model.encoders import is_encoder
from reft_edge.model.manifest import Manifest
from reft_edge.model.places import COMPONENTS
from reft_edge.model.source import ModelFolder


def export_model(
    model: ModelFolder,
    output: Path,
    precision: str = "fp32",
    layers: str = "all",
    report: Report = lambda step: None,
    *,
    components: Sequence[str] = ("block",),
    device: str = "cpu",
    quantisation: Quantisation | None = None,
    context: int | None = None,
    port_kinds: Sequence[str] = ("affine",),
) -> Manifest:
    """Build the graph, insert ports after `layers`, verify against PyTorch, and write the folder `output`.

    `components` of each layer get a port: its `block`, its `attention`, its `mlp`. `port_kinds`: what ports can add,
    `affine` and, besides, `act` and `diagonal`. `device` is what the graph is for, cpu or cuda; it is built and verified on the CPU either way. `context`: the most tokens that the graph takes, by default
    as many as the model. `report` is told each step. Nothing is left at `output`
    unless everything succeeded; an earlier export there is replaced only then.
    Raises ReftEdgeError if the model cannot be built, ported or verified.
    """
    components, kinds = _components(components), port_kinds_of(port_kinds)
    if not is_encoder(model):
        return export_decoder(
            model, output, precision, layers, report, components, device, quantisation, context, kinds
        )
    if context is not None:
        raise ReftEdgeError("an encoder has no rotary tables to shorten; leave --context out")
    if components != ("block",):
        raise ReftEdgeError("an encoder has ports on its blocks only; leave --components away")
    return export_encoder(model, output, precision, layers, report, kinds)


def _components(chosen: Sequence[str]) -> tuple[str, ...]:
    """In the order of COMPONENTS, block first. Raises ReftEdgeError for an unknown one or none."""
    if unknown := sorted(set(chosen) - set(COMPONENTS)):
        raise ReftEdgeError(
            f"unknown components {', '.join(map(repr, unknown))}; choose among {', '.join(COMPONENTS)}"
        )
    if not chosen:
        raise ReftEdgeError(f"no components were named; choose among {', '.join(COMPONENTS)}")
    return tuple(component for component in COMPONENTS if component in chosen)
