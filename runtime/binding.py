"""From edits to the inputs of a graph's ports."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import ACTS, Edit, LayerEdit
from reft_edge.adapter.positions import UNLIMITED, Span
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
    gates: PortInputs = field(default_factory=dict)
    """What of the prompt's port inputs is `in_prompt`'s own, on the host."""
    opened: Edit | None = None
    """`edit` without triggers, `in_prompt`."""

    def in_prompt(self, ids: Sequence[int]) -> "Bound":
        """The same for a prompt of these tokens, which says where triggers open gates. Raises ReftEdgeError as `decode_edit`
        does."""
        if self.edit is None or not self.edit.triggers:
            return self
        opened = self.edit.in_prompt(ids)
        gates = gate_inputs([[gate.span for gate in opened.gates]])
        whole = [gate.span.after for gate in opened.gates] == [gate.span.after for gate in self.edit.gates]
        decode = self.decode if whole else decode_edit(opened)
        return replace(self, decode=decode, gates=gates, opened=opened)

    def of_prompt(self, length: int) -> PortInputs:
        """The prompt's port inputs that are its own, on the host: its length in tokens, and where its triggers open gates."""
        return {**self.gates, "reft.prompt_len": np.array([length], np.int64)}

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """After how many generated tokens something stops acting, ascending."""
        gates = () if self._acting is None else self._acting.gates
        return tuple(sorted({gate.span.after for gate in gates if gate.scale != 0} - {0, UNLIMITED}))

    def decode_from(self, before: int) -> "DecodeEdit":
        """What acts on the generated token that has `before` others before it, and on others up to the next of `ends`. Raises
        ReftEdgeError as `decode_edit` does."""
        if self._acting is None or before < (self.ends or (UNLIMITED,))[0]:
            return self.decode
        return decode_edit(self._acting, before)

    @property
    def _acting(self) -> Edit | None:
        return self.edit if self.opened is None else self.opened


