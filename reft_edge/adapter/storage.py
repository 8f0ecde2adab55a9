"""How an adapter's tensors are stored: whole, in half precision, or in eight bits.

    fp32   every tensor as F32
    fp16   rows of hidden size (the tensors R, W, W1, W2, v, s and head.weight) as F16, rounded to nearest; the rest as F32
    int8   the same rows as I8, with a tensor NAME.scale of F32, a scale a row: value = scale * integer from -127 to 127,
           where scale is the row's largest magnitude / 127; the rest as F32

Read back, all are float32. R keeps what rounding leaves of its orthonormality: it is used as stored, since the nearest
orthonormal rows are as far from those that were trained.
"""

import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from reft_edge.adapter.algebra import Array
from reft_edge.errors import AdapterFileError, ReftEdgeError

PRECISIONS = ("fp32", "fp16", "int8")
ROWS = ("R", "W", "W1", "W2", "v", "s", "head.weight")
SCALE = ".scale"
_DTYPES = {"F32": 4, "F16": 2, "I8": 1}
Declared = dict[str, tuple[str, tuple[int, ...]]]
"""Name to safetensors' dtype and shape."""


def declared(shapes: Mapping[str, tuple[int, ...]], precision: str) -> Declared:
    """What a file that holds tensors of these shapes declares."""
    found: Declared = {}
    for name, shape in shapes.items():
        if precision == "fp32" or name not in ROWS:
            found[name] = ("F32", shape)
        elif precision == "fp16":
            found[name] = ("F16", shape)
        else:
            found[name] = ("I8", shape)
            found[name + SCALE] = ("F32", shape[:-1])
    return found


def data_bytes(tensors: Declared) -> int:
    """Bytes of tensor data."""
    return sum(_DTYPES[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def encode(tensors: Mapping[str, Array], precision: str) -> dict[str, NDArray[np.generic]]:
    """Tensors as they are stored. Raises ReftEdgeError for values that fp16 cannot hold."""
    found: dict[str, NDArray[np.generic]] = {}
    for name, tensor in tensors.items():
        if precision == "fp32" or name not in ROWS:
            found[name] = np.ascontiguousarray(tensor)
        elif precision == "fp16":
            with np.errstate(over="ignore"):
                found[name] = half = tensor.astype(np.float16)
            if not np.isfinite(half).all():
                raise ReftEdgeError(
                    f"tensor {name} holds values up to {np.abs(tensor).max():.3g}, and fp16 ends at 65,504; "
                    "store it as int8 or fp32"
                )
        else:
            scale = (np.abs(tensor).max(axis=-1) / 127).astype(np.float32)
            steps = tensor / np.where(scale > 0, scale, 1)[..., None]
            found[name] = np.clip(np.rint(steps), -127, 127).astype(np.int8)
            found[name + SCALE] = scale
    return found


def decode(stored: Mapping[str, NDArray[np.generic]]) -> dict[str, Array]:
    """Tensors in float32. Raises AdapterFileError for a scale that is negative or not finite."""
    found: dict[str, Array] = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == np.int8:
            scale = np.asarray(stored[name + SCALE], np.float32)
            if not np.isfinite(scale).all() or (scale < 0).any():
                raise AdapterFileError(
                    f"tensor {name}{SCALE} holds what is no scale: NaN, infinity or less than 0"
                )
            with np.errstate(over="ignore"):
                found[name] = np.multiply(tensor, scale[..., None], dtype=np.float32)
        else:
            found[name] = tensor.astype(np.float32, copy=False)
    return found


def serialise(tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: the library itself writes metadata in random order."""
    content = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole: bytes = len(text).to_bytes(8, "little") + text + content[end:]
    return whole
