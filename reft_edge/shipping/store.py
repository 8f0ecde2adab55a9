"""A folder of adapters on a device, with the versions that each had: installed, rolled back, never half.

    STORE/NAME.safetensors                                 what the runtime loads
    STORE/.reft-edge/NAME/ORDER-VERSION-HEX.safetensors    what was installed, oldest first, HEX being the SHA-256
    STORE/.reft-edge/.parts/                               downloads under way
    STORE/.reft-edge/NAME/new                              a file about to get its name
    STORE/.reft-edge/.lock                                 held by whoever changes the store

Which version is installed is not written anywhere: it is the one whose content NAME.safetensors has. So one rename decides,
and a device that loses power at any moment has the old file or the new one. What comes after the installed version in that
order was rolled back.

Links are not followed: what is a link in the store is no file of it, is never copied, and never written through.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from reft_edge.adapter.file import StoredAdapter, is_adapter_name, parse_stored, read_whole
from reft_edge.errors import ReftEdgeError
from reft_edge.files import make_folder, open_regular, replace_file
from reft_edge.shipping.release import MAX_FILE, SUFFIX, Release, check_name, digest_of

KEEP = 3
"""Versions of an adapter that a store keeps, the installed one among them."""
HIDDEN = ".reft-edge"
PUBLIC = 0o666
"""Permissions of a file for everybody, before the user's umask."""

