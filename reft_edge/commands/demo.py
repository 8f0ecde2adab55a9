"""`reft-edge demo`: the whole way on a real model."""

import time
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
    """The whole way on SmolLM2-135M: get the model, train two adapters, export, compare, swap.

    It takes a few minutes, and each part says beforehand how long it will take here."""
    from reft_edge.commands.screen import Screen

    with plain_errors(), extra("export"):
        started = time.perf_counter()
        import transformers.generation  # torch, too: what an export's own process imports again  # noqa: F401

        from reft_edge.commands.demo_steps import run_demo

        run_demo(output, precision, Screen(), imports=time.perf_counter() - started)
