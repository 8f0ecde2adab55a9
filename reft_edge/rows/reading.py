"""Rows from wherever they come, one by one, as something else makes them, with errors that name the line or row."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_content
from reft_edge.jsonl import Place, json_at, numbered
from reft_edge.rows.files import file_rows
from reft_edge.rows.hub import hub_rows
from reft_edge.rows.source import Renamed, RowsInMemory, RowSource
from reft_edge.unicode import check_texts

Row = TypeVar("Row")
Digest = Callable[[], str]


def read_rows(source: RowSource, parse: Callable[[Any], Row]) -> Iterator[tuple[Place, Row]]:
    """Every row as `parse` makes it, with its place; empty lines are left out.

    A file is read once, so that it may be a pipe. Raises ReftEdgeError if it cannot be read, and, naming the line or row,
    where it is not of its format or `parse` raises one.
    """
    return _parsed(_opened(source)[0], source, parse)


def load_rows(source: RowSource, parse: Callable[[Any], Row]) -> tuple[list[Row], str]:
    """All rows as `read_rows` gives them, and the hex SHA-256 of the file, or of a JSONL file that would hold the rows."""
    found, digest = _opened(source)
    rows = [row for _, row in _parsed(found, source, parse)]
    return rows, digest()


def _opened(source: RowSource) -> tuple[Iterator[tuple[Place, Any]], Digest]:
    """The rows, and what gives their digest once all were read."""
    if isinstance(source, Renamed):
        return _opened(source.source)
    if isinstance(source, Path):
        content = read_content(source, source)
        return file_rows(content, source), lambda: hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    rows = _in_memory(source) if isinstance(source, RowsInMemory) else hub_rows(source)

    def read() -> Iterator[tuple[Place, Any]]:
        for place, row in rows:
            digest.update(f"{json.dumps(row, default=str)}\n".encode())
            yield place, row

    return read(), digest.hexdigest


def _in_memory(source: RowsInMemory) -> Iterator[tuple[Place, Any]]:
    for number, line in numbered(source.lines):
        place = Place(None, "row", number)
        yield place, json_at(place, line)


def _parsed(
    rows: Iterator[tuple[Place, Any]], source: RowSource, parse: Callable[[Any], Row]
) -> Iterator[tuple[Place, Row]]:
    columns = source.columns if isinstance(source, Renamed) else ()
    for place, value in rows:
        with place.named():
            for name, part in value.items() if isinstance(value, dict) else ():
                check_texts([name, part], f"`{name}`")
            row = parse(_renamed(value, columns) if columns else value)
        yield place, row


def _renamed(row: Any, columns: tuple[tuple[str, str], ...]) -> Any:
    if not isinstance(row, dict):
        return row
    if missing := [theirs for _, theirs in columns if theirs not in row]:
        raise ReftEdgeError(f"it has no column {missing[0]!r} to rename; found {sorted(row)}")
    theirs = {name for _, name in columns}
    kept = {name: value for name, value in row.items() if name not in theirs}
    return {**kept, **{known: row[name] for known, name in columns}}
