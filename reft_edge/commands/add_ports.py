"""`reft-edge add-ports`: intervention ports in a graph that was exported elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, print_json, say, show_table
from reft_edge.commands.options import Json, PortLayers

if TYPE_CHECKING:
    from reft_edge.export.add_ports import Ported


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
            ported = run_add_ports(graph, output, folder, layers, report=status.step)
    print_ported(ported, output, as_json)


def print_ported(ported: "Ported", output: Path, as_json: bool) -> None:
    """Print where the blocks were found and what the verification measured."""
    manifest, figures = ported.manifest, ported.manifest.verification
    if as_json:
        print_json(
            {
                "path": str(output),
                "blocks": [vars(block) for block in ported.outputs],
                **{
                    name: getattr(manifest, name)
                    for name in ("base_fingerprint", "precision", "cache", "layers", "verification")
                },
            }
        )
        return
    show_table(
        [("layer", "node", "value", "port")]
        + [
            (str(block.layer), block.node, block.value, "yes" if block.layer in manifest.layers else "no")
            for block in ported.outputs
        ]
    )
    say(f"wrote {output}: {manifest.precision}, ports at {len(manifest.layers)} layers; verified:")
    fused = f"; {figures['rank0_error']:.1g} apart where nodes are fused" if figures["rank0_error"] else ""
    say(f"  no adapter              bitwise equal to the graph without ports{fused}")
    say(f"  each port               within {figures['port_error']:.1g} of numpy, relative")
    say(
        f"  what each block adds    within {figures['block_error']:.2g} of PyTorch's, relative, and nearest to its own block's"
    )
    if figures["base_error"] is not None:
        say(
            f"  logits                  within {figures['base_error']:.2g} of PyTorch's, with an adapter at every port "
            f"{figures['steered_error']:.2g}, where it moves them by {figures['effect']:.0f}"
        )
    say(f"  likeliest next token    that of the original model at {figures['agreement']:.0%} of tokens")
    if manifest.cache == "none":
        say("the graph has no KV cache: it can score text, not generate")
