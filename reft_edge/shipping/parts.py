"""Downloads under way in a store: what has arrived waits for the next pull, as long as that asks for it.

STORE/.reft-edge/.parts/ADDRESS-HEX.part    of the release whose SHA-256 is HEX; ADDRESS stands for the repository
STORE/.reft-edge/.parts/ADDRESS-HEX.lock    held by the process that is downloading it

The lock is taken, and both files are removed, by those alone who hold the store's lock; nobody holds that while waiting for a
server.
"""

import hashlib
import os
import stat
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from reft_edge.adapter.file import StoredAdapter, read_whole
from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.locking import try_lock
from reft_edge.shipping.release import Release
from reft_edge.shipping.store import DeviceStore

AGE = 7 * 24 * 3600
"""Seconds that a part of another repository than the one pulled from is kept."""

_PIECE = 1 << 20


class Part:
    """A file that this process alone downloads to: a plain one of its own, opened once. Raises ReftEdgeError for what
    cannot be written; the room that it took is then free again."""

    def __init__(self, path: Path, lock: FileLock, place: Path) -> None:
        """`place`: the store, for messages."""
        self._path, self._lock, self._place = path, lock, place
        with self._writing():
            self._file = os.fdopen(_open_own(path), "r+b", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def add(self, piece: bytes) -> None:
        rest = memoryview(piece)
        try:
            with self._writing():
                self._file.seek(self.size)
                while rest:
                    count = self._file.write(rest)
                    self.size += count
                    rest = rest[count:]
        except ReftEdgeError:
            self.cut(0)
            raise

    def cut(self, size: int) -> None:
        """Forget what is beyond `size` bytes."""
        with self._writing():
            self._file.truncate(size)
        self.size = size

    def flush(self) -> None:
        """To disk."""
        with self._writing():
            os.fsync(self._file.fileno())

    def read(self, name: str) -> tuple[bytes, StoredAdapter]:
        """What has arrived, and the adapter that it is, as `read_whole` reads it."""
        return read_whole(self._file, name)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        self._file.seek(0)
        while block := self._file.read(_PIECE):
            digest.update(block)
        return f"sha256:{digest.hexdigest()}"

    def put_away(self) -> None:
        """Let others have it; hold the store's lock. An empty one is removed."""
        self._file.close()
        if self.size == 0:
            self._path.unlink(missing_ok=True)
        self.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def release(self) -> None:
        """Only that."""
        self._file.close()
        self._lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReftEdgeError(f"cannot write to {self._place}: {error.strerror or error}") from error


class Parts:
    """Those of one repository's releases in a store. Hold the store's lock for everything."""

    def __init__(self, store: DeviceStore, address: str) -> None:
        self._store = store
        self._prefix = hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()[:16]

    def take(self, release: Release) -> Part | None:
        """The release's part, empty or begun; None if another process has it."""
        path = self._path(release.hex_digest)
        lock = try_lock(path.with_suffix(".lock"))
        if lock is None:
            return None
        try:
            return Part(path, lock, self._store.folder)
        except BaseException:
            lock.release()
            raise

    def drop(self, release: Release) -> None:
        """Remove what there is of a release that is not going to be downloaded."""
        _remove(self._path(release.hex_digest))

    def sweep(self, wanted: Collection[Release], max_bytes: int) -> None:
        """Remove the parts that nobody asks for: this repository's of other releases than the wanted ones or beyond
        `max_bytes`, others' that are older than AGE, and those of earlier versions of reft-edge. What another process is
        downloading stays."""
        left = max_bytes
        asked = {self._path(release.hex_digest).name for release in wanted}
        for entry in os.scandir(self._store.own_folder(".parts")):
            if entry.is_dir(follow_symlinks=False):
                continue
            path = Path(entry.path).with_suffix(".part")
            if entry.name.startswith(f"{self._prefix}-"):
                left -= entry.stat(follow_symlinks=False).st_size
                stays = path.name in asked and left >= 0
            else:
                stays = time.time() - entry.stat(follow_symlinks=False).st_mtime <= AGE
            if not stays:
                _remove(path)
        self._store.remove_old_parts()

    def _path(self, digest: str) -> Path:
        return self._store.own_folder(".parts") / f"{self._prefix}-{digest}.part"


def _remove(path: Path) -> None:
    lock = path.with_suffix(".lock")
    if not (os.path.lexists(path) or os.path.lexists(lock)) or (held := try_lock(lock)) is None:
        return
    try:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
    finally:
        held.release()
        lock.unlink(missing_ok=True)


def _open_own(path: Path) -> int:
    """A descriptor of a plain file with no other name and no other owner; anything else that has its name is removed first."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    if os.path.lexists(path) and not _is_own(path.lstat()):
        if path.is_dir() and not path.is_symlink():
            raise ReftEdgeError(f"{path} is a folder, which no download is; remove it")
        path.unlink()
        flags |= os.O_EXCL
    handle = os.open(path, flags, 0o600)
    if not _is_own(os.fstat(handle)):
        os.close(handle)
        raise ReftEdgeError(f"{path} was changed by somebody else while it was opened; try again")
    return handle


def _is_own(found: os.stat_result) -> bool:
    own = sys.platform == "win32" or found.st_uid == os.geteuid()
    return own and stat.S_ISREG(found.st_mode) and found.st_nlink == 1
