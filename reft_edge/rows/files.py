"""Files of rows: JSONL, a JSON array, CSV and Parquet, each as rows with their places; gzip around any of them."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.files import decode_text
from reft_edge.jsonl import Place, json_at, numbered
from reft_edge.rows.source import without_none

DELIMITERS = (",", ";", "\t", "|")
_GZIP, _PARQUET, _ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
_LONGEST_CELL = 2**31 - 1
_MAY_BE_EMPTY = {"input", "text2", "tools", "choices", "system"}
"""Columns whose empty cells hold nothing, where other columns' hold an empty text."""


def file_rows(content: bytes, path: Path) -> Iterator[tuple[Place, Any]]:
    """The rows of a file's content, in the format that its first bytes or its name's ending tell.

    Raises ReftEdgeError, which names the file and the line or row, for what is not of that format.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if content.startswith(_GZIP):
        content = _unpacked(content, path)
        suffixes = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    if content.startswith(_PARQUET):
        return _parquet(content, path)
    if content.startswith(_ZIP):
        raise ReftEdgeError(f"{path} is a ZIP archive or an Excel file; unpack it, or save it as CSV")
    if suffixes[-1:] == [".parquet"]:
        raise ReftEdgeError(f"{path} is no Parquet file, for all its name")
    text = decode_text(content, path)
    if suffixes[-1:] in ([".csv"], [".tsv"]):
        return _csv(text, path, "\t" if suffixes[-1] == ".tsv" else None)
    if text.lstrip("\ufeff \t\n").startswith("["):
        return _array(text, path)
    return _lines(text, path)


def _unpacked(content: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ReftEdgeError(f"{path} is a damaged gzip file: {error}") from error


def _lines(text: str, path: Path) -> Iterator[tuple[Place, Any]]:
    for number, line in numbered(text.split("\n")):
        place = Place(path, "line", number)
        try:
            value = json_at(place, line)
        except ReftEdgeError:
            _refuse_object(text, path)
            raise
        yield place, value


def _refuse_object(text: str, path: Path) -> None:
    """Where lines are no JSON, but all of them are one object."""
    try:
        value = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        raise ReftEdgeError(
            f"{path} is one JSON object with the fields {sorted(value)}; expected an array of rows, or an object a line"
        )


def _array(text: str, path: Path) -> Iterator[tuple[Place, Any]]:
    try:
        values = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(
            f"{path} begins as a JSON array, but is not valid JSON ({error}); expected an array of rows, or an object a line"
        ) from error
    for number, value in enumerate(values, start=1):
        yield Place(path, "row", number), value


def _csv(text: str, path: Path, delimiter: str | None) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    text = text.lstrip("\ufeff")
    delimiter = delimiter or _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ReftEdgeError(f"{path} line {line}: not valid CSV ({error})") from error
        if cells is None:
            return
        if cells and not header:
            header = _header(cells, path)
        elif cells:
            yield Place(path, "line", line), _record(cells, header, Place(path, "line", line), delimiter)
        line = reader.line_num + 1


def _delimiter(text: str) -> str:
    """What gives the header the most columns; a comma where several do."""
    head = text.lstrip("\n")

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=columns)


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ReftEdgeError(f"{path} has the columns {twice} twice; give each a name of its own")
    return names


def _record(cells: list[str], header: list[str], place: Place, delimiter: str) -> dict[str, str]:
    """A line's cells by their columns; a column without a name, as pandas writes its index, is left out."""
    if len(cells) != len(header):
        raise ReftEdgeError(
            f"{place}: it has {len(cells)} cells, and the header {len(header)}; put cells with a {delimiter!r} or a line end "
            "in quotes"
        )
    return {
        name: cell
        for name, cell in zip(header, cells, strict=True)
        if name and (cell or name not in _MAY_BE_EMPTY)
    }


def _parquet(content: bytes, path: Path) -> Iterator[tuple[Place, Any]]:
    with extra("data"):
        import pyarrow
        import pyarrow.parquet
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Place(path, "row", number), without_none(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ReftEdgeError(f"cannot read {path} as Parquet: {error}") from error
