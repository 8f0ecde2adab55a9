"""Edits as adapters: every edit h + act(hA + b)B is NoDiReFT, h + W2ᵀ act(W1h + b), with W1 = Aᵀ and W2 = B.

An `Edit` has a gate a column, an adapter a rank a position group. Columns whose gates open at the same tokens
become one group, their scales go into B, and ranks are padded with zeros to the largest of any place and
group. An edit h + s ⊙ h + v is RED.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import ACTS, Array, Edit, Gate, LayerEdit, folded_rows
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter, AdapterConfig, check_size
from reft_edge.adapter.positions import UNLIMITED, Span, describe_spans
from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import Place

_ALIASES = {"swish": "silu"}


def grouped(edit: Edit) -> Edit:
    """The same edit with one gate of scale 1 for each span, in the order in which spans first appear.

    Columns and diagonals that never act are left out, and so are places that have no others. Raises ReftEdgeError if a scale takes
    weights beyond float32.
    """
    spans = list(dict.fromkeys(canonical(gate.span) for gate in edit.gates if _acts(gate)))
    number = {span: index for index, span in enumerate(spans)}
    scales = np.array([gate.scale for gate in edit.gates], np.float32)
    group_of = np.array([number[canonical(gate.span)] if _acts(gate) else -1 for gate in edit.gates])
    places: dict[Place, LayerEdit] = {}
    for place, part in edit.places.items():
        groups = group_of[part.gates]
        columns = np.argsort(groups, kind="stable")
        columns = columns[groups[columns] >= 0]
        rows = np.flatnonzero(group_of[part.s_gates] >= 0)
        if columns.size or rows.size:
            taken = part.take(columns)
            with np.errstate(over="ignore"):
                back = taken.B * scales[taken.gates, None]
                s = part.s[rows] * scales[part.s_gates[rows], None]
            if not (np.isfinite(back).all() and np.isfinite(s).all()):
                raise ReftEdgeError(
                    f"scaled by up to {np.abs(scales).max():g}, the edit of layer {place} is not finite in float32; "
                    "give a smaller scale"
                )
            s_gates = group_of[part.s_gates[rows]]
            places[place] = replace(taken, B=back, gates=groups[columns], s=s, s_gates=s_gates)
    return Edit(edit.hidden_size, tuple(Gate(span) for span in spans), places)


def unfold(edit: Edit, base: Base, prompt_format: str, training: dict[str, Any]) -> Adapter:
    """The edit as a NoDiReFT adapter, or as RED if it multiplies h elementwise.

    Raises ReftEdgeError for an edit that never acts, one that acts on unlike components or with different activations, one
    that has both a diagonal and a rank, a span that no position spec says, a rank beyond the hidden size, and one that is too
    large for a file once padded to its largest rank.
    """
    edit = grouped(edit)
    if not edit.places:
        raise ReftEdgeError("the edit is empty: no column of it ever acts")
    components = sorted({place.component for place in edit.places})
    if len(components) > 1:
        raise ReftEdgeError(
            f"the edit acts on the {' and the '.join(components)} of layers; an adapter file holds one of them"
        )
    act = _one_act(edit)
    if edit.has_diagonal:
        _check_bias_only(edit)
    counts = {
        place: np.bincount(part.gates, minlength=len(edit.gates)) for place, part in edit.places.items()
    }
    rank = 1 if edit.has_diagonal else int(max(count.max() for count in counts.values()))
    if rank > base.hidden_size:
        raise ReftEdgeError(
            f"together they have rank {rank} in one position group, more than the hidden size {base.hidden_size}; merge to "
            "a smaller one with --rank"
        )
    positions, tied = describe_spans([gate.span for gate in edit.gates])
    config = AdapterConfig(
        "red" if edit.has_diagonal else "nodireft",
        base.name,
        base.fingerprint,
        base.hidden_size,
        base.num_layers,
        tuple(sorted(place.layer for place in edit.places)),
        rank,
        positions,
        tied,
        act,
        prompt_format=prompt_format,
        training=training,
        component=components[0],
    )
    check_size(config)
    tensors: dict[str, Array] = {name: np.zeros(shape, np.float32) for name, shape in config.shapes().items()}
    for index, place in enumerate(config.places):
        part = edit.places[place]
        for group in range(len(edit.gates)):
            columns = np.flatnonzero(part.gates == group)
            if edit.has_diagonal:
                tensors["v"][index, group, 0] = part.b[columns] @ part.B[columns]
                tensors["s"][index, group, 0] = part.s[part.s_gates == group].sum(axis=0)
                continue
            used = slice(0, len(columns))
            tensors["W1"][index, group, used] = part.A[:, columns].T
            tensors["b"][index, group, used] = part.b[columns]
            tensors["W2"][index, group, used] = part.B[columns]
    return Adapter(config, tensors)


def _one_act(edit: Edit) -> str:
    if len(edit.acts) > 1:
        raise ReftEdgeError(
            f"its columns have different activations, {' and '.join(edit.acts)}; an adapter file holds one act_fn"
        )
    return edit.acts[0] if edit.acts else "linear"


def _check_bias_only(edit: Edit) -> None:
    """Raise ReftEdgeError unless all that is not a diagonal is a vector."""
    if edit.acts not in ((), ("linear",)) or any(part.A.any() for part in edit.places.values()):
        raise ReftEdgeError(
            "it multiplies hidden states elementwise and edits them by low-rank matrices, too; an adapter file holds one of both"
        )


def _acts(gate: Gate) -> bool:
    return gate.scale != 0 and (gate.span.on_prompt or gate.span.on_generated)


def canonical(span: Span) -> Span:
    """The same gate without counts that make no difference."""
    if not span.on_prompt:
        return replace(span, skip_first=0, skip_last=0)
    return replace(span, first=0) if span.last == UNLIMITED else span


def fold(adapter: Adapter) -> Edit:
    """The adapter as one edit a place.

    Raises ReftEdgeError if no port carries its act_fn.
    """
    config = adapter.config
    rows_a, bias, rows_b, acts = _columns(config, adapter.tensors)
    gates = tuple(Gate(span) for span in config.spans)
    columns = np.tile(np.repeat(np.arange(len(gates)), config.rank), bias.shape[1] // len(gates))
    diagonal = adapter.tensors["s"][:, :, 0] if config.intervention == "red" else None
    places = {}
    for i, place in enumerate(config.places):
        part = LayerEdit(
            A=np.ascontiguousarray(rows_a[i].reshape(-1, config.hidden_size).T),
            b=bias[i].reshape(-1),
            B=rows_b[i].reshape(-1, config.hidden_size),
            gates=columns,
            acts=acts,
        )
        if diagonal is not None:
            part = replace(part, s=diagonal[i], s_gates=np.arange(len(gates)))
        places[place] = part
    return Edit(config.hidden_size, gates, places)


def _columns(config: AdapterConfig, t: dict[str, Array]) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """Aᵀ, b and B of all columns, stacked over layers and groups, and each column's activation.

    What pyreft subtracts outside of act is columns of its own, without activation: act(hA + b)B − (hC + c)B.
    """
    kind = config.intervention
    if config.act_fn == "linear":
        rows_a, bias, rows_b = folded_rows(kind, t)
        rows_a = np.zeros_like(rows_b) if rows_a is None else rows_a
        return rows_a, bias, rows_b, np.zeros(0, np.int64)
    name = _ALIASES.get(config.act_fn, config.act_fn)
    if name not in ACTS:
        raise ReftEdgeError(
            f"the adapter's act_fn is {config.act_fn!r}, which no port can carry; "
            f"train it with one of {', '.join(ACTS)} to run it on an exported model"
        )
    act = ACTS.index(name)
    rotated = kind in ("loreft", "direft")
    rows_a, bias, rows_b = t["W" if rotated else "W1"], t["b"], t["R" if rotated else "W2"]
    count = bias[0].size
    if kind not in ("loreft", "noreft"):
        return rows_a, bias, rows_b, np.full(count, act)
    subtracted = -t["b2"] if "b2" in t else np.zeros_like(bias)
    return (
        np.concatenate([rows_a, -rows_b], axis=1),
        np.concatenate([bias, subtracted], axis=1),
        np.concatenate([rows_b, rows_b], axis=1),
        np.repeat([act, 0], count),
    )
