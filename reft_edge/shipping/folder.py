"""A folder as a repository, which any static web server can serve as one, too."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.files import replace_file
from reft_edge.shipping.locking import locked
from reft_edge.shipping.release import (
    INDEX,
    MAX_INDEX,
    Goods,
    Release,
    next_releases,
    parse_index,
    render_index,
)

_PIECE = 1 << 20


@dataclass(frozen=True)
class FolderRepository:
    """`index.json` and the files of its releases."""

    folder: Path

    @property
    def address(self) -> str:
        return str(self.folder)

    def releases(self, version: int | None = None) -> list[Release]:
        index = self.folder / INDEX
        try:
            with index.open("rb") as file:
                return parse_index(file.read(MAX_INDEX + 1))
        except FileNotFoundError as error:
            raise ReftEdgeError(
                f"{self.folder} is not a repository: it has no {INDEX}; `reft-edge push` makes one"
            ) from error
        except OSError as error:
            raise ReftEdgeError(f"cannot read {index}: {error.strerror}") from error
        except ReftEdgeError as error:
            raise ReftEdgeError(f"cannot use {index}: {error}") from error

    @contextmanager
    def open(self, release: Release, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        path = self.folder / release.path
        try:
            with path.open("rb") as file:
                file.seek(start)
                yield start, iter(lambda: file.read(_PIECE), b"")
        except OSError as error:
            raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        """The files are written before the index that names them, each of them atomically."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReftEdgeError(f"cannot write to {self.folder}: {error.strerror}") from error
        temporary = self.folder / ".new"
        with locked(self.folder):
            known = self.releases() if (self.folder / INDEX).exists() else []
            made = next_releases(known, goods)
            index = render_index(dict.fromkeys([*known, *made]))
            for item, release in zip(goods, made, strict=True):
                replace_file(self.folder / release.path, item.content, temporary)
            replace_file(self.folder / INDEX, index, temporary)
        return made
