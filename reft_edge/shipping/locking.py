"""One writer at a time in a folder, one download at a time of a file."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reft_edge.errors import ReftEdgeError

PATIENCE = 600.0
"""Seconds to wait for another process."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, the file `.lock`, which the system releases when a process ends, however it ends.

    Raises ReftEdgeError if another process keeps it too long, or something else than such a file has its name.
    """
    lock = _lock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise ReftEdgeError(
            f"another process has been writing to {folder} for {PATIENCE:,.0f} s; try again when it is done"
        ) from error
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path) -> FileLock | None:
    """Take the lock that is the file `path`, to be released by the caller; None if another process, or thread, has it.

    Raises ReftEdgeError if something else has that name.
    """
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _lock(path: Path) -> FileLock:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return FileLock(path)
    if not stat.S_ISREG(mode):
        raise ReftEdgeError(f"{path} is no plain file, as the lock of a folder is; remove it")
    return FileLock(path)
