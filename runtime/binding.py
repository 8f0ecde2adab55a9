"""From edits to the inputs of a graph's ports."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Array, Edit
from reft_edge.adapter.positions import UNLIMITED
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.model.places import Place

PortInputs = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Bound:
    """An adapter choice, ready to run: port inputs for the prompt, on the device, and what acts on generated tokens."""

    prompt: dict[str, Any]
    decode: "DecodeEdit"
    """On the first generated token, and on others up to the first of `ends`."""
    edit: Edit | None = None
    """None where nothing acts."""

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """After how many generated tokens something stops acting, ascending."""
        gates = () if self.edit is None else self.edit.gates
        return tuple(sorted({gate.span.after for gate in gates if gate.scale != 0} - {0, UNLIMITED}))


def port_inputs(edit: Edit, manifest: Manifest, dtype: np.dtype[np.generic]) -> PortInputs:
    """The edit as port inputs with adapter_batch 1, floats in the graph's `dtype`.

    Raises ReftEdgeError if the edit is for another hidden size, a place without a port or positions that the graph does not know, or `dtype`
    cannot hold it.
    """
    if edit.hidden_size != manifest.hidden_size:
        raise ReftEdgeError(
            f"the adapter edits hidden states of size {edit.hidden_size}; "
            f"this model's have {manifest.hidden_size}"
        )
    if unported := sorted(edit.places.keys() - set(manifest.places)):
        raise ReftEdgeError(
            f"the adapter edits layers {', '.join(map(str, unported))}, which have no port in this folder; "
            "export the model again with --layers and --components that cover them"
        )

    def per_gate(numbers: list[float], kind: np.dtype[np.generic]) -> NDArray[np.generic]:
        return np.array(numbers, kind).reshape(1, 1, -1)

    int64 = np.dtype(np.int64)
    skips = {name: [getattr(gate.span, name) for gate in edit.gates] for name in ("skip_first", "skip_last")}
    left_out = {f"reft.{name}": per_gate(counts, int64) for name, counts in skips.items() if any(counts)}
    if missing := sorted(left_out.keys() - set(manifest.ports)):
        raise ReftEdgeError(
            f"the adapter leaves out tokens of the prompt (positions such as all-f1), for which this folder has no {missing[0]}; "
            "export the model again"
        )
    inputs: PortInputs = left_out | {
        "reft.first": per_gate([gate.span.first for gate in edit.gates], int64),
        "reft.last": per_gate([gate.span.last for gate in edit.gates], int64),
        "reft.after": per_gate([gate.span.after for gate in edit.gates], int64),
        "reft.scale": per_gate([gate.scale for gate in edit.gates], np.dtype(np.float32)),
    }
    for place, part in edit.places.items():
        name = place.port
        inputs[f"{name}.A"] = part.A[None]
        inputs[f"{name}.b"] = part.b[None, None]
        inputs[f"{name}.B"] = part.B[None]
    inputs = {name: array if array.dtype == int64 else _held(array, dtype) for name, array in inputs.items()}
    columns = {
        f"{place.port}.columns": np.ascontiguousarray(part.gates, np.int64)
        for place, part in edit.places.items()
    }
    return inputs | columns


def _held(array: NDArray[np.generic], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if not np.isfinite(found).all():
        raise ReftEdgeError(
            f"the adapter holds values up to {np.abs(array.astype(np.float64)).max():.3g}, which are not finite in this folder's {dtype.name}; "
            "give a smaller scale, or export the model as fp32"
        )
    return found


DecodeEdit = dict[Place, tuple[Array, Array, Array]]
"""What of an edit acts on generated tokens: A `[d, r]`, b `[r]` and B `[r, d]`, scaled, by place."""
_RANKS = 16
"""Ranks are padded to a multiple of this, so that a row's sums do not depend on its neighbours' ranks."""


def decode_edit(edit: Edit, before: int = 0) -> DecodeEdit:
    """The columns that are open on the generated token that has `before` others before it, their scales multiplied into B;
    empty if there are none. Arrays are the edit's own where all columns are open, and B where all scales are 1.

    Raises ReftEdgeError if a scale takes weights beyond float32.
    """
    scales = np.array([gate.scale if gate.span.after > before else 0.0 for gate in edit.gates], np.float32)
    found: DecodeEdit = {}
    for place, part in edit.places.items():
        strength = scales[part.gates]
        if (columns := np.flatnonzero(strength)).size:
            a, b, back = part.A, part.b, part.B
            if columns.size < strength.size:
                a, b, back = a[:, columns], b[columns], back[columns]
            if (strength[columns] != 1).any():
                with np.errstate(over="ignore"):
                    back = back * strength[columns, None]
                if not np.isfinite(back).all():
                    raise ReftEdgeError(
                        "so scaled, the adapters are not finite in float32; give smaller scales"
                    )
            found[place] = (a, b, back)
    return found


def decode_inputs(edits: Sequence[DecodeEdit], dtype: np.dtype[np.generic]) -> PortInputs:
    """Port inputs of a decode step in which every row has an edit of its own; empty if none has any.

    adapter_batch is the number of rows; ranks are padded with zeros, at least to each place's largest. Raises ReftEdgeError
    if `dtype` cannot hold an edit.
    """
    places = sorted({place for edit in edits for place in edit})
    if not places:
        return {}
    one = np.ones((1, 1, 1), np.int64)
    inputs: PortInputs = {
        "reft.first": 0 * one,
        "reft.last": 0 * one,
        "reft.after": UNLIMITED * one,
        "reft.scale": one.astype(dtype),
        "reft.prompt_len": np.zeros(1, np.int64),
    }
    for place in places:
        parts = [edit.get(place) for edit in edits]
        rank = -(-max(len(part[1]) for part in parts if part is not None) // _RANKS) * _RANKS
        size = next(len(part[0]) for part in parts if part is not None)
        a = np.zeros((len(edits), size, rank), dtype)
        b = np.zeros((len(edits), 1, rank), dtype)
        back = np.zeros((len(edits), rank, size), dtype)
        for row, part in enumerate(parts):
            if part is not None:
                used = len(part[1])
                a[row, :, :used], b[row, 0, :used], back[row, :used] = (_held(array, dtype) for array in part)
        inputs |= {
            f"{place.port}.A": a,
            f"{place.port}.b": b,
            f"{place.port}.B": back,
            f"{place.port}.columns": np.zeros(rank, np.int64),
        }
    return inputs
