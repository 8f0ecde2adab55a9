"""A folder as a repository, which any static web server can serve as one, too."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from reft_edge.errors import ReftEdgeError
from reft_edge.files import open_regular, replace_file
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
            with open_regular(index, follow=False) as file:
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
        with _reading(path):
            _check_inside(path.parent)
            file = open_regular(path, follow=False)
        with file:
            yield start, _pieces(file, path, start)

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        """The files are written before the index that names them, each of them atomically."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / ".new"
        with _writing(self.folder), locked(self.folder):
            known = self.releases() if os.path.lexists(self.folder / INDEX) else []
            made = next_releases(known, goods)
            index = render_index(dict.fromkeys([*known, *made]))
            for item, release in zip(goods, made, strict=True):
                _check_inside(self.folder / release.name)
                replace_file(self.folder / release.path, item.content, temporary)
            replace_file(self.folder / INDEX, index, temporary)
        return made


def _check_inside(folder: Path) -> None:
    """Raise ReftEdgeError if a folder of a repository is a link, which may lead out of it."""
    if folder.is_symlink():
        raise ReftEdgeError(f"{folder} is a link, which no folder inside a repository may be")


def _pieces(file: BinaryIO, path: Path, start: int) -> Iterator[bytes]:
    while True:
        with _reading(path):
            file.seek(start)
            piece = file.read(_PIECE)
        if not piece:
            return
        start += len(piece)
        yield piece


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReftEdgeError(f"cannot write to {folder}: {error.strerror}") from error
