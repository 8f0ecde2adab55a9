"""Reading the `.bin` files of strangers: torch.save's zip format and the pickle in it, by readers of our own that run nothing."""

import math
import os
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from reft_edge.adapter.algebra import Array
from reft_edge.convert.folder import open_inside
from reft_edge.convert.torch_pickle import View, read_views
from reft_edge.convert.torch_zip import read_entries
from reft_edge.errors import ReftEdgeError

_SLACK, _SLACK_ENTRY = 1 << 16, 1 << 10
"""For what a file holds beside numbers: the pickle, and names and alignment of each tensor."""
_BFLOAT16 = "BFloat16Storage"
_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    _BFLOAT16: "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "u1",
}


def read_tensors(path: Path, limit: int, count: int = 8) -> dict[str, Array]:
    """The tensors of a state dict, as float32; whole numbers, which describe, as float32 too.

    `limit`: bytes of tensor data that the caller expects at most, in `count` tensors. The file is read once, and only if
    it is no larger than that. Raises ReftEdgeError for a file that is larger, compressed, of torch's old format, or holds
    anything but dense tensors of numbers, each with bytes of its own in the file.
    """
    try:
        with open_inside(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit + _SLACK + _SLACK_ENTRY * count:
                raise ReftEdgeError(
                    f"it has {size:,} bytes; its tensors can have {limit:,} at most, by the shapes of its adapter"
                )
            return parse_tensors(file.read(size), limit)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror or error}") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{path}: {error}") from error


def parse_tensors(content: bytes, limit: int) -> dict[str, Array]:
    """The same from a file's bytes."""
    entries = read_entries(content)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ReftEdgeError("it is not laid out as torch.save writes: expected one data.pkl")
    home = pickles[0].removesuffix("data.pkl")
    if not all(name.startswith(home) for name in entries):
        raise ReftEdgeError("it is not laid out as torch.save writes: entries are in more than one folder")
    if bytes(entries.get(f"{home}byteorder", b"little")) != b"little":
        raise ReftEdgeError(
            "it was written on a machine with another byte order; save it again on a little-endian one"
        )
    views = read_views(bytes(entries[pickles[0]]))
    _check_claims(views, min(limit, len(content)))
    place = f"{home}data/"
    storages = {name[len(place) :]: data for name, data in entries.items() if name.startswith(place)}
    return {name: _array(name, view, storages) for name, view in views.items()}


def _check_claims(views: dict[str, View], limit: int) -> None:
    taken = 0
    for name, view in views.items():
        taken += math.prod(max(size, 1) for size in view.shape) * np.dtype(_TYPES[view.storage.kind]).itemsize
        if taken > limit:
            raise ReftEdgeError(
                f"{name!r:.80} claims {list(view.shape)} numbers, more than the file holds or its shapes allow"
            )


def _array(name: str, view: View, storages: dict[str, memoryview]) -> Array:
    """One tensor's numbers, once they are known to lie within its storage and that within the file."""
    storage = view.storage
    kind = np.dtype(_TYPES[storage.kind])
    data = storages.get(storage.key)
    if data is None or len(data) != storage.count * kind.itemsize:
        raise ReftEdgeError(f"{name!r:.80} has {storage.count:,} numbers that the file does not hold")
    if 0 in view.shape:
        return np.zeros(view.shape, np.float32)
    last = view.offset + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )
    if last >= storage.count:
        raise ReftEdgeError(f"{name!r:.80} reaches beyond the numbers that the file holds for it")
    numbers = np.frombuffer(data, kind)[view.offset :]
    strides = [stride * kind.itemsize for stride in view.strides]
    found = as_strided(numbers, view.shape, strides, writeable=False)
    if storage.kind == _BFLOAT16:
        return (found.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.array(found, np.float32, order="C")
