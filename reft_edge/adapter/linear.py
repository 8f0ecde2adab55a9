"""Linear edits as adapters: every edit h + (hA + b)B is NoDiReFT, h + W2ᵀ(W1h + b), with W1 = Aᵀ and W2 = B.

An `Edit` has a gate a column, an adapter a rank a position group. Columns whose gates open at the same tokens
become one group, their scales go into B, and ranks are padded with zeros to the largest of any place and
group.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from reft_edge.adapter.algebra import Array, Edit, Gate, LayerEdit, folded_rows
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter, AdapterConfig, check_size
from reft_edge.adapter.positions import UNLIMITED, Span, describe_spans
from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import Place


def grouped(edit: Edit) -> Edit:
    """The same edit with one gate of scale 1 for each span, in the order in which spans first appear.

    Columns that never act are left out, and so are places that have no others. Raises ReftEdgeError if a scale takes
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
        if columns.size:
            with np.errstate(over="ignore"):
                back = part.B[columns] * scales[part.gates[columns], None]
            if not np.isfinite(back).all():
                raise ReftEdgeError(
                    f"scaled by up to {np.abs(scales).max():g}, the edit of layer {place} is not finite in float32; "
                    "give a smaller scale"
                )
            places[place] = LayerEdit(part.A[:, columns], part.b[columns], back, groups[columns])
    return Edit(edit.hidden_size, tuple(Gate(span) for span in spans), places)


def unfold(edit: Edit, base: Base, prompt_format: str, training: dict[str, Any]) -> Adapter:
    """The edit as a NoDiReFT adapter.

    Raises ReftEdgeError for an edit that never acts, one that acts on unlike components, a span that no position
    spec says, a rank beyond the hidden size, and one that is too large for a file once padded to its largest rank.
    """
    edit = grouped(edit)
    if not edit.places:
        raise ReftEdgeError("the edit is empty: no column of it ever acts")
    components = sorted({place.component for place in edit.places})
    if len(components) > 1:
        raise ReftEdgeError(
            f"the edit acts on the {' and the '.join(components)} of layers; an adapter file holds one of them"
        )
    counts = {
        place: np.bincount(part.gates, minlength=len(edit.gates)) for place, part in edit.places.items()
    }
    rank = int(max(count.max() for count in counts.values()))
    if rank > base.hidden_size:
        raise ReftEdgeError(
            f"together they have rank {rank} in one position group, more than the hidden size {base.hidden_size}; merge to "
            "a smaller one with --rank"
        )
    positions, tied = describe_spans([gate.span for gate in edit.gates])
    config = AdapterConfig(
        "nodireft",
        base.name,
        base.fingerprint,
        base.hidden_size,
        base.num_layers,
        tuple(sorted(place.layer for place in edit.places)),
        rank,
        positions,
        tied,
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
            used = slice(0, len(columns))
            tensors["W1"][index, group, used] = part.A[:, columns].T
            tensors["b"][index, group, used] = part.b[columns]
            tensors["W2"][index, group, used] = part.B[columns]
    return Adapter(config, tensors)


def _acts(gate: Gate) -> bool:
    return gate.scale != 0 and (gate.span.on_prompt or gate.span.on_generated)


def canonical(span: Span) -> Span:
    """The same gate without counts that make no difference."""
    if not span.on_prompt:
        return replace(span, skip_first=0, skip_last=0)
    return replace(span, first=0) if span.last == UNLIMITED else span


def fold(adapter: Adapter) -> Edit:
    """The adapter as one linear edit (A, b, B) a place.

    Raises ReftEdgeError if its act_fn is not linear: such an edit is not affine in h.
    """
    config = adapter.config
    if config.act_fn != "linear":
        raise ReftEdgeError(
            f"the adapter's act_fn is {config.act_fn!r}, which no linear port can carry; "
            "train it with act_fn `linear` to run it on an exported model"
        )
    rows_a, bias, rows_b = folded_rows(config.intervention, adapter.tensors)
    if rows_a is None:
        rows_a = np.zeros_like(rows_b)
    gates = tuple(Gate(span) for span in config.spans)
    columns = np.repeat(np.arange(len(gates)), config.rank)
    places = {
        place: LayerEdit(
            A=np.ascontiguousarray(rows_a[i].reshape(-1, config.hidden_size).T),
            b=bias[i].reshape(-1),
            B=rows_b[i].reshape(-1, config.hidden_size),
            gates=columns,
        )
        for i, place in enumerate(config.places)
    }
    return Edit(config.hidden_size, gates, places)
