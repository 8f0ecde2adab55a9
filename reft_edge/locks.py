"""A file that one process at a time holds; the system lets go of it when the process ends, however it ends."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reft_edge.errors import ReftEdgeError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks say."""

if sys.platform == "win32":
    import msvcrt

    def lock(handle: int) -> None:
        """Lock an open file until it is closed. Raises BlockingIOError if another holds it."""
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error

else:
    import fcntl

    def lock(handle: int) -> None:
        """Lock an open file or folder until it is closed. Raises BlockingIOError if another holds it."""
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def held(path: Path, busy: str) -> Iterator[bool]:
    """Hold the lock file `path` inside the block; gives whether the file system has locks at all.

    The file is made, and removed at the end. One that a killed process left behind is held by nobody and is taken over.
    Raises ReftEdgeError at once: `busy`, if another process or another block of this one holds it, or why it cannot be made.
    """
    try:
        handle = _acquire(path)
    except BlockingIOError as error:
        raise ReftEdgeError(busy) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ReftEdgeError(f"cannot make the lock file {path}: {error.strerror}") from error
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _release(path, handle)


def _acquire(path: Path) -> int:
    while True:
        handle = _open(path)
        try:
            lock(handle)
            with suppress(FileNotFoundError):
                # the one who held it before may have removed the name since it was opened here
                if os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(path: Path) -> int:
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(path, flags | os.O_RDWR, 0o666)
    except PermissionError:  # another user's, left behind
        return os.open(path, flags | os.O_RDONLY, 0o666)


def _release(path: Path, handle: int) -> None:
    with suppress(OSError):
        if sys.platform != "win32" and os.path.samestat(os.fstat(handle), os.stat(path)):
            path.unlink()
    os.close(handle)
    if sys.platform == "win32":
        with suppress(OSError):  # where another one opened it meanwhile
            path.unlink()
