"""Reading JSONL files, one JSON value a line, or rows in memory, with errors that name the line or row."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reft_edge.errors import ReftEdgeError
from reft_edge.files import decode_text, read_content, read_text
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


def unit_of(source: RowSource) -> str:
    """What rows are counted by: `line` or `row`."""
    return "line" if isinstance(source, Path) else "row"


def read_rows(source: RowSource, parse: Callable[[Any], Row]) -> Iterator[tuple[int, Row]]:
    """Every row as `parse` makes it, with its number from 1, which is a file's line; empty lines are left out.

    Lines end at a newline only, since other line separators are allowed inside JSON texts. Raises ReftEdgeError if the
    file cannot be read, and, naming the line, where it is not valid JSON or `parse` raises one.
    """
    return _rows(source, read_lines(source), parse)


def load_rows(source: RowSource, parse: Callable[[Any], Row]) -> tuple[list[Row], str]:
    """All rows as `read_rows` gives them, and the hex SHA-256 of the file, or of the one that rows in memory would make.

    A file is read once, so that it may be a pipe.
    """
    if isinstance(source, Path):
        content = read_content(source, source)
        lines: Sequence[str] = decode_text(content, source).split("\n")
    else:
        lines = source.lines
        content = "".join(f"{line}\n" for line in lines).encode()
    rows = [row for _, row in _rows(source, _numbered(lines), parse)]
    return rows, hashlib.sha256(content).hexdigest()


def _rows(
    source: RowSource, lines: Iterable[tuple[int, str]], parse: Callable[[Any], Row]
) -> Iterator[tuple[int, Row]]:
    for number, line in lines:
        with at_line(source, number):
            value = json.loads(line)
            for name, part in value.items() if isinstance(value, dict) else ():
                check_texts([name, part], f"`{name}`")
            row = parse(value)
        yield number, row


def read_lines(source: RowSource) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers. Raises ReftEdgeError if a file cannot be read."""
    return _numbered(read_text(source).split("\n") if isinstance(source, Path) else source.lines)


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    plain = (line.lstrip("\ufeff") for line in lines)  # files that were joined have marks inside
    return ((number, line) for number, line in enumerate(plain, start=1) if line.strip())


@contextmanager
def at_line(source: RowSource, number: int) -> Iterator[None]:
    """Name file and line, or row, in what goes wrong inside the block."""
    place = f"{f'{source} ' if isinstance(source, Path) else ''}{unit_of(source)} {number}"
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(f"{place}: not valid JSON ({error})") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{place}: {error}") from error
