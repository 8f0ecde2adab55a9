"""Reading JSONL files, one JSON value a line, or rows in memory, with errors that name the line or row."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text, sha256_of
from reft_edge.unicode import check_texts

Row = TypeVar("Row")
GivenRows = str | Path | Iterable[Mapping[str, Any]]
"""The name of a JSONL file, or rows in memory: a list of dicts, or a `datasets.Dataset`."""


@dataclass(frozen=True)
class RowsInMemory:
    """Rows as the lines of a file that holds them; in messages they are `the list of rows`."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "the list of rows"


RowSource = Path | RowsInMemory


def row_source(given: GivenRows) -> RowSource:
    """What the loaders of rows read. Raises ReftEdgeError for rows that are not dicts of JSON's values.

    A `datasets.Dataset` has every column in every row: its fields that are None are left out, at every depth.
    """
    if isinstance(given, str | Path):
        return Path(given)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        several = (
            f" with the parts {sorted(map(str, given))}; give one of them"
            if isinstance(given, Mapping)
            else ""
        )
        raise ReftEdgeError(
            f"rows are a {type(given).__name__}{several}; expected a file's name, a list of dicts or a datasets.Dataset"
        )
    filled = hasattr(given, "column_names")
    return RowsInMemory(tuple(_line(number, row, filled) for number, row in enumerate(given, start=1)))


def _line(number: int, row: Any, filled: bool) -> str:
    if not isinstance(row, Mapping):
        raise ReftEdgeError(f"row {number} is a {type(row).__name__}; expected a dict")
    try:
        return json.dumps(_without_none(row) if filled else dict(row))
    except (TypeError, ValueError, RecursionError) as error:
        raise ReftEdgeError(f"row {number} holds what JSON has no value for: {error}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list | tuple) else value


def digest_of(source: RowSource) -> str:
    """SHA-256 of a file, or of the file that rows in memory would make."""
    if isinstance(source, Path):
        return sha256_of(source)
    return hashlib.sha256("".join(f"{line}\n" for line in source.lines).encode()).hexdigest()


def read_rows(source: RowSource, parse: Callable[[Any], Row]) -> Iterator[tuple[int, Row]]:
    """Every row as `parse` makes it, with its number from 1, which is a file's line; empty lines are left out.

    Lines end at a newline only, since other line separators are allowed inside JSON texts. Raises ReftEdgeError if the
    file cannot be read, and, naming the line, where it is not valid JSON or `parse` raises one.
    """
    for number, line in read_lines(source):
        with at_line(source, number):
            value = json.loads(line)
            for name, part in value.items() if isinstance(value, dict) else ():
                check_texts([name, part], f"`{name}`")
            row = parse(value)
        yield number, row


def read_lines(source: RowSource) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers. Raises ReftEdgeError if a file cannot be read."""
    lines = read_text(source).split("\n") if isinstance(source, Path) else source.lines
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


@contextmanager
def at_line(source: RowSource, number: int) -> Iterator[None]:
    """Name file and line, or row, in what goes wrong inside the block."""
    place = f"{source} line {number}" if isinstance(source, Path) else f"row {number}"
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(f"{place}: not valid JSON ({error})") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{place}: {error}") from error
