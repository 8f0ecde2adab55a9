"""An exported graph whose ports are plain inputs, for execution providers that take an input with a default for a constant.

ONNX Runtime's own providers use a port's default where a request has no value for it. Providers that compile a graph as a
whole, such as OpenVINO's, cannot. They get the graph without the defaults, and every request then brings them.

"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.onnx_file import BYTES, bytes_field, read_fields, read_number, read_numbers, read_text

_GRAPH = 7
_INITIALIZER = 5
_PORTS = "reft."
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
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
        fields = list(read_fields(content))
        graph = next(content[start:end] for number, _, start, end in fields if number == _GRAPH)
        kept, defaults = _without_defaults(graph)
        model = b"".join(
            bytes_field(_GRAPH, kept) if number == _GRAPH else content[begin:end]
            for number, begin, _, end in fields
        )
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except (IndexError, KeyError, StopIteration, ValueError) as error:
        raise ReftEdgeError(f"cannot read the graph in {path}: it is no whole ONNX model") from error
    return model, defaults


def _without_defaults(graph: bytes) -> tuple[bytes, Defaults]:
    kept, defaults = [], {}
    for number, begin, start, end in read_fields(graph):
        tensor = graph[start:end] if number == _INITIALIZER else b""
        if tensor and (name := read_text(tensor, _NAME)).startswith(_PORTS):
            defaults[name] = _array(tensor)
        else:
            kept.append(graph[begin:end])
    return b"".join(kept), defaults


def _array(tensor: bytes) -> NDArray[np.generic]:
    dims: list[int] = []
    kind, raw = 0, b""
    for number, begin, start, end in read_fields(tensor):
        packed = tensor[begin] & 7 == BYTES
        if number == _DIMS:
            dims += read_numbers(tensor[start:end]) if packed else [read_number(tensor, start)[0]]
        elif number == _TYPE:
            kind = read_number(tensor, start)[0]
        elif number == _RAW:
            raw = tensor[start:end]
    found = np.frombuffer(raw, _TYPES[kind]).reshape(dims)
    if kind == 16:
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found
