"""`reft-edge inspect`: what an adapter learned."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, say, show_table
from reft_edge.commands.options import Columns, Config, Split
from reft_edge.errors import ReftEdgeError


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="The model it was trained on, to see what it does there.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to run the model on, as for train.", show_default=False)
    ] = None,
    split: Split = None,
    config: Config = None,
    columns: Columns = None,
    limit: Annotated[int, typer.Option(help="Most rows of --data.")] = 32,
    other: Annotated[
        Path | None,
        typer.Option(
            "--with", metavar="FILE", help="Another adapter to compare subspaces with.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML page to write.", show_default=False)
    ] = None,
) -> None:
    """Show what an adapter learned: edits by layer and position, subspaces, changed predictions, its training."""
    from reft_edge.commands.screen import Screen

    with plain_errors(), extra("train"):
        from reft_edge.adapter.file import load_adapter
        from reft_edge.files import check_apart, check_place, write_atomically
        from reft_edge.inspection.effect import measure_on
        from reft_edge.inspection.facts import summary
        from reft_edge.inspection.page import render
        from reft_edge.inspection.weights import inspect_adapter
        from reft_edge.rows.given import parse_columns, row_source
        from reft_edge.rows.source import file_of

        if (model is None) != (data is None):
            raise ReftEdgeError("--model and --data go together: rows, and the model to run on them")
        if limit < 1:
            raise ReftEdgeError(f"limit is {limit}; expected 1 or more")
        source = None
        if data is not None:
            source = row_source(data, split, config, parse_columns(columns), limit=limit)
        if output is not None:
            check_apart(output, adapter, None if source is None else file_of(source), other)
            check_place(output)
        loaded = load_adapter(adapter)
        compared = (other.name, load_adapter(other)) if other else None
        effect = None
        if model is not None and source is not None:
            console = Screen(stderr=True)
            with console.working("running the model"):
                effect = measure_on(model, loaded, source, limit, console.say)
        found = inspect_adapter(loaded, adapter.name, adapter.stat().st_size, compared, effect)
        if output is not None:
            write_atomically(output, render(found).encode("utf-8"))
    show_table([*summary(found).items()], header=False)
    if output is not None:
        say(f"wrote {output}")
