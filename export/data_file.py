"""The file that holds a graph's weights, written one after the other as they are computed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from reft_edge.export.deferred import DeferredTensor

_PAGE, _LINE = 4096, 64


class DataFile:
    """Tensors are appended; what was written never stays in memory."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """`file` is open for writing at `path`."""
        self._path, self._file = path, file

    def append(
        self, name: str, dtype: ir.DataType, shape: Iterable[int], pieces: Iterable[NDArray[Any]]
    ) -> ir.ExternalTensor:
        """Write a tensor, whose content comes in pieces; returns where it is."""
        dimensions = ir.Shape(list(shape))
        size = int(np.prod([int(count) for count in dimensions.numpy()], dtype=np.int64)) * dtype.itemsize
        step = _PAGE if size >= _PAGE else _LINE
        start = -(-self._file.tell() // step) * step
        self._file.write(bytes(start - self._file.tell()))
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        length = self._file.tell() - start
        assert length == size, f"{name}: {length} bytes instead of {size}"
        return ir.ExternalTensor(
            self._path.name, start, length, dtype, shape=dimensions, name=name, base_dir=self._path.parent
        )

    def keep(self, value: ir.Value) -> None:
        """Write a stored value's content, if it is not in a file yet."""
        stored = value.const_value
        if stored is None or isinstance(stored, ir.ExternalTensor):
            return
        parts = stored.pieces() if isinstance(stored, DeferredTensor) else [stored]
        pieces = (np.frombuffer(part.tobytes(), np.uint8) for part in parts)
        value.const_value = self.append(str(value.name), stored.dtype, stored.shape.numpy(), pieces)
