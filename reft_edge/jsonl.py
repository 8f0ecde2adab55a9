"""Reading JSONL files, one JSON value a line, with errors that name the line."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text
from reft_edge.unicode import check_texts

Row = TypeVar("Row")


def read_rows(path: Path, parse: Callable[[Any], Row]) -> Iterator[tuple[int, Row]]:
    """Every row of a file as `parse` makes it, with its line's number from 1; empty lines are left out.

    Lines end at a newline only, since other line separators are allowed inside JSON texts. Raises ReftEdgeError if the
    file cannot be read, and, naming the line, where it is not valid JSON or `parse` raises one.
    """
    for number, line in read_lines(path):
        with at_line(path, number):
            value = json.loads(line)
            for name, part in value.items() if isinstance(value, dict) else ():
                check_texts([name, part], f"`{name}`")
            row = parse(value)
        yield number, row


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers. Raises ReftEdgeError if it cannot be read."""
    lines = read_text(path).split("\n")
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


@contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Name file and line in what goes wrong inside the block."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(f"{path} line {number}: not valid JSON ({error})") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{path} line {number}: {error}") from error
