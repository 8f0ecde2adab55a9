"""Finished work whose place cannot be written any more: where it goes, and what is said."""

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from reft_edge.errors import ReftEdgeError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: a full disk, or a used-up quota."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _FULL


def written_elsewhere(write: Callable[[Path], None], name: str) -> Path | None:
    """The file `name` in a new folder of the system's temporary folder, of the home or of the working folder.

    `write` raises ReftEdgeError where it cannot write. None if it can nowhere.
    """
    for folder in _places():
        try:
            made = Path(tempfile.mkdtemp(prefix="reft-edge-", dir=folder))
        except OSError:
            continue
        try:
            write(made / name)
        except ReftEdgeError:
            with suppress(OSError):
                made.rmdir()
            continue
        return made / name
    return None


def _places() -> Iterator[Path]:
    with suppress(OSError):
        yield Path(tempfile.gettempdir())
    with suppress(RuntimeError):
        yield Path.home()
    with suppress(OSError):
        yield Path.cwd()
