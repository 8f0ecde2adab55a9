"""From folders of pyreft 0.1.0: `ReftModel.save` (config.json and `intkey_*.bin`) or `ReftTrainer`'s
`intervenable_model`.

Facts about the format, from pyreft 0.1.0's interventions.py and pyvene 0.1.8's intervenable_base.py: a file's
name says layer, component and, after `#`, which of the layer's interventions it is; untied, `#0` edits the
prompt's first tokens and `#1` its last. LoReFT stores its effective `rotate_layer [d, r]`; ConsReFT, LoBiReFT
and DiReFT store torch's Householder parametrisation of it, `base @ (Q * sign)` with Q the product of the
reflections below the diagonal of `original [d, r]` and `sign` its diagonal. Neither positions nor act_fn nor
the base model are stored, so they must be given.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reft_edge.adapter.algebra import Array
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import LINEAR_ONLY, Adapter, AdapterConfig
from reft_edge.adapter.positions import UNLIMITED, parse_positions
from reft_edge.convert.folder import open_inside
from reft_edge.convert.pyreft_format import CLASSES, COMPONENTS, ROTATION
from reft_edge.convert.rotation import householder_rows, sound
from reft_edge.convert.tensor_file import read_tensors
from reft_edge.errors import ReftEdgeError
from reft_edge.files import name_to_store
from reft_edge.json_files import parse_object
from reft_edge.steering.interventions import activation

TRAINED_BASE = "pytorch_model.bin"


_SCALARS = ("embed_dim", "interchange_dim")
_SUBFOLDER = "intervenable_model"
_MAX_CONFIG = 1 << 22
_MAX_FILES = 1 << 13
_NAMED = re.compile(
    r"intkey_layer[._](?P<layer>\d{1,4})[._](?:comp|repr)[._](?P<component>\w+?)[._]unit[._](?P<unit>\w+)[._]nunit[._](?P<count>\d+)"
    r"#(?P<number>\d{1,3})\.bin"
)
_BY_PATH = re.compile(
    r"intkey_comp[._](?:[\w.]*[._])?(?:layers|layer|h)\[(?P<layer>\d{1,4})\](?:[._](?P<module>\w+?))?[._]output[._]"
    r"unit[._](?P<unit>\w+)[._]nunit[._](?P<count>\d+)#(?P<number>\d{1,3})\.bin"
)
_MODULES = {None: "block", "self_attn": "attention", "mlp": "mlp"}


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


@dataclass(frozen=True)
class _File:
    path: Path
    layer: int
    component: str
    number: int


def from_pyreft(
    folder: Path, base: Callable[[], Base], asked: Asked, report: Callable[[str], None] = lambda note: None
) -> Adapter:
    """The adapter of a pyreft folder; `base` is called, and `report` told what to know, once the folder is
    found sound.

    Raises ReftEdgeError that names the option for what the folder does not store, the file that is malformed, or
    what cannot be carried: mixed interventions, other components, trained parameters of the base model.
    """
    if not any(folder.glob("intkey_*.bin")) and (folder / _SUBFOLDER).is_dir():
        folder = folder / _SUBFOLDER
    files = _list_files(folder)
    _refuse_trained_base(folder)
    described = _read_config(folder)
    if described is not None and (unlike := described.files ^ {file.path.name for file in files}):
        name = sorted(unlike)[0]
        which = (
            "lacks {}, which its config.json names"
            if name in described.files
            else "has {}, of which its config.json does not speak"
        )
        raise ReftEdgeError(f"{folder} {which.format(name)}")
    if asked.positions is None:
        raise ReftEdgeError(
            "pyreft does not store positions: give those that it was trained with by --positions, such as f7+l7"
        )
    if asked.raw is None:
        raise ReftEdgeError(
            "pyreft does not store how prompts were written: give --chat (through the model's chat template) or --raw"
        )
    layers, component = _layers(files)
    groups = len(files) // len(layers)
    tied = _tied(asked.positions, groups)
    if described is not None and asked.intervention not in (None, described.intervention):
        raise ReftEdgeError(
            f"--intervention is {asked.intervention}, but config.json says {described.intervention}; leave it out"
        )
    intervention = described.intervention if described else asked.intervention
    if intervention is not None:
        if intervention not in CLASSES.values():
            raise ReftEdgeError(f"--intervention {intervention} is none of {', '.join(CLASSES.values())}")
        _act_fn(intervention, asked.act_fn)
    whole = base()
    limit = _limit(described, intervention, whole.hidden_size)
    parts: list[dict[str, Array]] = []
    for file in sorted(files, key=lambda file: (file.layer, file.number)):
        state = read_tensors(file.path, limit)
        intervention = intervention or _recognise(state, folder)
        parts.append(_unpack(intervention, state, whole.hidden_size, folder))
    assert intervention is not None
    act_fn = _act_fn(intervention, asked.act_fn)
    ranks = sorted({part["b"].shape[0] for part in parts})
    if len(ranks) > 1:
        raise ReftEdgeError(f"{folder} has interventions of ranks {ranks}; an adapter file has one rank")
    if ranks == [0]:
        raise ReftEdgeError(f"{folder} has interventions of rank 0, which change nothing")
    add_bias = intervention == "noreft" and "b2" in parts[0]
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
        ranks[0],
        asked.positions,
        tied,
        act_fn,
        add_bias,
        "raw" if asked.raw else "chat",
        {"converted": {"from": "pyreft", "name": name_to_store(folder), "intervention": intervention}},
        component=component,
    )
    if any(span.first > 0 or 0 < span.last < UNLIMITED for span in config.spans):
        report(
            f"positions {asked.positions} count to the prompt's last token, as in pyreft's examples/loreft and make_multiple_position_* "
            "functions; its ReftSupervisedDataset, ReftGenerationDataset and ReftClassificationDataset leave the last token out, "
            "which no position spec here says"
        )
    return Adapter(config, tensors)


@dataclass(frozen=True)
class _Described:
    """What a config.json says."""

    intervention: str
    rank: int | None
    files: set[str]
    """Names of the files it speaks of."""


def _list_files(folder: Path) -> list[_File]:
    files = []
    for path in folder.glob("intkey_*"):
        match = _NAMED.fullmatch(path.name) or _BY_PATH.fullmatch(path.name)
        if match is None:
            raise ReftEdgeError(f"{folder}: {path.name} is no output of a block or of its attention or mlp")
        found = match.groupdict()
        component = (
            COMPONENTS.get(found["component"]) if "component" in found else _MODULES.get(found["module"])
        )
        if component is None:
            raise ReftEdgeError(
                f"{folder}: {path.name} edits {found.get('component') or found['module']}; "
                f"only {', '.join(COMPONENTS)} can be carried"
            )
        if found["unit"] != "pos" or found["count"] != "1":
            raise ReftEdgeError(
                f"{folder}: {path.name} edits units of {found['unit']} (nunit {found['count']}); "
                "only single positions (unit pos, nunit 1) can be carried"
            )
        files.append(_File(path, int(found["layer"]), component, int(found["number"])))
        if len(files) > _MAX_FILES:
            raise ReftEdgeError(f"{folder} has more than {_MAX_FILES:,} interventions")
    if not files:
        raise ReftEdgeError(f"{folder} holds no intkey_*.bin; expected what pyreft's ReftModel.save writes")
    return files


def _refuse_trained_base(folder: Path) -> None:
    """pyreft can train parts of the base, such as a classification head, which it stores beside the interventions."""
    path = folder / TRAINED_BASE
    if not os.path.lexists(path):
        return
    try:
        with open_inside(path) as file:
            large = os.fstat(file.fileno()).st_size > 1 << 20
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    names = ["more than 1 MB of them"] if large else sorted(read_tensors(path, 1 << 20))
    if names:
        raise ReftEdgeError(
            f"{folder} also holds trained parameters of the base model ({TRAINED_BASE}: {', '.join(names[:4]):.200}), "
            "which an adapter file cannot carry"
        )


def _read_config(folder: Path) -> _Described | None:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    try:
        with open_inside(path) as file:
            content = file.read(_MAX_CONFIG + 1)
        if len(content) > _MAX_CONFIG:
            raise ReftEdgeError(f"{path} has more than {_MAX_CONFIG:,} bytes")
        fields = parse_object(content, str(path))
        types = fields["intervention_types"]
        representations = fields["representations"]
        keys = fields["sorted_keys"]
        names = {str(name).removeprefix("<class '").removesuffix("'>").rpartition(".")[2] for name in types}
        ranks = {
            item["low_rank_dimension"] if isinstance(item, dict) else item[4] for item in representations
        }
        links = [item for item in representations if isinstance(item, list) and item[7] is not None]
        if not len(types) == len(representations) == len(keys):
            raise ValueError("its lists are of different lengths")
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{path} is not the config.json of a pyreft adapter: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ReftEdgeError(f"{path} is not the config.json of a pyreft adapter ({error!r:.100})") from error
    if unknown := sorted(names - CLASSES.keys()):
        raise ReftEdgeError(
            f"{folder} has interventions of class {', '.join(unknown):.100}; "
            f"only pyreft's own can be carried: {', '.join(CLASSES)}"
        )
    if len(names) != 1:
        raise ReftEdgeError(
            f"{folder} mixes {' and '.join(sorted(names))}; an adapter file has one intervention"
        )
    if links:
        raise ReftEdgeError(f"{folder} links interventions (intervention_link_key), which is not supported")
    ranks.discard(None)
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise ReftEdgeError(f"{path}: low_rank_dimension is not a whole number")
    rank = ranks.pop() if len(ranks) == 1 else None
    return _Described(CLASSES[names.pop()], rank, {f"intkey_{key}.bin" for key in keys})


def _layers(files: list[_File]) -> tuple[tuple[int, ...], str]:
    """The layers, ascending, once every layer is known to have the same interventions of one component."""
    components = sorted({file.component for file in files})
    if len(components) > 1:
        raise ReftEdgeError(
            f"the interventions act on the {' and the '.join(components)} of layers; an adapter file holds one of them"
        )
    numbers: dict[int, list[int]] = {}
    for file in files:
        numbers.setdefault(file.layer, []).append(file.number)
    layers = tuple(sorted(numbers))
    wanted = list(range(len(numbers[layers[0]])))
    for layer in layers:
        if sorted(numbers[layer]) != wanted:
            raise ReftEdgeError(
                f"layer {layers[0]} has {len(wanted)} interventions, layer {layer} has #{sorted(numbers[layer])}; "
                "an adapter file has as many at every layer, numbered from 0"
            )
    return layers, components[0]


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


def _limit(described: _Described | None, intervention: str | None, size: int) -> int:
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
