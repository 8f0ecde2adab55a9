"""`reft-edge pack`: an adapter for stock runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import plain_errors, say, split_scale


def pack(
    adapter: Annotated[
        str, typer.Argument(metavar="FILE[:SCALE]", help="An adapter file.", show_default=False)
    ],
    folder: Annotated[
        Path,
        typer.Option("--for", metavar="DIR", help="The exported folder that it is for.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .onnx_adapter to write.", show_default=False)
    ],
) -> None:
    """Pack an adapter for stock onnxruntime and onnxruntime-genai."""
    with plain_errors():
        from reft_edge.convert.onnx_adapter import pack_adapter

        path, factor = split_scale(adapter)
        size = pack_adapter(path, folder, output, factor, say)
    say(f"wrote {output}: {size / 1000:,.1f} kB")
