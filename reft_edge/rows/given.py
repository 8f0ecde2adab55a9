"""From what users name to a source of rows: files, datasets of the Hub, rows in memory."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.rows.hub import found_split
from reft_edge.rows.source import HubRows, Renamed, RowsInMemory, RowSource, without_none

GivenRows = str | Path | Iterable[Mapping[str, Any]]
"""A file's name, a dataset of the Hub (`hub:owner/name` or `owner/name`), or rows in memory: a list of dicts, or a
`datasets.Dataset`."""

HELD_OUT = ("validation", "test")
"""Splits that are looked for where held-out rows are named by their dataset alone."""
TESTS = ("test", "validation")
"""The same of rows that are evaluated."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt")
"""Of files; a name that ends so is never a dataset of the Hub."""
_HUB = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def row_source(
    given: GivenRows,
    split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    splits: tuple[str, ...] = ("train",),
    limit: int | None = None,
) -> RowSource:
    """What the loaders of rows read. Raises ReftEdgeError for rows that are not dicts of JSON's values.

    `split` and `config` are for datasets of the Hub and folders of one; `splits` are looked for where none is given, and
    `limit` says how many rows will be read at most. `columns`: the names that rows have, by those that are read.

    A `datasets.Dataset` has every column in every row: its fields that are None are left out, at every depth.
    """
    source = _source(given, split, config, splits, limit)
    if isinstance(source, HubRows):
        source = found_split(source)
    elif name := "split" if split else "config" if config else None:
        raise ReftEdgeError(
            f"{name} is for a dataset of the Hub, or a folder that holds one; {source} is neither"
        )
    return Renamed(source, tuple(columns.items())) if columns else source


def held_out_source(
    given: GivenRows | None,
    split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> RowSource | None:
    """`row_source` of held-out rows, None for none. The configuration is that of the rows they are held out from: it is not
    for files, which have none. Raises ReftEdgeError as `row_source` does, and for a split of nothing."""
    if given is None:
        if split is not None:
            raise ReftEdgeError(f"the split {split!r} is of held-out rows; say with --eval which they are")
        return None
    in_files = not isinstance(given, str) or not _on_hub(given)
    return row_source(given, split, None if in_files else config, columns, HELD_OUT)


def _source(
    given: GivenRows, split: str | None, config: str | None, splits: tuple[str, ...], limit: int | None
) -> Path | RowsInMemory | HubRows:
    if isinstance(given, str) and given.startswith(_HUB):
        name = given.removeprefix(_HUB)
        if not _HUB_ID.fullmatch(name):
            raise ReftEdgeError(f"{given!r} names no dataset of the Hub; write hub:owner/name")
        return HubRows(name, config, split, splits, limit)
    if isinstance(given, str | Path):
        if _on_hub(given):
            return HubRows(str(given), config, split, splits, limit)
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


def _on_hub(given: str | Path) -> bool:
    """Whether a name is one of a dataset of the Hub, or of a folder that holds one."""
    path = Path(given)
    if isinstance(given, Path) or path.exists():
        return path.is_dir()
    known = path.suffix.lower() in SUFFIXES
    return given.startswith(_HUB) or (_HUB_ID.fullmatch(given) is not None and not known)


def parse_columns(given: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer`. Raises ReftEdgeError for anything else."""
    columns: dict[str, str] = {}
    for pair in given.split(",") if given is not None else ():
        known, _, theirs = (part.strip() for part in pair.partition("="))
        if not known or not theirs or known in columns:
            raise ReftEdgeError(
                f"cannot read the column {pair!r}; write NAME=COLUMN pairs with a comma between, such as "
                "prompt=question,completion=answer, each name once"
            )
        columns[known] = theirs
    return columns


def _line(number: int, row: Any, filled: bool) -> str:
    if not isinstance(row, Mapping):
        raise ReftEdgeError(f"row {number} is a {type(row).__name__}; expected a dict")
    try:
        return json.dumps(without_none(row) if filled else dict(row))
    except (TypeError, ValueError, RecursionError) as error:
        raise ReftEdgeError(f"row {number} holds what JSON has no value for: {error}") from error
