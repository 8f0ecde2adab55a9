"""`reft-edge export`: a frozen model to an ONNX graph with intervention ports."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_edge.arguments import GENAI, OPTIMUM, check_exporter
from reft_edge.commands.console import extra, plain_errors, print_json
from reft_edge.commands.export_figures import print_exported, print_ported
from reft_edge.commands.options import Json, Model, PortKinds, PortLayers
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen
    from reft_edge.model.source import ModelFolder


_NO_OUTPUT = "give the folder to write with -o DIR"
_FOR_OPTIMUM = ("model", "output", "layers", "exporter", "as_json")


def export(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The folder to write; replaced only by a success.", show_default=False
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    device: Annotated[
        str, typer.Option(help="What the graph is for: cpu or cuda. Exporting itself needs no GPU.")
    ] = "cpu",
    algorithm: Annotated[
        str,
        typer.Option(
            help="How int4 and int8 weights are rounded: rtn, k_quant, k_quant_mixed, or gguf, which keeps a GGUF file's "
            "own blocks; auto is gguf where there are such blocks, else k_quant_mixed for int4, k_quant for int8."
        ),
    ] = "auto",
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale in int4 and int8: 16, 32, 64, 128 or 256.",
            show_default="128 for a billion weights and more, else 32",
        ),
    ] = None,
    accuracy_level: Annotated[
        int,
        typer.Option(
            help="Activations of int4 and int8 products on a CPU: 4 rounds them to int8, 1 does not (slower)."
        ),
    ] = 4,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="The most tokens that the graph takes; its rotary tables are that long.",
            show_default="as many as the model",
        ),
    ] = None,
    layers: PortLayers = "all",
    exporter: Annotated[
        str,
        typer.Option(
            help="What writes the graph: genai (onnxruntime-genai's builder), or optimum, which needs an environment of its "
            "own and writes fp32."
        ),
    ] = GENAI,
    components: Annotated[
        str,
        typer.Option(
            help="What of each layer gets a port: block, attention, mlp, joined with commas. Each costs a little time."
        ),
    ] = "block",
    ports: PortKinds = "affine",
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Write nothing; try every precision and print what it costs and gives here."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export frozen MODEL to ONNX with intervention ports, and check it against PyTorch.

    Done once a model: every adapter for it then runs in the same folder.
    """
    from reft_edge.commands.screen import Screen

    console = Screen(stderr=True)
    if exporter != GENAI:
        with plain_errors(), extra("optimum"):
            _export_otherwise(context, console)
        return
    with plain_errors(), extra("export"):
        from reft_edge.export import Quantisation, export_model
        from reft_edge.model.source import resolve_model

        if output is not None and report:
            raise ReftEdgeError("--report writes no folder; leave -o away")
        if output is None and not report:
            raise ReftEdgeError(_NO_OUTPUT)
        started = time.perf_counter()
        folder = resolve_model(model, console.say)
        if output is None:
            _print_report(folder, device, layers, console, as_json)
            return
        with console.working(f"exporting {folder.name}") as status:
            manifest = export_model(
                folder,
                output,
                precision,
                layers,
                report=status.step,
                components=[part.strip() for part in components.split(",")],
                device=device,
                quantisation=Quantisation(algorithm, block_size, accuracy_level),
                context=context_length,
                port_kinds=[kind.strip() for kind in ports.split(",")],
            )
    print_exported(manifest, output, time.perf_counter() - started, as_json)


def _export_otherwise(context: typer.Context, console: "Screen") -> None:
    """Export with another exporter than ours; `context` has the options."""
    given = context.params
    check_exporter(given["exporter"])
    refused = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in given
        and parameter.name not in _FOR_OPTIMUM
        and given[parameter.name] != parameter.default
    ]
    if refused:
        raise ReftEdgeError(
            f"{', '.join(refused)}: not for --exporter {OPTIMUM}, which writes fp32 graphs for the CPU with ports after "
            "whole blocks; leave it away (graphs that you rounded with onnxruntime go into reft-edge add-ports)"
        )
    if given["output"] is None:
        raise ReftEdgeError(_NO_OUTPUT)
    from reft_edge.export.optimum import export_with_optimum
    from reft_edge.model.source import resolve_model

    folder = resolve_model(given["model"], console.say)
    with console.working(f"exporting {folder.name}") as status:
        ported = export_with_optimum(folder, given["output"], given["layers"], status.step)
    print_ported(ported, given["output"], given["as_json"])


def _print_report(folder: "ModelFolder", device: str, layers: str, console: "Screen", as_json: bool) -> None:
    from rich.table import Table

    from reft_edge.export.report import compare_precisions

    with console.working(f"measuring {folder.name}") as status:
        choices = list(compare_precisions(folder, device, layers, status.step))
    if as_json:
        print_json([vars(choice) for choice in choices])
        return
    table = Table(title=f"{folder.name} on {device}")
    table.add_column("precision", no_wrap=True)
    for heading in (
        "MB",
        "perplexity",
        "fp32's\nnext token",
        "with\nadapter",
        "decode\ntokens/s",
        "with\nadapter",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice in choices:
        table.add_row(
            choice.name,
            f"{choice.size / 1e6:,.0f}",
            f"{choice.perplexity:.2f}",
            f"{choice.agreement:.1%}",
            f"{choice.steered_agreement:.1%}",
            f"{choice.decode:.1f}",
            f"{choice.steered_decode:.1f}",
        )
    from reft_edge.commands.screen import Screen

    Screen().print(table)
