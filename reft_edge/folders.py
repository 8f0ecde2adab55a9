"""Folders written so that whatever happens, the old one or the new one is in place."""

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.unfinished import held, remove, unfinished

_SWAPS = {"linux": ("renameat2", -100), "darwin": ("renameatx_np", -2)}
"""The C library's function that swaps two names, and its number for the current folder."""
_SWAP = 2


@contextmanager
def replace_folder(target: Path, marker: str) -> Iterator[Path]:
    """Give an empty temporary folder that becomes `target` when the block succeeds and vanishes when it fails.

    An existing `target` is only replaced if it is empty or holds the file `marker`, so that a mistyped
    output path cannot delete somebody's files; the new one gets its mode. Of a link, what it points to is replaced.
    Raises ReftEdgeError otherwise, and for a full disk. What killed processes left beside it is removed.
    """
    restore_folder(target)
    target = Path(os.path.realpath(target))
    check_target(target, marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReftEdgeError(f"cannot make {target.parent}: {error.strerror}; choose another place") from error
    with scratch_folder(target.parent) as temporary:
        try:
            yield temporary
        except Exception as error:
            if _is_full(error):
                raise ReftEdgeError(f"cannot write {target}: the disk is full") from error
            raise
        _take_place(temporary, target)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` for the block, removed at its end; if the process is killed, by whoever works there next.

    Raises ReftEdgeError if it cannot be made.
    """
    try:
        folder = unfinished(parent)
        folder.mkdir()
    except OSError as error:
        raise ReftEdgeError(f"cannot write in {parent}: {error.strerror}; choose another place") from error
    with held(folder):
        try:
            yield folder
        finally:
            remove(folder)


def restore_folder(target: Path) -> None:
    """Put back what a killed `replace_folder` had moved out of the way, where there was no swapping in one step.

    Raises ReftEdgeError if that fails.
    """
    target = Path(os.path.realpath(target))
    old = _moved(target)
    if not old.is_dir():
        return
    if target.is_dir():
        remove(old)
        return
    try:
        os.replace(old, target)
    except OSError as error:
        raise ReftEdgeError(f"cannot rename {old}, the folder that was {target}: {error.strerror}") from error


def check_target(target: Path, marker: str) -> None:
    """Raise ReftEdgeError if `replace_folder` would refuse this target: for callers who work long before they write."""
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise ReftEdgeError(f"{target} is a file; give a folder")
    try:
        used = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise ReftEdgeError(f"cannot read {target}: {error.strerror}; give another folder") from error
    if used and not (target / marker).is_file():
        raise ReftEdgeError(
            f"{target} is not empty and was not written by reft-edge; give another folder or empty it"
        )
    if os.path.ismount(target):
        raise ReftEdgeError(
            f"{target} is where a disk is mounted, which cannot be replaced; give a folder inside"
        )


def _take_place(temporary: Path, target: Path) -> None:
    try:
        if not target.is_dir():
            os.replace(temporary, target)
            return
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        if not _swap(temporary, target):
            _replace_in_two_steps(temporary, target)
    except OSError as error:
        raise ReftEdgeError(
            f"cannot replace {target}: {error.strerror}; close what uses it, or give another folder"
        ) from error


def _swap(a: Path, b: Path) -> bool:
    """Swap two folders in one step: there is no moment without one. False where the system cannot."""
    import ctypes

    name, here = _SWAPS.get(sys.platform, ("", 0))
    swap = getattr(ctypes.CDLL(None), name, None) if name else None
    return swap is not None and swap(here, os.fsencode(a), here, os.fsencode(b), _SWAP) == 0


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    """A process that is killed between them leaves the old folder where `restore_folder` finds it."""
    old = _moved(target)
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    remove(old)


def _moved(target: Path) -> Path:
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.parent / f".reft-edge-replaced-{name}"


def _is_full(error: BaseException | None) -> bool:
    """Whether this error, or what it came from, says that the disk is full: libraries raise it in many shapes."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False
