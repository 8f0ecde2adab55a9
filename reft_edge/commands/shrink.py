"""`reft-edge shrink`: an adapter in half precision or eight bits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_edge.commands.console import plain_errors, print_json, say
from reft_edge.commands.options import Json
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.adapter.algebra import Edit


def shrink(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The adapter file to write.", show_default=False)
    ],
    precision: Annotated[
        str, typer.Option(help="How its weights are stored: fp16, int8 (with a scale a row), or fp32.")
    ] = "fp16",
    as_json: Json = False,
) -> None:
    """Store an adapter in fewer bytes and print what that costs; everything that reads adapters reads the result."""
    with plain_errors():
        from dataclasses import replace

        from reft_edge.adapter.algebra import edit_error
        from reft_edge.adapter.config import Adapter
        from reft_edge.adapter.file import load_adapter, read_stored, save_adapter
        from reft_edge.adapter.linear import fold

        def edit(adapter: Adapter) -> "Edit":
            """Of a non-linear adapter, what it is without its act_fn."""
            return fold(replace(adapter, config=replace(adapter.config, act_fn="linear")))

        stored = read_stored(adapter)
        if precision == stored.precision:
            raise ReftEdgeError(f"{adapter} is stored as {precision} already")
        whole = stored.adapter()
        before = adapter.stat().st_size
        save_adapter(whole, output, precision)
        off = edit_error(edit(whole), edit(load_adapter(output)))
        after = output.stat().st_size
    if as_json:
        print_json({"precision": precision, "bytes_before": before, "bytes": after, "edit_error": off})
        return
    say(
        f"wrote {output}: {after / 1000:,.1f} kB in {precision}, before {before / 1000:,.1f} kB in {stored.precision}"
    )
    say(f"the edits are off by {off:.2g} of their size (root mean square, the worst layer)")
    if "signature" in stored.metadata:
        say("its signature was for the old weights: sign the new file with `reft-edge sign`")
