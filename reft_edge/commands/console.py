"""What commands have in common: all that they print, errors without tracebacks, progress bars, tables."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra as extra
from reft_edge.terminal import printable

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen
    from reft_edge.signing.keys import TrustedKeys


_WIDEST = 100_000
"""Columns that a table may take: a terminal breaks its lines, and pipes get them whole."""


def say(text: object = "", err: bool = False, end: str = "\n") -> None:
    """Print a text, at once and with its control characters escaped."""
    print(printable(str(text)), end=end, file=sys.stderr if err else sys.stdout, flush=True)


def fail(text: object) -> None:
    """Print what went wrong, in red where there is colour."""
    from reft_edge.commands.screen import Screen

    Screen(stderr=True).say(f"error: {text}", style="red")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Users see what went wrong and what to do, never a traceback."""
    try:
        yield
    except (ReftEdgeError, OSError) as error:
        fail(error)
        raise typer.Exit(1) from None
    except MemoryError:
        fail("there is not enough memory for this")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted", err=True)
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(screen: "Screen", name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; gives the callback that moves it on by a count."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


def print_json(content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print JSON in ASCII: its escapes keep every character, and control characters off the terminal."""
    say(json.dumps(content, default=str).replace("\x7f", "\\u007f"))


def show_table(rows: Sequence[Sequence[str]], header: bool = True) -> None:
    """Print a table, its first row in bold if it is a `header`. A cell is one line, whatever is in it."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from reft_edge.commands.screen import Screen

    lines = [[printable(cell).replace("\n", "\\n").replace("\t", "\\t") for cell in row] for row in rows]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number, line in enumerate(lines):
        style = "bold" if header and number == 0 else None
        table.add_row(*map(Text, line), style=style)
    screen = Screen()
    wide = screen.options.update(max_width=_WIDEST)
    wide = wide.update(width=Measurement.get(screen, wide, table).maximum)
    for segments in screen.render_lines(table, wide, pad=False):
        shown = Text.assemble(*((part.text, part.style or "") for part in segments))
        shown.rstrip()
        screen.print(shown, soft_wrap=True)


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), err=True)


def provider_options(given: Sequence[str] | None) -> dict[str, str]:
    """`NAME=VALUE` texts by name. Raises ReftEdgeError for one without a name or `=`."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ReftEdgeError(f"cannot read the provider option {text!r}; write NAME=VALUE")
        found[name] = value
    return found


def template_arguments(text: str | None) -> dict[str, Any]:
    """The object of --chat-template-kwargs; empty without one. Raises ReftEdgeError for a text that is none."""
    if text is None:
        return {}
    from reft_edge.json_files import parse_object

    return parse_object(text.encode(errors="surrogateescape"), "the text of --chat-template-kwargs")


def trusted_keys(path: Path | None) -> "TrustedKeys | None":
    """The keys of --require-signed; from then on it is printed who signed the adapters that are loaded."""
    if path is None:
        return None
    from reft_edge.signing.keys import load_trusted

    log = logging.getLogger("reft_edge")
    log.handlers, log.propagate = [_ToStderr()], False
    log.setLevel(logging.INFO)
    return load_trusted(path)


def split_scale(text: str) -> tuple[Path, float]:
    """`task.safetensors:0.5` as path and scale; 1 if there is none.

    Raises ReftEdgeError for a scale that is no finite number.
    """
    path, colon, factor = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in factor or "\\" in factor:
        return Path(text), 1.0
    try:
        scale = float(factor)
    except ValueError as error:
        raise ReftEdgeError(f"cannot read the scale {factor!r} of {text}; write FILE or FILE:0.5") from error
    if not math.isfinite(scale):
        raise ReftEdgeError(f"the scale of {text} is not a finite number")
    return Path(path), scale
