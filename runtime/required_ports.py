"""An exported graph whose ports are plain inputs, for execution providers that take an input with a default for a constant.

ONNX Runtime's own providers use a port's default where a request has no value for it. Providers that compile a graph as a
whole, such as OpenVINO's, cannot. They get the graph without the defaults, and every request then brings them.

The file is read as protobuf's wire format, field by field, since a device has no package that knows ONNX files.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError

_GRAPH = 7
_INITIALIZER = 5
_PORTS = "reft."
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
_BYTES = 2
"""The wire type of texts, messages and packed numbers."""
_TYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype(np.float32),
    7: np.dtype(np.int64),
    10: np.dtype(np.float16),
    16: np.dtype(np.uint16),
}

Defaults = dict[str, NDArray[np.generic]]


def require_ports(path: Path) -> tuple[bytes, Defaults]:
    """The graph in this file without the defaults of its ports, and these defaults by name; bfloat16 as float32.

    Raises ReftEdgeError if the file cannot be read or is no ONNX model.
    """
    try:
        content = path.read_bytes()
        fields = list(_fields(content))
        graph = next(content[start:end] for number, _, start, end in fields if number == _GRAPH)
        kept, defaults = _without_defaults(graph)
        model = b"".join(
            _message(_GRAPH, kept) if number == _GRAPH else content[begin:end]
            for number, begin, _, end in fields
        )
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except (IndexError, KeyError, StopIteration, ValueError) as error:
        raise ReftEdgeError(f"cannot read the graph in {path}: it is no whole ONNX model") from error
    return model, defaults


def _without_defaults(graph: bytes) -> tuple[bytes, Defaults]:
    kept, defaults = [], {}
    for number, begin, start, end in _fields(graph):
        tensor = graph[start:end] if number == _INITIALIZER else b""
        if tensor and (name := _text(tensor, _NAME)).startswith(_PORTS):
            defaults[name] = _array(tensor)
        else:
            kept.append(graph[begin:end])
    return b"".join(kept), defaults


def _array(tensor: bytes) -> NDArray[np.generic]:
    dims: list[int] = []
    kind, raw = 0, b""
    for number, begin, start, end in _fields(tensor):
        packed = tensor[begin] & 7 == _BYTES
        if number == _DIMS:
            dims += _numbers(tensor[start:end]) if packed else [_number(tensor, start)[0]]
        elif number == _TYPE:
            kind = _number(tensor, start)[0]
        elif number == _RAW:
            raw = tensor[start:end]
    found = np.frombuffer(raw, _TYPES[kind]).reshape(dims)
    if kind == 16:
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found


def _text(message: bytes, field: int) -> str:
    return next(message[start:end].decode() for number, _, start, end in _fields(message) if number == field)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Number of every field, where it begins, and where its value starts and ends."""
    at = 0
    while at < len(message):
        key, start = _number(message, at)
        if key & 7 == _BYTES:
            size, start = _number(message, start)
            end = start + size
        elif key & 7 == 0:
            end = _number(message, start)[1]
        else:
            end = start + {1: 8, 5: 4}[key & 7]
        if end > len(message):
            raise ValueError("a field ends after its message")
        yield key >> 3, at, start, end
        at = end


def _numbers(packed: bytes) -> list[int]:
    at, found = 0, []
    while at < len(packed):
        number, at = _number(packed, at)
        found.append(number)
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
