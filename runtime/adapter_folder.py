"""A folder of adapters by name: loaded when first asked for, again when a file is replaced, forgotten when memory is short."""

import errno
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reft_edge.adapter.file import AdapterSource, OpenedFile, is_adapter_name
from reft_edge.errors import ReftEdgeError, SignatureError
from reft_edge.files import open_regular

SUFFIX = ".safetensors"
BUDGET = 256 << 20
_HOPS = 8
"""Links to links that are looked at."""
_REFUSALS = 1024
_SIGNATURE_SECONDS = 60.0
"""A signature that is not valid yet can become so: for this long a refusal for it stands, others until the file changes."""
_LONGEST_NAME = 200
_TRIES = 8
"""Files that are replaced while they are loaded are loaded again so often."""
_HEADER = 1 << 20
"""Most bytes of a file that are no weights."""
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
"""Failures that say nothing about the file."""
_Stamp = tuple[int, ...]


class UnknownAdapterError(ReftEdgeError):
    """No file of that name is in the folder."""


class AdapterMemoryError(ReftEdgeError):
    """The adapters of running requests leave no memory for others; try again later."""


class Loader(Protocol):
    """What holds loaded adapters: a SteeredModel or a SteeredEncoder."""

    def load_adapter(self, path: AdapterSource, name: str | None = None) -> str: ...

    def unload_adapter(self, name: str) -> None: ...

    def adapter_size(self, name: str) -> int: ...


@dataclass(eq=False)
class _Loaded:
    key: str
    """The model's name for it."""
    stamp: _Stamp
    size: int
    holders: int = 0


@dataclass(frozen=True)
class _Refusal:
    stamp: _Stamp
    error: ReftEdgeError
    until: float


