"""To a folder that pyreft 0.1.0's `ReftModel.load` reads, as `ReftModel.save` would have written it.

What its reload does (interventions.py, and pyvene 0.1.8's `IntervenableModel.load`): classes are built anew
with their defaults, so act_fn is linear, `learned_source` of LoReFT and DiReFT is bfloat16 (the file's
float32 numbers are rounded), and NoReFT and NoDiReFT fail, since no add_bias is stored. Linear ones of these
are written as DiReFT, which can say the same edit.
"""

import json
from collections import OrderedDict
from dataclasses import asdict
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from reft_edge.adapter.algebra import Array, folded_rows
from reft_edge.adapter.config import Adapter
from reft_edge.adapter.positions import UNLIMITED, group_names, meet, triggers_of
from reft_edge.convert.pyreft_format import CLASSES, COMPONENTS, ROTATION
from reft_edge.convert.rotation import ORTHONORMAL, off_orthonormal
from reft_edge.errors import ReftEdgeError
from reft_edge.folders import replace_folder

MARKER = "reft_edge_adapter.json"
"""Our description, beside what pyreft reads: it says what pyreft does not store."""


def to_pyreft(adapter: Adapter, output: Path) -> list[str]:
    """Write the folder; returns what its user must know.

    Raises ReftEdgeError for what its reload cannot carry: a non-linear act_fn, a classification head, edits of the first
    generated tokens alone, and overlapping position groups, which pyreft would edit one after the other.
    """
    config = adapter.config
    if config.labels:
        raise ReftEdgeError(
            "pyreft stores no classification head of this kind; only adapters without one can be carried"
        )
    if config.act_fn != "linear":
        raise ReftEdgeError(
            f"pyreft stores no act_fn: its reload would run {config.intervention} with linear in place of {config.act_fn}"
        )
    if triggers_of(config.spans):
        raise ReftEdgeError(
            f"positions {config.positions}: pyreft has no triggers; it edits places that are told for each prompt"
        )
    if any(0 < span.after < UNLIMITED for span in config.spans):
        raise ReftEdgeError(
            f"positions {config.positions}: pyreft edits every generated token or none; it cannot stop after the first ones"
        )
    if config.intervention == "red":
        raise ReftEdgeError("pyreft has no intervention like red; only the others can be carried")
    if any(meet(one, other) for one, other in combinations(config.spans, 2)):
        raise ReftEdgeError(
            f"positions {config.positions} overlap: pyreft would compute the second edit from the first one's result"
        )
    intervention, tensors = _with_rotation(adapter)
    rank = tensors["R"].shape[2]
    component = {ours: theirs for theirs, ours in COMPONENTS.items()}[config.component]
    name = {ours: theirs for theirs, ours in CLASSES.items()}[intervention]
    groups = range(len(config.spans))
    places = [(index, group) for group in groups for index in range(len(config.layers))]
    keys = [
        f"layer_{config.layers[index]}_comp_{component}_unit_pos_nunit_1#{group}" for index, group in places
    ]
    described = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [config.hidden_size] * len(keys),
        "intervention_types": [f"<class 'pyreft.interventions.{name}'>"] * len(keys),
        "mode": "parallel",
        "representations": [
            [config.layers[index], component, "pos", 1, rank, *[None] * 9] for index, _ in places
        ],
        "sorted_keys": keys,
    }
    with replace_folder(output, MARKER) as folder:
        for key, (index, group) in zip(keys, places, strict=True):
            part = {name: tensor[index, group] for name, tensor in tensors.items()}
            content = BytesIO()
            torch.save(_state(intervention, part, config.hidden_size), content)
            (folder / f"intkey_{key}.bin").write_bytes(content.getvalue())
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (folder / MARKER).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    order = ", ".join(
        f"#{number} at {part}" for number, part in enumerate(group_names(config.positions, config.tied))
    )
    notes = [f"pyreft stores no positions: give it unit_locations for {order}"]
    if intervention != config.intervention:
        notes.append(f"{config.intervention} is written as {intervention}, the same edit")
    if intervention in ("loreft", "direft"):
        float32 = "; on a float32 base call reft_model.float() then" if intervention == "loreft" else ""
        notes.append(
            f"ReftModel.load rounds W and b to bfloat16{float32}; for all digits, load the .bin files into "
            "interventions made with dtype=torch.float32"
        )
    return notes


def _with_rotation(adapter: Adapter) -> tuple[str, dict[str, Array]]:
    """The adapter as an intervention with orthonormal R that pyreft's reload takes."""
    kind = adapter.config.intervention
    if "R" in adapter.tensors and off_orthonormal(adapter.tensors["R"]) <= ORTHONORMAL:
        return kind, adapter.tensors
    rows_a, bias, rows_b = folded_rows(kind, adapter.tensors)
    # W2 = L R with orthonormal rows R: h + W2ᵀ(W1h + b) = h + Rᵀ(LᵀW1h + Lᵀb)
    q, r = np.linalg.qr(rows_b.astype(np.float64).swapaxes(-1, -2))
    tensors = {"R": q.swapaxes(-1, -2), "b": (r @ bias.astype(np.float64)[..., None])[..., 0]}
    if rows_a is not None:
        tensors["W"] = r @ rows_a.astype(np.float64)
    rounded = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    return ("lobireft" if rows_a is None else "direft"), rounded


def _state(intervention: str, part: dict[str, Array], size: int) -> "OrderedDict[str, torch.Tensor]":
    """One file's tensors, as pyreft 0.1.0 stores them."""

    def tensor(array: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float32))

    columns = tensor(part["R"]).mT.contiguous()
    if intervention == "loreft":
        return OrderedDict(weight=tensor(part["W"]), bias=tensor(part["b"]), rotate_layer=columns)
    completed, triangle = torch.linalg.qr(columns.double(), mode="complete")
    completed[:, : columns.shape[1]] *= triangle.diagonal().sign()  # its first columns are R's
    state = OrderedDict(
        {
            "embed_dim": torch.tensor(size),
            "interchange_dim": torch.tensor(size),
            f"{ROTATION}.original": -torch.eye(size, columns.shape[1]),
            f"{ROTATION}.0.base": completed.float(),
        }
    )
    if intervention == "direft":
        state |= {"learned_source.weight": tensor(part["W"]), "learned_source.bias": tensor(part["b"])}
    else:
        state["learned_source"] = tensor(part["b"])
    return state
