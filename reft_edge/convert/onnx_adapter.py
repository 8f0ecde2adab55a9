"""From `.onnx_adapter` files that `reft-edge pack` wrote: they hold folded edits, so the result is NoDiReFT, or RED."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import ACTS, Edit, Gate, LayerEdit, scale
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.linear import fold, unfold
from reft_edge.adapter.positions import UNLIMITED, Span
from reft_edge.errors import ReftEdgeError
from reft_edge.files import name_to_store, open_regular, write_atomically
from reft_edge.model.manifest import Manifest, load_manifest
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.onnx_runtime import HOST_TYPES, import_onnxruntime, ort_value

_GATES = ("first", "last", "after", "scale")
_SKIPS = ("skip_first", "skip_last")
_MAX_SIZE = 1 << 30
_MAX_GATES = 1 << 12
_BFLOAT16 = 16
_WHOLE = (".first", ".last", ".after", ".skip_first", ".skip_last", ".columns", ".acts", ".s_columns")
"""Inputs that count tokens or gates."""


def from_onnx_adapter(path: Path, manifest: Manifest, raw: bool) -> Adapter:
    """The adapter packed for the folder that `manifest` describes.

    ONNX Runtime checks every tensor's size against the file. Raises ReftEdgeError for a malformed file, one
    that is no packed ReFT adapter, or one for other ports.
    """
    inputs = _read(path)
    gates = _gates(path, inputs)
    places = {}
    for place in manifest.places:
        if f"{place.port}.A" in inputs:
            size = inputs[f"{place.port}.A"].shape
            rank = size[2] if len(size) == 3 else -1
            a, b, back, columns = (
                _take(path, inputs, f"{place.port}.{name}", shape)
                for name, shape in (
                    ("A", (1, manifest.hidden_size, rank)),
                    ("b", (1, 1, rank)),
                    ("B", (1, rank, manifest.hidden_size)),
                    ("columns", (rank,)),
                )
            )
            _check_gates(path, f"{place.port}.columns", columns, len(gates))
            a, b, back = (part.astype(np.float32) for part in (a[0], b[0, 0], back[0]))
            part = LayerEdit(a, b, back, columns, _acts(path, inputs, place.port, rank))
            places[place] = _with_diagonal(path, inputs, place.port, part, len(gates))
    if inputs:
        raise ReftEdgeError(
            f"{path} has inputs that are no ports of this folder: {', '.join(sorted(inputs))[:200]}; "
            "give the folder that it was packed for"
        )
    if not all(np.isfinite(array).all() for part in places.values() for array in part.arrays):
        raise ReftEdgeError(f"{path} holds NaN or infinity")
    base = Base(manifest.base_name, manifest.base_fingerprint, manifest.hidden_size, manifest.num_layers)
    training = {"converted": {"from": "onnx_adapter", "name": name_to_store(path)}}
    return unfold(Edit(manifest.hidden_size, gates, places), base, "raw" if raw else "chat", training)


def _acts(path: Path, inputs: dict[str, NDArray[Any]], port: str, rank: int) -> NDArray[np.int64]:
    """Each column's activation; empty where none is given, as for ports that have none."""
    if f"{port}.acts" not in inputs:
        return np.zeros(0, np.int64)
    acts = _take(path, inputs, f"{port}.acts", (rank,)) - np.arange(rank)
    if (acts % max(rank, 1)).any() or not np.isin(acts // max(rank, 1), np.arange(len(ACTS))).all():
        raise ReftEdgeError(f"{path}: {port}.acts are no activations of its {rank} columns")
    found: NDArray[np.int64] = acts // max(rank, 1)
    return found if found.any() else found[:0]


def _with_diagonal(
    path: Path, inputs: dict[str, NDArray[Any]], port: str, part: LayerEdit, gates: int
) -> LayerEdit:
    if f"{port}.s" not in inputs:
        return part
    size = inputs[f"{port}.s"].shape
    rows = size[1] if len(size) == 3 else -1
    s = _take(path, inputs, f"{port}.s", (1, rows, len(part.A)))[0].astype(np.float32)
    columns = _take(path, inputs, f"{port}.s_columns", (rows,))
    _check_gates(path, f"{port}.s_columns", columns, gates)
    return replace(part, s=s, s_gates=columns)


def _check_gates(path: Path, name: str, columns: NDArray[Any], gates: int) -> None:
    if columns.size and not 0 <= columns.min() <= columns.max() < gates:
        raise ReftEdgeError(f"{path}: {name} points beyond its {gates} gates")


def _read(path: Path) -> dict[str, NDArray[Any]]:
    ort = import_onnxruntime()
    try:
        with open_regular(path) as file, TemporaryDirectory() as folder:
            if os.fstat(file.fileno()).st_size > _MAX_SIZE:
                raise ReftEdgeError(f"{path} has more than {_MAX_SIZE:,} bytes")
            copy = (
                Path(folder) / "adapter"
            )  # onnxruntime opens a name, which may be another file by then, or be waited for
            copy.write_bytes(file.read(_MAX_SIZE))
            values = ort.AdapterFormat.read_adapter(str(copy)).get_parameters()
            return {name: _array(value) for name, value in values.items()}
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except ReftEdgeError:
        raise
    except Exception as error:  # onnxruntime raises RuntimeError and classes of its own
        raise ReftEdgeError(f"{path} is not a usable .onnx_adapter: {str(error)[-200:]}") from error


def _array(value: Any) -> NDArray[Any]:
    if value.element_type() != _BFLOAT16:
        array: NDArray[Any] = np.array(value.numpy())
        return array
    import ctypes

    count = int(np.prod(value.shape()))
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    widened: NDArray[Any] = (bits.astype(np.uint32) << 16).view(np.float32).reshape(value.shape())
    return widened


def _gates(path: Path, inputs: dict[str, NDArray[Any]]) -> tuple[Gate, ...]:
    if missing := [name for name in _GATES if f"reft.{name}" not in inputs]:
        raise ReftEdgeError(
            f"{path} has no reft.{missing[0]}: it is not a ReFT adapter that `reft-edge pack` wrote"
        )
    count = inputs["reft.first"].size
    if count > _MAX_GATES:
        raise ReftEdgeError(f"{path} has {count:,} gates; at most {_MAX_GATES:,} are accepted")
    first, last, after, factor = (
        _take(path, inputs, f"reft.{name}", (1, 1, count)).ravel().tolist() for name in _GATES
    )
    if not np.isfinite(factor).all():
        raise ReftEdgeError(f"{path}: reft.scale holds NaN or infinity")
    skips = [
        _take(path, inputs, f"reft.{name}", (1, 1, count)).ravel().tolist()
        if f"reft.{name}" in inputs
        else [0] * count
        for name in _SKIPS
    ]
    if min([*first, *last, *after, *skips[0], *skips[1]], default=0) < 0:
        raise ReftEdgeError(f"{path}: its gates count below zero")
    return tuple(
        Gate(Span(*map(int, counts)), float(strength))
        for *counts, strength in zip(first, last, after, *skips, factor, strict=True)
    )


def _take(path: Path, inputs: dict[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if name not in inputs:
        raise ReftEdgeError(f"{path} lacks {name}")
    array = inputs.pop(name)
    if name.endswith(_WHOLE) and array.dtype.kind not in "iu":
        raise ReftEdgeError(f"{path}: {name} is {array.dtype}; expected whole numbers")
    if array.shape != shape:
        raise ReftEdgeError(f"{path}: {name} is {list(array.shape)}; expected {list(shape)}")
    return array


def pack_adapter(
    adapter_path: Path,
    folder: Path,
    output: Path,
    factor: float = 1.0,
    report: Callable[[str], None] = lambda note: None,
) -> int:
    """Write `output` for the exported `folder`; returns its size in bytes. `report` is told what a user must know.

    Raises AdapterFileError, BaseMismatchError, or ReftEdgeError if the adapter does not fit or the file cannot be written.
    """
    ort = import_onnxruntime()
    manifest = load_manifest(folder)
    adapter = load_adapter(adapter_path)
    manifest.check_base(adapter.config.base_fingerprint, str(adapter_path), adapter.config.base_name)
    if adapter.config.labels:
        raise ReftEdgeError(
            f"{adapter_path} has a classification head, which an .onnx_adapter cannot carry; "
            "run it with reft-edge"
        )
    edit = fold(adapter)
    if triggers := edit.triggers:
        raise ReftEdgeError(
            f"{adapter_path} acts {triggers[0]} on, and an .onnx_adapter cannot say this: where it acts depends on each prompt's "
            "tokens; run it with reft-edge"
        )
    inputs = port_inputs(scale(edit, factor), manifest, HOST_TYPES[manifest.float_type])
    packed = ort.AdapterFormat()
    packed.set_adapter_version(1)
    packed.set_model_version(1)
    bf16 = manifest.float_type == "bf16"
    packed.set_parameters({name: ort_value(array, bf16) for name, array in inputs.items()})
    with tempfile.TemporaryDirectory() as folder_of_one:
        temporary = Path(folder_of_one) / "packed"
        packed.export_adapter(str(temporary))
        content = temporary.read_bytes()
    write_atomically(output, content)
    if any(0 < span.after < UNLIMITED for span in adapter.config.spans):
        report(
            f"positions {adapter.config.positions} count generated tokens from the prompt's end: a runtime must feed "
            "reft.prompt_len, as examples/c/steer.c does; onnxruntime-genai does not, and edits other tokens than these"
        )
    return len(content)