def fitted(edit: Edit, manifest: Manifest) -> Edit:
    """The edit as this folder's ports take it: with an activation for each column where they can have one.

    Raises ReftEdgeError if the edit is for another hidden size, a place without a port, or ports of another kind.
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
    kinds = manifest.port_kinds
    if "act" not in kinds and (acts := [act for act in edit.acts if act != "linear"]):
        _refuse_kind(f"the adapter's act_fn is {acts[0]!r}", "act", kinds)
    if "diagonal" not in kinds and edit.has_diagonal:
        _refuse_kind("the adapter multiplies hidden states elementwise", "diagonal", kinds)
    if "act" not in kinds:
        return edit
    places = {place: replace(part, acts=part.column_acts) for place, part in edit.places.items()}
    return replace(edit, places=places)


def _refuse_kind(what: str, kind: str, kinds: Sequence[str]) -> NoReturn:
    raise ReftEdgeError(
        f"{what}, for which this folder has no ports; export the model again with --ports {','.join([*kinds, kind])}"
    )


def port_inputs(edit: Edit, manifest: Manifest, dtype: np.dtype[np.generic]) -> PortInputs:
    """The edit as port inputs with adapter_batch 1, floats in the graph's `dtype`. Gates with triggers are shut: `gate_inputs`
    opens them for a prompt.

    Raises ReftEdgeError if the edit does not fit the folder, as `fitted` says, if the graph does not know its positions, or if
    `dtype` cannot hold it.
    """
    edit = fitted(edit, manifest)

    int64 = np.dtype(np.int64)
    inputs = gate_inputs([[Span() if gate.span.trigger else gate.span for gate in edit.gates]])
    needed = {*inputs, *(["reft.skip_first"] if edit.triggers else [])}
    if missing := sorted(needed & {f"reft.{name}" for name in _SKIPS} - set(manifest.ports)):
        raise ReftEdgeError(
            "the adapter leaves out tokens of the prompt (positions such as all-f1, or those of a trigger), for which this folder "
            f"has no {missing[0]}; export the model again"
        )
    inputs["reft.scale"] = np.array([gate.scale for gate in edit.gates], np.float32).reshape(1, 1, -1)
    for place, part in edit.places.items():
        name = place.port
        inputs[f"{name}.A"] = part.A[None]
        inputs[f"{name}.b"] = part.b[None, None]
        inputs[f"{name}.B"] = part.B[None]
        if len(part.s):
            inputs[f"{name}.s"] = part.s[None]
    inputs = {name: array if array.dtype == int64 else _held(array, dtype) for name, array in inputs.items()}
    for place, part in edit.places.items():
        inputs[f"{place.port}.columns"] = np.ascontiguousarray(part.gates, np.int64)
        if part.acts.size:
            inputs[f"{place.port}.acts"] = part.acts * part.acts.size + np.arange(part.acts.size)
        if len(part.s):
            inputs[f"{place.port}.s_columns"] = np.ascontiguousarray(part.s_gates, np.int64)
    return inputs


_COUNTS, _SKIPS = ("first", "last", "after"), ("skip_first", "skip_last")
GATES = tuple(f"reft.{name}" for name in (*_COUNTS, *_SKIPS))
"""Ports that say where gates are open; each may have a value for each row."""


def gate_inputs(rows: Sequence[Sequence[Span]]) -> PortInputs:
    """Where the gates of each row are open, `[rows, 1, gates]`; the spans have no triggers. What is left out of prompts is only
    among them where it is anything."""
    counts = {
        name: np.array([[getattr(span, name) for span in spans] for spans in rows], np.int64)[:, None]
        for name in (*_COUNTS, *_SKIPS)
    }
    return {f"reft.{name}": values for name, values in counts.items() if name in _COUNTS or values.any()}


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


DecodeEdit = dict[Place, LayerEdit]
"""What of an edit acts on a generated token, scaled, by place: all of its columns, and at most one row of `s`."""
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
        columns = np.flatnonzero(strength)
        open_part = part.take(columns) if columns.size < strength.size else part
        with np.errstate(over="ignore"):
            if (strength[columns] != 1).any():
                open_part = replace(open_part, B=open_part.B * strength[columns, None])
            if len(part.s):
                rows = np.flatnonzero(scales[part.s_gates])
                s = scales[part.s_gates[rows]] @ part.s[rows] if rows.size else part.s[:0]
                open_part = replace(open_part, s=s.reshape(-1, part.s.shape[1]), s_gates=part.s_gates[:0])
        if not (np.isfinite(open_part.B).all() and np.isfinite(open_part.s).all()):
            raise ReftEdgeError("so scaled, the adapters are not finite in float32; give smaller scales")
        if columns.size or len(open_part.s):
            found[place] = open_part
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
        parts = {row: edit[place] for row, edit in enumerate(edits) if place in edit}
        inputs |= _columns_of_rows(place.port, parts, len(edits), dtype)
        if any(len(part.s) for part in parts.values()):
            inputs |= _diagonals_of_rows(place.port, parts, len(edits), dtype)
    return inputs


def _columns_of_rows(
    port: str, parts: dict[int, LayerEdit], count: int, dtype: np.dtype[np.generic]
) -> PortInputs:
    """One place's columns of `count` rows beside each other. Columns of one activation lie at the same numbers in all rows."""
    at, acts = _layout([part.column_acts for part in parts.values()])
    rank, size = acts.size, len(next(iter(parts.values())).A)
    a = np.zeros((count, size, rank), dtype)
    b = np.zeros((count, 1, rank), dtype)
    back = np.zeros((count, rank, size), dtype)
    for (row, part), columns in zip(parts.items(), at, strict=True):
        a[row][:, columns], b[row, 0, columns], back[row, columns] = (
            _held(array, dtype) for array in (part.A, part.b, part.B)
        )
    inputs: PortInputs = {
        f"{port}.A": a,
        f"{port}.b": b,
        f"{port}.B": back,
        f"{port}.columns": np.zeros(rank, np.int64),
    }
    if any(part.acts.size for part in parts.values()):
        inputs[f"{port}.acts"] = acts * rank + np.arange(rank)
    return inputs


def _layout(rows: Sequence[NDArray[np.int64]]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Where each row's columns go, given their activations, and the activation of every column of all rows."""
    widths = np.max([np.bincount(acts, minlength=len(ACTS)) for acts in rows], axis=0)
    widths[0] += -widths.sum() % _RANKS
    starts = np.cumsum(widths) - widths
    at = []
    for acts in rows:
        columns = np.empty_like(acts)
        for act in range(len(ACTS)):
            own = np.flatnonzero(acts == act)
            columns[own] = starts[act] + np.arange(own.size)
        at.append(columns)
    return at, np.repeat(np.arange(len(ACTS)), widths)


def _diagonals_of_rows(
    port: str, parts: dict[int, LayerEdit], count: int, dtype: np.dtype[np.generic]
) -> PortInputs:
    size = next(part.s.shape[1] for part in parts.values() if len(part.s))
    s = np.zeros((count, 1, size), dtype)
    for row, part in parts.items():
        if len(part.s):
            s[row] = _held(part.s, dtype)
    return {f"{port}.s": s, f"{port}.s_columns": np.zeros(1, np.int64)}
