"""`reft-edge add-ports`: intervention ports in a graph that was exported elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors
from reft_edge.commands.export_figures import print_ported
from reft_edge.commands.options import Json, PortKinds, PortLayers


def add_ports(
    graph: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.onnx",
            help="A decoder's graph, from Optimum, torch.onnx or the like.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The folder to write; replaced only by a success.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that the graph was exported from, as for export.",
            show_default="the one beside MODEL.onnx",
        ),
    ] = None,
    layers: PortLayers = "all",
    ports: PortKinds = "affine",
    as_json: Json = False,
) -> None:
    """Add intervention ports to an ONNX decoder that was exported elsewhere, and check them."""
    from reft_edge.commands.screen import Screen

    console = Screen(stderr=True)
    with plain_errors(), extra("export"):
        from reft_edge.export.add_ports import add_ports as run_add_ports
        from reft_edge.export.add_ports import model_beside
        from reft_edge.model.source import resolve_model

        folder = resolve_model(model, console.say) if model else model_beside(graph)
        with console.working(f"adding ports to {graph.name}") as status:
            kinds = [kind.strip() for kind in ports.split(",")]
            ported = run_add_ports(graph, output, folder, layers, report=status.step, port_kinds=kinds)
    print_ported(ported, output, as_json)
