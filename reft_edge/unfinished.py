"""Files and folders that are still being written: how they are called, and what becomes of those of killed processes.

A writer holds a lock on what it writes; the system lets go of it when the process ends, whatever ended it. So what has
such a name and no lock on it is nobody's, and whoever writes in the same folder next removes it.
"""

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_edge.locks import lock

PREFIX = ".reft-edge-unfinished-"
_JUST_MADE = 60
"""Seconds that a writer has between making a file and locking it."""
_FORGOTTEN = 24 * 60 * 60
"""Seconds after which something is nobody's where there are no locks."""


def unfinished(folder: Path) -> Path:
    """A free name in a folder for what is still being written; what killed processes left there is removed first.

    Raises OSError if the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
    for path in left:
        if _abandoned(path):
            remove(path)
    return folder / f"{PREFIX}{secrets.token_hex(8)}"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file or folder inside the block, so that nobody takes it for abandoned."""
    handle = None if sys.platform == "win32" else os.open(path, os.O_RDONLY)
    try:
        if handle is not None:
            _lock(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink()
    except OSError:
        return


def _abandoned(path: Path) -> bool:
    try:
        age = time.time() - path.lstat().st_mtime
        if sys.platform == "win32":
            return age > _FORGOTTEN
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        free = _lock(handle)
    finally:
        os.close(handle)
    return age > _FORGOTTEN if free is None else free and age > _JUST_MADE


def _lock(handle: int) -> bool | None:
    """Whether the lock was free and is now held; None where there are no locks."""
    try:
        lock(handle)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
