"""From folders of pyreft 0.1.0: `ReftModel.save` (config.json and `intkey_*.bin`) or `ReftTrainer`'s
`intervenable_model`.

Facts about the format, from pyreft 0.1.0's interventions.py and pyvene 0.1.8's intervenable_base.py: a file's
name says layer, component and, after `#`, which of the layer's interventions it is; untied, `#0` edits the
prompt's first tokens and `#1` its last. LoReFT stores its effective `rotate_layer [d, r]`; ConsReFT, LoBiReFT
and DiReFT store torch's Householder parametrisation of it, `base @ (Q * sign)` with Q the product of the
reflections below the diagonal of `original [d, r]` and `sign` its diagonal. Neither positions nor act_fn nor
the base model are stored, so they must be given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reft_edge.adapter.algebra import Array
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import LINEAR_ONLY, Adapter, AdapterConfig
from reft_edge.adapter.positions import UNLIMITED, parse_positions
from reft_edge.convert.pyreft_folder import Described, PyreftFile, find_layers, read_folder
from reft_edge.convert.pyreft_format import CLASSES, ROTATION
from reft_edge.convert.rotation import householder_rows, sound
from reft_edge.convert.tensor_file import read_tensors
from reft_edge.errors import ReftEdgeError
from reft_edge.files import name_to_store
from reft_edge.steering.interventions import activation

_SCALARS = ("embed_dim", "interchange_dim")


@dataclass(frozen=True)
class Asked:
    """What pyreft does not store."""

    positions: str | None = None
    """In the order of `#0`, `#1`; whether they are tied is seen from the files."""
    act_fn: str | None = None
    intervention: str | None = None
    """Only where there is no config.json and the tensors do not tell."""
    raw: bool | None = None
    """Whether prompts went to the model as they stand, without a chat template."""


def from_pyreft(
    folder: Path, base: Callable[[], Base], asked: Asked, report: Callable[[str], None] = lambda note: None
) -> Adapter:
    """The adapter of a pyreft folder; `base` is called, and `report` told what to know, once the folder is
    found sound.

    Raises ReftEdgeError that names the option for what the folder does not store, the file that is malformed, or
    what cannot be carried: mixed interventions, other components, trained parameters of the base model.
    """
    found = read_folder(folder)
    folder, files, described = found.path, found.files, found.described
    positions, raw = _required(asked)
    layers, component = find_layers(files)
    groups = len(files) // len(layers)
    tied = _tied(positions, groups)
    known = _intervention(described, asked)
    whole = base()
    intervention, parts = _read_parts(
        files, folder, known, _limit(described, known, whole.hidden_size), whole
    )
    act_fn = _act_fn(intervention, asked.act_fn)
    rank, add_bias = _rank(parts, folder), intervention == "noreft" and "b2" in parts[0]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ReftEdgeError(f"{folder} has some interventions with add_bias and some without")
    stacked = {
        name: np.stack([part[name] for part in parts]).reshape(len(layers), groups, *parts[0][name].shape)
        for name in parts[0]
    }
    kind, tensors = sound(intervention, stacked, report)
    config = AdapterConfig(
        kind,
        whole.name,
        whole.fingerprint,
        whole.hidden_size,
        whole.num_layers,
        layers,
        rank,
        positions,
        tied,
        act_fn,
        add_bias,
        "raw" if raw else "chat",
        {"converted": {"from": "pyreft", "name": name_to_store(folder), "intervention": intervention}},
        component=component,
    )
    if any(span.first > 0 or 0 < span.last < UNLIMITED for span in config.spans):
        report(
            f"positions {positions} count to the prompt's last token, as in pyreft's examples/loreft and make_multiple_position_* "
            "functions; its ReftSupervisedDataset, ReftGenerationDataset and ReftClassificationDataset leave the last token out, "
            "which no position spec here says"
        )
    return Adapter(config, tensors)


def _required(asked: Asked) -> tuple[str, bool]:
    """Positions, and whether prompts were raw. Raises ReftEdgeError that names the option for what was not given."""
    if asked.positions is None:
        raise ReftEdgeError(
            "pyreft does not store positions: give those that it was trained with by --positions, such as f7+l7"
        )
    if asked.raw is None:
        raise ReftEdgeError(
            "pyreft does not store how prompts were written: give --chat (through the model's chat template) or --raw"
        )
    return asked.positions, asked.raw


def _intervention(described: Described | None, asked: Asked) -> str | None:
    """What config.json says, or what was asked for; None where only the tensors can tell."""
    if described is not None and asked.intervention not in (None, described.intervention):
        raise ReftEdgeError(
            f"--intervention is {asked.intervention}, but config.json says {described.intervention}; leave it out"
        )
    intervention = described.intervention if described else asked.intervention
    if intervention is not None:
        if intervention not in CLASSES.values():
            raise ReftEdgeError(f"--intervention {intervention} is none of {', '.join(CLASSES.values())}")
        _act_fn(intervention, asked.act_fn)
    return intervention


def _read_parts(
    files: Sequence[PyreftFile], folder: Path, known: str | None, limit: int, base: Base
) -> tuple[str, list[dict[str, Array]]]:
    """The intervention, and the tensors of every file by layer and number; of at most `limit` bytes a file."""
    parts: list[dict[str, Array]] = []
    for file in sorted(files, key=lambda file: (file.layer, file.number)):
        state = read_tensors(file.path, limit)
        known = known or _recognise(state, folder)
        parts.append(_unpack(known, state, base.hidden_size, folder))
    assert known is not None
    return known, parts


def _rank(parts: Sequence[dict[str, Array]], folder: Path) -> int:
    ranks = sorted({part["b"].shape[0] for part in parts})
    if len(ranks) > 1:
        raise ReftEdgeError(f"{folder} has interventions of ranks {ranks}; an adapter file has one rank")
    if ranks == [0]:
        raise ReftEdgeError(f"{folder} has interventions of rank 0, which change nothing")
    return int(ranks[0])


def _tied(positions: str, groups: int) -> bool:
    """Whether one intervention serves all parts of the positions, by how many there are at a layer."""
    for tied in (False,) if "|" in positions else (False, True):
        if len(parse_positions(positions, tied)) == groups:
            return tied
    parts = len(parse_positions(positions, tied=False))
    raise ReftEdgeError(
        f"the folder has {groups} interventions a layer, but positions {positions!r} name {parts} "
        f"{'part' if parts == 1 else 'parts'}; give the positions of #0 to #{groups - 1}, in this order"
    )


def _limit(described: Described | None, intervention: str | None, size: int) -> int:
    """Bytes of tensors that one file can need, in float64 at most."""
    rank = min(described.rank if described and described.rank else size, size)
    rotation = 0 if intervention in ("loreft", "noreft", "nodireft") else size * size
    return 8 * (rotation + 2 * rank * size + 2 * rank + 2)


def _recognise(state: dict[str, Array], folder: Path) -> str:
    names = set(state)
    if names == {"weight", "bias", "rotate_layer"}:
        return "loreft"
    rotated = f"{ROTATION}.original" in names
    if rotated and "learned_source.weight" in names:
        return "direft"
    two = (
        ("consreft", "lobireft")
        if rotated
        else ("noreft", "nodireft")
        if "proj_layer.weight" in names
        else None
    )
    if two is None:
        raise ReftEdgeError(
            f"{folder} holds tensors {sorted(names)!r:.200}, which no intervention of pyreft has"
        )
    raise ReftEdgeError(
        f"{folder} has no config.json and its tensors can be {two[0]} or {two[1]}: say which by --intervention"
    )


def _act_fn(intervention: str, given: str | None) -> str:
    if intervention in LINEAR_ONLY:
        if given not in (None, "linear"):
            raise ReftEdgeError(f"{intervention} has no activation function; leave out --act-fn {given}")
        return "linear"
    if given is None:
        raise ReftEdgeError(
            f"pyreft does not store the act_fn of {intervention}: give it by --act-fn; linear is pyreft's default"
        )
    activation(given)  # raises for one that there is not
    return given


def _unpack(intervention: str, state: dict[str, Array], size: int, folder: Path) -> dict[str, Array]:
    """One intervention's tensors by our names, [r, d] and [r]."""
    state = {name: tensor for name, tensor in state.items() if name not in _SCALARS}

    def take(name: str, *shape: int | None) -> Array:
        if name not in state:
            raise ReftEdgeError(
                f"{folder}: a {intervention} file lacks {name}; it has {sorted(state)!r:.200}"
            )
        tensor = state.pop(name)
        if len(tensor.shape) != len(shape) or any(
            want not in (None, found) for want, found in zip(shape, tensor.shape, strict=True)
        ):
            wanted = ["r" if want is None else want for want in shape]
            raise ReftEdgeError(
                f"{folder}: {name} of a {intervention} is {list(tensor.shape)}; expected {wanted} for this base"
            )
        return tensor

    if intervention == "loreft":
        rotation = take("rotate_layer", size, None)
        found = {"R": np.ascontiguousarray(rotation.T), "W": take("weight", rotation.shape[1], size)}
        found["b"] = take("bias", rotation.shape[1])
    elif intervention in ("noreft", "nodireft"):
        source = take("learned_source.weight", None, size)
        rank = source.shape[0]
        found = {"W1": source, "W2": take("proj_layer.weight", rank, size)}
        found["b"] = take("learned_source.bias", rank)
        if "proj_layer.bias" in state:
            bias = take("proj_layer.bias", rank)
            if intervention == "noreft":  # NoDiReFT never reads it
                found["b2"] = bias
    else:
        original = take(f"{ROTATION}.original", size, None)
        rank = original.shape[1]
        if rank > size:
            raise ReftEdgeError(f"{folder}: rank {rank} is larger than the hidden size {size}")
        found = {"R": householder_rows(original, take(f"{ROTATION}.0.base", size, size))}
        if intervention == "direft":
            found |= {"W": take("learned_source.weight", rank, size), "b": take("learned_source.bias", rank)}
        else:
            found["b"] = take("learned_source", rank)
    if state:
        raise ReftEdgeError(f"{folder}: a {intervention} file has unexpected tensors {sorted(state)!r:.200}")
    if any(not np.isfinite(tensor).all() for tensor in found.values()):
        raise ReftEdgeError(f"{folder} holds NaN or infinity")
    return found
