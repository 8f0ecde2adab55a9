"""A folder of adapters by name: loaded when first asked for, again when a file is replaced, forgotten when memory is short."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from reft_edge.errors import ReftEdgeError

SUFFIX = ".safetensors"
BUDGET = 256 << 20
_Stamp = tuple[int, int, int]


class UnknownAdapterError(ReftEdgeError):
    """No file of that name is in the folder."""


class Loader(Protocol):
    """What holds loaded adapters: a SteeredModel or a SteeredEncoder."""

    def load_adapter(self, path: Path | str, name: str | None = None) -> str: ...

    def unload_adapter(self, name: str) -> None: ...

    def adapter_size(self, name: str) -> int: ...


class AdapterStore:
    """The adapters of one folder, as `NAME.safetensors`, for one model.

    Requests that run keep the weights they started with, whatever happens to the file. Names come from the folder's
    listing only; links that lead out of the folder are not followed.
    """

    def __init__(self, model: Loader, folder: Path, budget: int = BUDGET) -> None:
        """`budget`: bytes of loaded weights. Raises ReftEdgeError if there is no such folder."""
        if not folder.is_dir():
            raise ReftEdgeError(f"there is no folder {folder}; give a folder of adapter files")
        self._model, self.folder, self.budget = model, folder, budget
        self._root = folder.resolve()
        self._loaded: OrderedDict[str, tuple[_Stamp, int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, the least recently used first."""
        return list(self._loaded)

    @property
    def size(self) -> int:
        """Bytes of loaded weights."""
        return sum(size for _, size in self._loaded.values())

    def names(self) -> list[str]:
        """Names of all adapter files, sorted; none of them is opened."""
        with os.scandir(self.folder) as entries:
            return sorted(
                entry.name.removesuffix(SUFFIX)
                for entry in entries
                if entry.name.endswith(SUFFIX) and entry.name != SUFFIX and self._inside(entry)
            )

    def use(self, names: Iterable[str]) -> None:
        """Have the model hold these adapters as their files are now.

        Raises UnknownAdapterError, or ReftEdgeError for a file that does not fit; other adapters stay as they are.
        """
        wanted = list(names)
        with self._lock:
            for name in wanted:
                self._refresh(name)
            while self.size > self.budget and (old := next(iter(self._loaded))) not in wanted:
                self._forget(old)

    def _refresh(self, name: str) -> None:
        path = self._path(name)
        found = path.stat()
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if name in self._loaded and self._loaded[name][0] == stamp:
            self._loaded.move_to_end(name)
            return
        self._forget(name)
        self._model.load_adapter(path, name)
        self._loaded[name] = stamp, self._model.adapter_size(name)

    def _path(self, name: str) -> Path:
        path = self.folder / (name + SUFFIX)
        plain = name and not any(mark in name for mark in ("/", "\\", "\0")) and name not in (".", "..")
        if not plain or not path.is_file() or path.resolve().parent != self._root:
            self._forget(name)
            raise UnknownAdapterError(f"there is no adapter {name!r} in {self.folder}")
        return path

    def _forget(self, name: str) -> None:
        if self._loaded.pop(name, None) is not None:
            self._model.unload_adapter(name)

    def _inside(self, entry: "os.DirEntry[str]") -> bool:
        if entry.is_symlink():
            return entry.is_file() and Path(entry.path).resolve().parent == self._root
        return entry.is_file()
