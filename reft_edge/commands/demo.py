"""`reft-edge demo`: the whole way on a real model."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for model and adapters.")] = Path(
        "reft-edge-demo"
    ),
    precision: Annotated[str, typer.Option(help="fp32 or int4.")] = "fp32",
) -> None:
    """The whole way on SmolLM2-135M: get the model, train two adapters, export, compare, swap. A few minutes."""
    from reft_edge.commands.screen import Screen

    with plain_errors(), extra("export"):
        from reft_edge.commands.demo_steps import run_demo

        run_demo(output, precision, Screen())
