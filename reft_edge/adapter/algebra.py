"""The algebra of ReFT edits: every member of the family is h' = h + act(h A + b) B + s ⊙ h.

`A: [d, r]`, `b: [r]`, `B: [r, d]`, `s: [k, d]`, and an activation for each column, which is none for most members. Running
adapters together is concatenation along r and k, blending is a scale per column, a subspace is a slice of r, and rank 0
changes nothing.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.positions import Span, active, triggers_of
from reft_edge.adapter.triggers import Trigger
from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import Place

Array = NDArray[np.float32]
LARGEST = float(np.finfo(np.float32).max)
ACTS = ("linear", "relu", "gelu", "silu", "tanh", "sigmoid")
"""Activations that ports carry, by transformers' names; gelu is the exact one, with erf."""


@dataclass(frozen=True)
class Gate:
    """Where a set of columns acts, and how strongly."""

    span: Span
    scale: float = 1.0


@dataclass(frozen=True)
class LayerEdit:
    """The edit of one place: `A [d, r]`, `b [r]`, `B [r, d]` (float32) and the gate of each column, `gates [r]` (int64)."""

    A: Array
    b: Array
    B: Array
    gates: NDArray[np.int64]
    acts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The activation of each column, an index into ACTS, `[r]`; `[0]` where all are linear."""
    s: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """What h is multiplied by, elementwise, to be added to it: `[k, d]`; `[0, 0]` for nothing."""
    s_gates: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The gate of each row of `s`, `[k]`."""

    @property
    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """Everything that it consists of."""
        return (self.A, self.b, self.B, self.gates, self.acts, self.s, self.s_gates)

    @property
    def column_acts(self) -> NDArray[np.int64]:
        """The activation of each column, spelled out: `[r]`."""
        return self.acts if self.acts.size else np.zeros(self.b.shape, np.int64)

    def take(self, columns: Any) -> "LayerEdit":
        """With only these columns of the rank axis, by a slice or their numbers."""
        acts = self.acts[columns] if self.acts.size else self.acts
        taken = self.A[:, columns], self.b[columns], self.B[columns], self.gates[columns]
        return LayerEdit(*taken, acts, self.s, self.s_gates)


