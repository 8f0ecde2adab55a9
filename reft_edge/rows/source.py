"""Where rows come from, as users name it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RowsInMemory:
    """Rows as the lines of a file that holds them."""

    lines: tuple[str, ...]
    name: str = "the list of rows"
    """What messages call them."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class HubRows:
    """A dataset of the Hub, or a folder that holds one: the `datasets` library reads it."""

    name: str
    """`owner/name`, or the folder's path."""
    config: str | None = None
    split: str | None = None
    splits: tuple[str, ...] = ("train",)
    """Those that are looked for, in this order, where `split` says none."""
    limit: int | None = None
    """Rows that are read at most; None for all."""

    def __str__(self) -> str:
        chosen = ", ".join(part for part in (self.config, self.split) if part)
        return f"{self.name} ({chosen})" if chosen else self.name


@dataclass(frozen=True)
class Renamed:
    """Rows whose columns have other names."""

    source: "Path | RowsInMemory | HubRows"
    columns: tuple[tuple[str, str], ...]
    """Pairs of the name that is read and the name that the rows have."""

    def __str__(self) -> str:
        return str(self.source)


RowSource = Path | RowsInMemory | HubRows | Renamed


def file_of(source: RowSource) -> Path | None:
    """The file that is read, if it is one."""
    source = source.source if isinstance(source, Renamed) else source
    return source if isinstance(source, Path) else None


def without_none(value: Any) -> Any:
    """A value without the fields that are None, at every depth."""
    if isinstance(value, Mapping):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list | tuple) else value