class AdapterFolder:
    """The adapters of one folder, as `NAME.safetensors`, for one model. Any number of threads may use it.

    Requests that run keep the weights they started with, whatever happens to the file. Every file that is read was opened by
    a plain name of this folder, and not through a link: a link is followed only to another name in the folder. What was
    refused is remembered until its file changes.
    """

    def __init__(self, model: Loader, folder: Path, budget: int = BUDGET) -> None:
        """`budget`: bytes of loaded weights. Raises ReftEdgeError if there is no such folder."""
        if not folder.is_dir():
            raise ReftEdgeError(f"there is no folder {folder}; give a folder of adapter files")
        self._model, self.folder, self.budget = model, folder, budget
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._outdated: list[_Loaded] = []
        """Replaced since, and still held."""
        self._mixes: Counter[tuple[tuple[str, float], ...]] = Counter()
        self._refusals: OrderedDict[str, _Refusal] = OrderedDict()
        self._versions = 0
        self._lock = threading.RLock()
        """Of all the above; never held while a file is read."""
        self._loading = threading.Lock()

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, the least recently used first."""
        with self._lock:
            return list(self._loaded)

    @property
    def size(self) -> int:
        """Bytes of loaded weights."""
        with self._lock:
            return sum(entry.size for entry in (*self._loaded.values(), *self._outdated))

    def names(self) -> list[str]:
        """Names of all adapter files, sorted; none of them is opened. Empty if the folder is gone."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(SUFFIX)
                    if name != entry.name and is_adapter_name(name) and self._is_file(entry):
                        found.append(name)
        except OSError:
            return []
        return sorted(found)

    def has(self, name: str) -> bool:
        """Whether `names` lists it."""
        try:
            self._open(name).file.close()
        except UnknownAdapterError:
            return False
        except OSError:
            return True
        return True

    def unload(self, name: str) -> None:
        """Forget an adapter that is loaded; running requests keep it. It is loaded again when it is asked for."""
        with self._lock:
            self._forget(name)

    def use(self, names: Iterable[str]) -> None:
        """Have the model hold these adapters as their files are now.

        Raises UnknownAdapterError, or ReftEdgeError for a file that does not fit, or for adapters that take more than the
        budget together; other adapters stay as they are.
        """
        with self.hold(dict.fromkeys(names, 1.0)):
            pass

    @contextmanager
    def hold(self, mix: Mapping[str, float]) -> Iterator[dict[str, float]]:
        """The same for as long as the block runs, and what the model calls them, with their scales.

        Raises AdapterMemoryError if what other blocks hold leaves no room.
        """
        names = list(mix)
        if not names:
            yield {}
            return
        entries = self._held(names)
        for _ in range(_TRIES):
            if entries is not None:
                break
            with self._loading:
                for name in names:
                    self._refresh(name, names)
                entries = self._held(names)
        if entries is None:
            raise AdapterMemoryError(f"the files of {_quoted(names)} are being replaced; try again")
        chosen = {entry.key: mix[name] for name, entry in zip(names, entries, strict=True)}
        key = tuple(chosen.items())
        try:
            with self._lock:
                self._check_mixes(key)
                self._mixes[key] += 1
            try:
                yield chosen
            finally:
                with self._lock:
                    self._mixes -= Counter([key])
        finally:
            with self._lock:
                self._release(entries)

    def _held(self, names: list[str]) -> list[_Loaded] | None:
        """Take hold of adapters that are loaded as their files are now; None if one is not. The caller holds no lock."""
        stamps = []
        for name in names:
            with self._opened(name) as source:
                stamps.append(_stamp(source))
        with self._lock:
            entries = [self._loaded.get(name) for name in names]
            found = [
                entry for entry, stamp in zip(entries, stamps, strict=True) if entry and entry.stamp == stamp
            ]
            if len(found) < len(names):
                return None
            self._make_room(0, names)
            for name, entry in zip(names, found, strict=True):
                self._loaded.move_to_end(name)
                entry.holders += 1
            return found

    def _release(self, entries: list[_Loaded]) -> None:
        for entry in entries:
            entry.holders -= 1
            if not entry.holders and entry in self._outdated:
                self._outdated.remove(entry)
                self._model.unload_adapter(entry.key)

    def _refresh(self, name: str, wanted: list[str]) -> None:
        """Load a file unless it is loaded as it is now; one thread at a time."""
        with self._opened(name) as source:
            stamp = _stamp(source)
            with self._lock:
                entry = self._loaded.get(name)
                if entry is not None and entry.stamp == stamp:
                    return
                self._raise_again(name, stamp)
                self._forget(name)
                self._make_room(max(0, os.fstat(source.file.fileno()).st_size - _HEADER), wanted)
                taken = any(old.key == name for old in self._outdated)
                self._versions += taken
                key = f"{name}/{self._versions}" if taken else name
            try:
                self._model.load_adapter(source, key)
            except ReftEdgeError as error:
                if not isinstance(error.__cause__, OSError | MemoryError):
                    self._remember(name, stamp, error)
                raise
            except MemoryError as error:
                raise AdapterMemoryError(
                    f"there is no memory left for adapter {name!r}; try again later"
                ) from error
            with self._lock:
                self._loaded[name] = _Loaded(key, stamp, self._model.adapter_size(key))

    def _make_room(self, more: int, wanted: list[str]) -> None:
        """Forget the least recently used until `more` bytes fit. Raises ReftEdgeError if `wanted` alone do not fit,
        AdapterMemoryError if those in use do not."""
        for name in [
            name for name, entry in self._loaded.items() if not entry.holders and name not in wanted
        ]:
            if self.size + more <= self.budget:
                return
            self._forget(name)
        if self.size + more <= self.budget:
            return
        own = more + sum(entry.size for name, entry in self._loaded.items() if name in wanted)
        if own > self.budget:
            for name in [name for name in wanted if name in self._loaded and not self._loaded[name].holders]:
                self._forget(name)
            raise ReftEdgeError(
                f"the weights of {_quoted(wanted)} take {own:,} bytes; at most {self.budget:,} bytes of adapters "
                "are kept in memory: name fewer, or have the server started with more --adapter-memory"
            )
        raise AdapterMemoryError("the adapters of running requests take all their memory; try again later")

    def _check_mixes(self, key: tuple[tuple[str, float], ...]) -> None:
        """The model copies the weights of every mix that runs: those of different mixes are bounded as the loaded ones are."""
        sizes = {entry.key: entry.size for entry in (*self._loaded.values(), *self._outdated)}
        held = sum(sizes.get(part, 0) for mix in {*self._mixes, key} for part, _ in mix)
        if held > self.budget and self._mixes:
            raise AdapterMemoryError("the mixes of running requests take all their memory; try again later")

    def _raise_again(self, name: str, stamp: _Stamp) -> None:
        refusal = self._refusals.get(name)
        if refusal is not None and refusal.stamp == stamp and time.monotonic() < refusal.until:
            raise type(refusal.error)(*refusal.error.args)

    def _remember(self, name: str, stamp: _Stamp, error: ReftEdgeError) -> None:
        lasts = _SIGNATURE_SECONDS if isinstance(error, SignatureError) else float("inf")
        with self._lock:
            self._refusals[name] = _Refusal(stamp, error, time.monotonic() + lasts)
            while len(self._refusals) > _REFUSALS:
                self._refusals.popitem(last=False)

    def _forget(self, name: str) -> None:
        entry = self._loaded.pop(name, None)
        if entry is None:
            return
        if entry.holders:
            self._outdated.append(entry)
        else:
            self._model.unload_adapter(entry.key)

    @contextmanager
    def _opened(self, name: str) -> Iterator[OpenedFile]:
        try:
            source = self._open(name)
        except UnknownAdapterError:
            with self._lock:
                self._forget(name)
            raise
        except OSError as error:
            raise ReftEdgeError(
                f"cannot read adapter {self.folder / (name + SUFFIX)}: {error.strerror}"
            ) from error
        with source.file:
            yield source

    def _open(self, name: str) -> OpenedFile:
        """Raises UnknownAdapterError, or OSError for a file that is there and cannot be opened."""
        unknown = UnknownAdapterError(f"there is no adapter {name[:_LONGEST_NAME]!r} in {self.folder}")
        if not is_adapter_name(name):
            raise unknown
        try:
            target = self._target(name + SUFFIX)
            if target is None:
                raise unknown
            return OpenedFile(self.folder / (name + SUFFIX), open_regular(self.folder / target, follow=False))
        except PermissionError:
            raise
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise
            raise unknown from error

    def _target(self, name: str) -> str | None:
        """The file of the folder that a name there stands for, links followed; None if they lead out or nowhere."""
        for _ in range(_HOPS):
            try:
                target = os.readlink(self.folder / name)
            except OSError:
                return name  # no link: opening it tells what it is
            place, name = os.path.split(target)
            if not name or name in (".", "..") or not self._same_folder(place):
                return None
        return None

    def _same_folder(self, place: str) -> bool:
        return not place or os.path.samefile(os.path.join(self.folder, place), self.folder)

    def _is_file(self, entry: "os.DirEntry[str]") -> bool:
        try:
            if not entry.is_symlink():
                return entry.is_file()
            target = self._target(entry.name)
            return target is not None and entry.is_file() and not (self.folder / target).is_symlink()
        except OSError:
            return False


def _stamp(source: OpenedFile) -> _Stamp:
    found = os.fstat(source.file.fileno())
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


def _quoted(names: list[str]) -> str:
    shown = ", ".join(repr(name[:_LONGEST_NAME]) for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
