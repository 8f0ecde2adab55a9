"""Memory that takes room only where it is written."""

import math
import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError

CAN_GIVE_BACK = sys.platform == "linux"
"""Whether `give_back` does something."""
_MUCH = 8 << 20
"""Bytes."""
_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, since 5.14, which Python's mmap does not name."""


class NoMemoryError(ReftEdgeError):
    """There is no memory for what one request needs; others go on."""


def sparse_zeros(shape: Sequence[int], dtype: Any) -> NDArray[np.generic]:
    """An array of zeros. Pages of a few kB become resident one by one, when something is written there, and all of them
    are given back to the system with the array: numpy's own arrays ask for pages of 2 MB, of which a row's first tokens
    touch every one. Raises NoMemoryError.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size == 0:
        return np.zeros(shape, kind)
    try:
        return np.frombuffer(_pages(size), kind, math.prod(shape)).reshape(shape)
    except (OSError, OverflowError, ValueError, MemoryError) as error:
        raise NoMemoryError(
            f"there is no memory for {size / 1e6:,.0f} MB of keys and values; "
            "ask for fewer tokens, run fewer requests at once, or free some memory"
        ) from error


def give_back(part: NDArray[np.generic]) -> None:
    """Have a contiguous part of what `sparse_zeros` made take no memory until it is written again; its content is lost.

    Where the system cannot do that, nothing changes.
    """
    pages, begin = _place(part)
    if sys.platform != "linux" or pages is None:
        return
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (begin + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        pages.madvise(mmap.MADV_DONTNEED, first, end - first)


def fill(targets: Sequence[NDArray[np.generic]], sources: Sequence[NDArray[np.generic]]) -> None:
    """Copy arrays `[heads, tokens, size]` to the start of others that `sparse_zeros` made, of more tokens. Where that is much,
    the system is asked for the memory at once rather than page by page, and two threads share the work."""

    def copy(target: NDArray[np.generic], source: NDArray[np.generic]) -> None:
        part = target[:, : source.shape[1]]
        for head in part:
            _make_resident(head)
        part[...] = source

    if sum(source.nbytes for source in sources) < _MUCH:
        for target, source in zip(targets, sources, strict=True):
            target[:, : source.shape[1]] = source
        return
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(copy, targets, sources))


def _make_resident(part: NDArray[np.generic]) -> None:
    """Have a contiguous part of what `sparse_zeros` made take its memory now, where the system can be told so."""
    pages, begin = _place(part)
    if sys.platform == "linux" and pages is not None:
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(begin + part.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        with suppress(OSError, ValueError):
            pages.madvise(_POPULATE_WRITE, first, min(end, len(pages)) - first)


def _place(part: NDArray[np.generic]) -> tuple[mmap.mmap | None, int]:
    """The memory of what `sparse_zeros` made, and at which byte of it a part begins."""
    base = part
    while isinstance(base.base, np.ndarray):
        base = base.base
    pages = getattr(base.base, "obj", None)
    if not isinstance(pages, mmap.mmap):
        return None, 0
    return pages, part.ctypes.data - base.ctypes.data


def _pages(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