_KEPT = re.compile(r"(\d{6,12})-(\d{1,10})-([0-9a-f]{64})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Kept:
    """A version that is or was installed."""

    order: int
    version: int
    """0 for a file that was put there by hand."""
    digest: str
    path: Path


@dataclass(frozen=True)
class State:
    """One adapter in a store."""

    name: str
    digest: str | None
    """Of the file that the runtime loads; None if there is none."""
    history: tuple[Kept, ...]
    """In the order in which they were installed."""

    @property
    def installed(self) -> Kept | None:
        """The history's entry of the file that the runtime loads; None if it was put there by hand."""
        return next((kept for kept in reversed(self.history) if kept.digest == self.digest), None)

    @property
    def version(self) -> int | None:
        return self.installed.version if self.installed else None

    @property
    def earlier(self) -> list[Kept]:
        """What was installed before, the latest first."""
        order = self.installed.order if self.installed else None
        before = [kept for kept in self.history if order is None or kept.order < order]
        return [kept for kept in reversed(before) if kept.digest != self.digest]

    @property
    def undone(self) -> list[Kept]:
        """What was rolled back."""
        order = self.installed.order if self.installed else None
        return [kept for kept in self.history if order is not None and kept.order > order]


class DeviceStore:
    """The folder that the runtime's AdapterFolder reads, which never sees what this keeps beside the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hidden = folder / HIDDEN

    def names(self) -> list[str]:
        """Names of all adapter files, sorted, as the runtime sees them: links out of the folder are none.

        Raises ReftEdgeError if there is no such folder.
        """
        self._check_folder()
        root = self.folder.resolve()
        found = (
            path.name
            for path in self.folder.iterdir()
            if path.name.endswith(SUFFIX) and path.is_file() and path.resolve().parent == root
        )
        return sorted(name for file in found if is_adapter_name(name := file.removesuffix(SUFFIX)))

    def path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def state(self, name: str) -> State:
        """What is installed of a name, and what was. Raises ReftEdgeError if it cannot be read."""
        path = self.path(name)
        try:
            with _opened(path) as file:
                digest = digest_of_file(file) if file is not None else None
        except OSError as error:
            raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
        kept = [
            Kept(int(found[1]), int(found[2]), f"sha256:{found[3]}", file)
            for file in self._files(name)
            if (found := _KEPT.fullmatch(file.name)) and _is_plain(file)
        ]
        return State(name, digest, tuple(sorted(kept, key=lambda entry: entry.order)))

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The file that the runtime loads. Raises ReftEdgeError if there is none, or it cannot be read."""
        path = self.path(name)
        try:
            with _opened(path.resolve() if path.is_symlink() and self._holds(path) else path) as file:
                if file is None:
                    raise ReftEdgeError(f"{path} is gone, or no file of the store any more")
                yield file
        except OSError as error:
            raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error

    def read(self, name: str, called: str) -> tuple[bytes, StoredAdapter]:
        """The bytes of that file and the adapter that it is, as `read_whole` reads it; `called` stands for it in messages."""
        with self.opened(name) as file:
            return read_whole(file, called)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the store's lock; made if it is not there. Only the store's own files are read and written meanwhile.

        Raises ReftEdgeError if the folder cannot be written, now or inside.
        """
        from reft_edge.shipping.locking import locked

        try:
            with locked(self.own_folder()):
                yield
        except OSError as error:
            raise ReftEdgeError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    def own_folder(self, *parts: str) -> Path:
        """A folder of this store's own, made if it is not there. Raises OSError, and ReftEdgeError if it is a link."""
        folder = self._hidden.joinpath(*parts)
        for own in {self._hidden, folder}:
            if own.is_symlink():
                raise ReftEdgeError(f"{own} is a link, which no folder of a store's own is; remove it")
        make_folder(folder)
        return folder

    def remove_old_parts(self) -> None:
        """Those that earlier versions of reft-edge left among the versions; hold the lock."""
        for folder in os.scandir(self._hidden):
            if folder.is_dir(follow_symlinks=False):
                for file in self._files(folder.name):
                    if file.suffix == ".part" and folder.name != ".parts":
                        file.unlink()

    def install(self, release: Release, content: bytes) -> None:
        """Make a release's file the installed one; hold the lock, and have its content checked.

        Raises ReftEdgeError if it is not the release's, or cannot be written: what was installed stays.
        """
        if digest_of(content) != release.digest:
            raise ReftEdgeError(f"{release} has another digest than {release.digest}")
        state = self.state(release.name)
        if (state.digest, state.version) != (release.digest, release.version):
            mode = self._keep_foreign(state)
            for kept in state.undone:
                kept.path.unlink()
            if state.digest != release.digest:
                replace_file(self.path(release.name), content, self._new(release.name))
                mode = PUBLIC
            self._keep(release.name, release.version, content, mode)
        self.tidy(release.name)

    def rollback(self, name: str, version: int | None = None) -> tuple[State, Kept]:
        """Install the version before the installed one, or another that is kept; gives what was, and what is now.

        Raises ReftEdgeError if there is none, its file was damaged, or there is no such folder.
        """
        check_name(name)
        self._check_folder()
        with self.changing():
            before = self.state(name)
            if not before.history:
                raise ReftEdgeError(f"{self.folder} keeps no earlier version of {name}")
            self._keep_foreign(before)
            target = self._target(before, version)
            with open_regular(target.path, follow=False) as file:
                content, mode = file.read(MAX_FILE + 1), _mode(file)
            if digest_of(content) != target.digest:
                raise ReftEdgeError(f"{target.path} was damaged; version {target.version} cannot be restored")
            parse_stored(content, str(target.path)).adapter()
            replace_file(self.path(name), content, self._new(name), mode)
            self.tidy(name)
        return before, target

    def tidy(self, name: str) -> None:
        """Remove what an interrupted change left, repeated versions, and the oldest beyond KEEP; hold the lock."""
        state = self.state(name)
        for file in self._files(name):
            if file.name == "new" or not _is_plain(file):
                file.unlink()
        last = {kept.digest: kept for kept in state.history}
        for kept in state.history:
            if last[kept.digest] != kept:
                kept.path.unlink()
        for kept in sorted(last.values(), key=lambda entry: entry.order)[:-KEEP]:
            if kept != state.installed:
                kept.path.unlink()

    def _check_folder(self) -> None:
        if not self.folder.is_dir():
            raise ReftEdgeError(f"there is no folder {self.folder}")

    def _target(self, state: State, version: int | None) -> Kept:
        if version is None:
            if not state.earlier:
                raise ReftEdgeError(
                    f"{self.folder} keeps no version of {state.name} from before the installed one"
                )
            return state.earlier[0]
        for kept in reversed(state.history):
            if kept.version == version:
                return kept
        known = ", ".join(str(kept.version) for kept in state.history)
        raise ReftEdgeError(
            f"{self.folder} does not keep version {version} of {state.name}; it keeps {known}"
        )

    def _holds(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()

    def _keep_foreign(self, state: State) -> int:
        """A file that was put there by hand becomes version 0, so that it can be had again. Gives the file's permissions,
        beyond which no copy of it goes."""
        with _opened(self.path(state.name)) as file:
            if file is None:
                return PUBLIC
            mode = _mode(file)
            if state.installed is None and os.fstat(file.fileno()).st_size <= MAX_FILE:
                self._keep(state.name, 0, file.read(MAX_FILE), mode)
            return mode

    def _keep(self, name: str, version: int, content: bytes, mode: int) -> None:
        history = self.state(name).history
        order = history[-1].order + 1 if history else 1
        digest = digest_of(content).removeprefix("sha256:")
        path = self._hidden / name / f"{order:06}-{version}-{digest}{SUFFIX}"
        replace_file(path, content, self._new(name), mode)

    def _new(self, name: str) -> Path:
        return self.own_folder(name) / "new"

    def _files(self, name: str) -> list[Path]:
        """What is kept of a name, folders left out."""
        folder = self._hidden / name
        if folder.is_symlink() or self._hidden.is_symlink() or not folder.is_dir():
            return []
        return [Path(entry.path) for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """A plain file, opened once; None for what is missing, a link, or no file. Raises OSError for one that cannot be read."""
    if not _is_plain(path):
        yield None
        return
    with open_regular(path, follow=False) as file:
        yield file


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _mode(file: BinaryIO) -> int:
    return stat.S_IMODE(os.fstat(file.fileno()).st_mode) & PUBLIC


def digest_of_file(file: BinaryIO) -> str:
    """Of an open file's content, read in pieces from where it stands."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"
