"""One writer at a time in a folder."""

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

    Raises ReftEdgeError if another process keeps it too long.
    """
    try:
        with FileLock(folder / ".lock", timeout=PATIENCE):
            yield
    except Timeout as error:
        raise ReftEdgeError(
            f"another process has been writing to {folder} for {PATIENCE:,.0f} s; try again when it is done"
        ) from error
