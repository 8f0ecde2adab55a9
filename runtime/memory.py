"""Memory that takes room only where it is written."""

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError


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
    base = part
    while isinstance(base.base, np.ndarray):
        base = base.base
    pages = getattr(base.base, "obj", None)
    if sys.platform != "linux" or not isinstance(pages, mmap.mmap):
        return
    begin = part.ctypes.data - base.ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (begin + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        pages.madvise(mmap.MADV_DONTNEED, first, end - first)


def _pages(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