@dataclass(frozen=True)
class Edit:
    """Edits at some places of a model with hidden size `hidden_size`; columns point into `gates`."""

    hidden_size: int
    gates: tuple[Gate, ...]
    places: dict[Place, LayerEdit]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(
            part.A.nbytes + part.b.nbytes + part.B.nbytes + part.s.nbytes for part in self.places.values()
        )

    @property
    def acts(self) -> tuple[str, ...]:
        """Names of the activations that its columns use, in the order of ACTS."""
        used = {int(act) for part in self.places.values() for act in part.column_acts}
        return tuple(ACTS[act] for act in sorted(used))

    @property
    def has_diagonal(self) -> bool:
        """Whether it multiplies h elementwise anywhere."""
        return any(len(part.s) for part in self.places.values())

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of where it acts, how strongly, and of all weights."""
        digest = hashlib.sha256(repr((self.hidden_size, self.gates)).encode())
        for place, part in sorted(self.places.items()):
            digest.update(f"{place!r} {part.A.shape} {part.acts.shape} {part.s.shape} ".encode())
            for array in part.arrays:
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """Those of its gates."""
        return triggers_of(gate.span for gate in self.gates)

    def in_prompt(self, prompt: Sequence[int]) -> "Edit":
        """The same edit for a prompt of these tokens, without triggers: itself where it has none."""
        if not self.triggers:
            return self
        gates = tuple(replace(gate, span=gate.span.in_prompt(prompt)) for gate in self.gates)
        return replace(self, gates=gates)

    @property
    def on_generated(self) -> bool:
        """Whether any column can be active after the prompt."""
        return any(gate.span.on_generated and gate.scale != 0 for gate in self.gates)


def scale(edit: Edit, factor: float) -> Edit:
    """The edit with its effect multiplied by `factor`: h' = h + factor (act(hA + b) B + s ⊙ h).

    Raises ReftEdgeError for a factor that is not finite in float32, in which edits run.
    """
    gates = tuple(replace(gate, scale=gate.scale * factor) for gate in edit.gates)
    if not all(abs(gate.scale) <= LARGEST for gate in gates):
        raise ReftEdgeError(f"scaled by {factor:g}, the edit is not finite in float32; give a smaller scale")
    return replace(edit, gates=gates)


def concat(edits: Sequence[Edit]) -> Edit:
    """All edits at once, each computed from the same h: their deltas add.

    Raises ReftEdgeError if there is none or hidden sizes differ.
    """
    if not edits:
        raise ReftEdgeError("there is no edit to combine; give at least one adapter")
    sizes = {edit.hidden_size for edit in edits}
    if len(sizes) > 1:
        raise ReftEdgeError(f"adapters of different hidden sizes {sorted(sizes)} cannot run together")
    places: dict[Place, LayerEdit] = {}
    offset = 0
    for edit in edits:
        for place, part in edit.places.items():
            shifted = replace(part, gates=part.gates + offset, s_gates=part.s_gates + offset)
            places[place] = _join(places[place], shifted) if place in places else shifted
        offset += len(edit.gates)
    gates = tuple(gate for edit in edits for gate in edit.gates)
    return Edit(edits[0].hidden_size, gates, dict(sorted(places.items())))


def subspace(edit: Edit, columns: slice) -> Edit:
    """Only the given columns of every place's rank axis (pyreft's subspaces)."""
    return replace(edit, places={place: part.take(columns) for place, part in edit.places.items()})


def apply(edit: Edit, place: Place, h: Array, t: NDArray[np.int64], n: int) -> Array:
    """The edited hidden states of one row: the reference that graphs and runtimes are checked against.

    `h [sequence, d]`, `t [sequence]` absolute positions, `n` the prompt's length in tokens. The edit has no triggers
    (`Edit.in_prompt`).
    """
    part = edit.places.get(place)
    if part is None:
        return h
    opened = np.stack([active(gate.span, t, n) * np.float32(gate.scale) for gate in edit.gates], axis=1)
    opened = opened.astype(np.float32)
    gated = _activated(h @ part.A + part.b, part.column_acts) * opened[:, part.gates]
    edited = h + gated @ part.B
    if len(part.s):
        edited = edited + h * (opened[:, part.s_gates] @ part.s)
    found: Array = edited.astype(np.float32, copy=False)
    return found


def _activated(z: Array, acts: NDArray[np.int64]) -> Array:
    """Each column of `z [sequence, r]` by its activation."""
    found: Array = z.copy()
    for act in set(acts.tolist()) - {0}:
        columns = acts == act
        found[:, columns] = _activation(ACTS[act], z[:, columns])
    return found


def _activation(name: str, z: Array) -> Any:
    if name == "relu":
        return np.maximum(z, 0)
    if name == "gelu":
        return z * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))) / 2
    if name == "tanh":
        return np.tanh(z)
    sigmoid = (1 + np.tanh(z / 2)) / 2
    return z * sigmoid if name == "silu" else sigmoid


def _join(left: LayerEdit, right: LayerEdit) -> LayerEdit:
    mixed = left.acts.size or right.acts.size
    rows = [part for part in (left, right) if len(part.s)]
    return LayerEdit(
        A=np.concatenate([left.A, right.A], axis=1),
        b=np.concatenate([left.b, right.b]),
        B=np.concatenate([left.B, right.B]),
        gates=np.concatenate([left.gates, right.gates]),
        acts=np.concatenate([left.column_acts, right.column_acts]) if mixed else left.acts,
        s=np.concatenate([part.s for part in rows]) if rows else left.s,
        s_gates=np.concatenate([left.s_gates, right.s_gates]),
    )


def edit_error(exact: Edit, rounded: Edit) -> float:
    """How far the rounded edit is off: its root mean square difference over the edit's own, for hidden states that are
    standard normal, the worst of all places.

    For h ~ N(0, I) the mean square of (hA + b)B is |AB|² + |bB|², that of s ⊙ h is |s|² (Frobenius).
    """
    worst = 0.0
    for place, part in exact.places.items():
        other = rounded.places[place]
        rows = np.concatenate([part.A, part.b[None]]).astype(np.float64)
        off = np.concatenate([other.A, other.b[None]]).astype(np.float64)
        back, back_off = part.B.astype(np.float64), other.B.astype(np.float64)
        # with A' = A + E and B' = B + F: A'B' − AB = EB' + AF
        error = _norm(np.hstack([off - rows, rows]), np.vstack([back_off, back_off - back]))
        s, s_off = part.s.astype(np.float64), other.s.astype(np.float64)
        error = math.hypot(error, float(np.linalg.norm(s_off - s)))
        whole = math.hypot(_norm(rows, back), float(np.linalg.norm(s)))
        worst = max(worst, error / whole if whole else float(error > 0))
    return worst


def _norm(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """The Frobenius norm of left @ right, `[d, r]` by `[r, d]`, by way of `[r, r]`."""
    return math.sqrt(max(float(np.sum((left.T @ left) * (right @ right.T))), 0.0))


def folded_rows(intervention: str, t: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Aᵀ (None where it is zero), b and B of the edit h + (hA + b)B, stacked as the tensors are; numpy or torch.

    RED multiplies h by its `s` beside that.
    """
    if intervention == "loreft":
        return t["W"] - t["R"], t["b"], t["R"]
    if intervention == "direft":
        return t["W"], t["b"], t["R"]
    if intervention == "noreft":
        return t["W1"] - t["W2"], t["b"] - t["b2"] if "b2" in t else t["b"], t["W2"]
    if intervention == "nodireft":
        return t["W1"], t["b"], t["W2"]
    if intervention == "consreft":
        return -t["R"], t["b"], t["R"]
    if intervention == "lobireft":
        return None, t["b"], t["R"]
    if intervention == "red":
        return None, 0 * t["v"][..., 0] + 1, t["v"]
    return None, t["alpha"], t["v"]
