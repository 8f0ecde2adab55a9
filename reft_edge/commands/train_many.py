"""`reft-edge train-many`: adapters for many tasks, the base loaded once."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_edge.api import train_many as train_tasks
from reft_edge.commands import train_options as option
from reft_edge.commands.console import fail, plain_errors, print_json, say, show_table
from reft_edge.commands.options import Json, PlainHttp
from reft_edge.commands.tune import Ray, Workers

if TYPE_CHECKING:
    from reft_edge.many.run import TaskResult


def train_many(
    tasks: Annotated[
        Path,
        typer.Argument(
            metavar="TASKS.toml",
            show_default=False,
            help='The list: model = "NAME", [defaults], and for each adapter [[task]] with a name, data and settings.',
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base, in place of the file's.", show_default=False),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            show_default="TASKS.toml.state.json",
            help="Keeps which tasks are finished, so that another run leaves them out.",
        ),
    ] = None,
    ray: Ray = None,
    workers: Workers = None,
    device: option.Device = None,
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Train the adapters of a list, and push those whose task says so; finished ones are left out."""
    from reft_edge.commands.screen import Screen

    console = Screen(stderr=True)

    def tell(text: str) -> None:
        with suppress(OSError):
            console.say(text)

    def told(result: "TaskResult") -> None:
        if result.status != "failed":
            tell(f"{result.name}: {_outcome(result)}")
        else:
            fail(f"{result.name}: {result.error}")

    with plain_errors():
        try:
            results = train_tasks(
                tasks,
                model=model,
                state=state,
                ray=ray,
                workers=workers,
                device=device,
                plain_http=plain_http,
                report=tell,
                on_task=told,
            )
        except KeyboardInterrupt as interrupt:
            fail("interrupted: finished tasks are kept, and the same command goes on from here")
            raise typer.Exit(128 + getattr(interrupt, "number", 2)) from None
    if as_json:
        print_json([vars(result) for result in results])
    else:
        show_table([("task", "", "parameters", "loss", "held-out", "accuracy", "file"), *map(_row, results)])
        counts = {
            name: sum(one.status == name for one in results) for name in ("trained", "finished", "failed")
        }
        say(f"{counts['trained']} trained, {counts['finished']} finished before, {counts['failed']} failed")
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


def _outcome(result: "TaskResult") -> str:
    what = "finished before" if result.status == "finished" else f"trained in {result.seconds or 0.0:,.0f} s"
    return f"{what}, pushed to {result.pushed}" if result.pushed else what


def _row(result: "TaskResult") -> tuple[str, ...]:
    numbers = (result.loss, result.evaluation, result.accuracy)
    return (
        result.name,
        result.status,
        "" if result.parameters is None else f"{result.parameters:,}",
        *("" if number is None else f"{number:.4f}" for number in numbers),
        str(result.path),
    )
