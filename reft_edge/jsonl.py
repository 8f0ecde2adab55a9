"""JSONL, one JSON value a line, and errors that name the line or row where something went wrong."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    source: object
    """What it is of, as messages name it; None for rows in memory."""
    unit: str
    """What `number` counts: `line` or `row`."""
    number: int
    """From 1."""

    def __str__(self) -> str:
        return f"{'' if self.source is None else f'{self.source} '}{self.unit} {self.number}"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the place in a ReftEdgeError of the block."""
        try:
            yield
        except ReftEdgeError as error:
            raise ReftEdgeError(f"{self}: {error}") from error


def json_at(place: Place, line: str) -> Any:
    """A line's value. Raises ReftEdgeError, which names the place, if it is not valid JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(f"{place}: not valid JSON ({error})") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers. Raises ReftEdgeError if it cannot be read."""
    return numbered(read_text(path).split("\n"))


def numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, without byte order marks, and their numbers from 1.

    Lines end at a newline only, since other line separators are allowed inside JSON texts.
    """
    plain = (line.lstrip("\ufeff") for line in lines)  # files that were joined have marks inside
    return ((number, line) for number, line in enumerate(plain, start=1) if line.strip())
