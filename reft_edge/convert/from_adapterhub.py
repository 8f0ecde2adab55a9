"""From folders of AdapterHub's library `adapters` (1.3.0): ReFT adapters, `adapter_config.json` and their weights.

Facts about the format, from that library's methods/reft.py and configuration/adapter_config.py: after block N runs
`reft_layer.refts.NAME.units.U`, with unit 0 at the first `prefix_positions` tokens and unit 1 at the last `suffix_positions`;
tied, unit 0 at both. A unit adds (act(W h + b) − P h) P with W `learned_source` and P `projection`, both [r, d]. With
`orthogonality`, P is stored in torch's Householder parametrisation of its transpose. Whether P h is subtracted is not stored
for a P that is not orthogonal: NoReftConfig does, DiReftConfig does not.
"""

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reft_edge.adapter.algebra import Array
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.convert.folder import open_inside
from reft_edge.convert.from_pyreft import Asked
from reft_edge.convert.rotation import householder_rows, sound
from reft_edge.convert.tensor_file import read_tensors
from reft_edge.errors import ReftEdgeError
from reft_edge.files import name_to_store
from reft_edge.json_files import parse_object
from reft_edge.steering.interventions import activation

CONFIG = "adapter_config.json"
_PICKLED, _PLAIN = "pytorch_adapter.bin", "adapter.safetensors"
_FUSION = "adapter_fusion_config.json"
_MAX_LISTED = 1000
_HEADS = ("pytorch_model_head.bin", "model_head.safetensors")
_HEAD_CONFIG = "head_config.json"
_MAX_CONFIG = 1 << 20
_PARTS = (("f", "prefix"), ("l", "suffix"))
_MAX_POSITIONS, _MAX_RANK, _MAX_SIZE = 9_999_999, 1 << 12, 1 << 20
_MAX_TENSORS = 1 << 14
_NAMED = re.compile(
    r"(?P<home>[\w.]*?)(?:layers|layer|h|block)\.(?P<layer>\d{1,4})\.reft_layer\.refts\.(?P<name>[^.]+)\.units\.(?P<unit>[01])\."
    r"(?P<tensor>.+)"
)
_SOURCE, _BIAS, _MATRIX = "learned_source.weight", "learned_source.bias", "projection.weight"
_ROTATION = "projection.parametrizations.weight"
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}
"""Names that the library knows under another name than transformers."""


def is_adapterhub(folder: Path) -> bool:
    """Whether a folder has the files that `save_adapter` of `adapters` writes."""
    return os.path.lexists(folder / CONFIG) and any(
        os.path.lexists(folder / name) for name in (_PICKLED, _PLAIN)
    )


def refuse_other_folders(folder: Path) -> None:
    """Raise ReftEdgeError for a folder of the library that is not one whole adapter.

    That is a fusion, one file without the other, or a folder with a folder for each adapter.
    """
    if os.path.lexists(folder / _FUSION):
        raise ReftEdgeError(
            f"{folder} is a fusion of adapters of AdapterHub, which mixes their outputs by attention; only one ReFT adapter can be "
            "carried: give the folder of one"
        )
    weights = [name for name in (_PICKLED, _PLAIN) if os.path.lexists(folder / name)]
    if weights:
        raise ReftEdgeError(
            f"{folder} has {weights[0]} but no {CONFIG}; expected both, as AdapterHub's save_adapter writes them"
        )
    if os.path.lexists(folder / CONFIG):
        raise ReftEdgeError(
            f"{folder} has {CONFIG} but neither {_PICKLED} nor {_PLAIN} of AdapterHub; adapters of PEFT cannot be carried"
        )
    try:
        inside = [path for path in islice(folder.iterdir(), _MAX_LISTED) if is_adapterhub(path)]
    except OSError as error:
        raise ReftEdgeError(f"cannot read {folder}: {error.strerror}") from error
    if inside:
        raise ReftEdgeError(
            f"{folder} has a folder for each adapter of AdapterHub: give one of them, such as {min(inside)}"
        )


def from_adapterhub(
    folder: Path,
    base: Callable[[], Base],
    asked: Asked,
    report: Callable[[str], None] = lambda note: None,
) -> Adapter:
    """The adapter of a folder; `base` is called, and `report` told what to know, once its description is found sound.

    Positions, act_fn and, for orthogonal projections, the intervention are stored; given, they must be the same, but positions
    without a suffix may be given with `+gen`, as the library edits when it decodes with a KV cache. Raises ReftEdgeError that
    names the option for what is not stored, or what is malformed or cannot be carried.
    """
    config = _read_config(folder)
    rank, shared = _number(config, "r", 1, _MAX_RANK), _flag(config, "tied_weights", False)
    stored = _stored_positions(folder, config)
    spec = _positions(folder, stored, asked.positions)
    act = str(config.get("non_linearity") or "linear").lower()
    act = _ACTIVATIONS.get(act, act)
    activation(act)  # raises for one that there is not
    _agree(folder, "act-fn", asked.act_fn, act)
    kind = _intervention(folder, config, asked.intervention)
    if asked.raw is None:
        raise ReftEdgeError(
            f"{folder} does not say how prompts are written: give --chat (through the model's chat template) or --raw"
        )
    whole = base()
    if "hidden_size" in config and _number(config, "hidden_size", 1, _MAX_SIZE) != whole.hidden_size:
        raise ReftEdgeError(
            f"{folder} is for hidden states of size {config['hidden_size']:,}; {whole.name} has {whole.hidden_size:,}"
        )
    if rank >= whole.hidden_size:
        raise ReftEdgeError(
            f"{folder} has rank {rank}; expected less than the hidden size {whole.hidden_size}"
        )
    parts = stored.split("+")
    units = [0] if shared or parts[-1].startswith("f") else [1] if len(parts) == 1 else [0, 1]
    found = _units(folder, _read_tensors(folder, rank, whole, shared), whole)
    layers = _layers(folder, config, found, whole)
    groups = [
        [_unpack(folder, kind, found[layer, unit], rank, whole.hidden_size) for unit in units]
        for layer in layers
    ]
    stacked = {
        name: np.stack([np.stack([unit[name] for unit in group]) for group in groups])
        for name in groups[0][0]
    }
    kind, tensors = sound(kind, stacked, report)
    _tell(folder, stored, spec, report)
    described = AdapterConfig(
        kind,
        whole.name,
        whole.fingerprint,
        whole.hidden_size,
        whole.num_layers,
        layers,
        rank,
        spec,
        "+" in spec and (shared or spec != stored),
        act,
        prompt_format="raw" if asked.raw else "chat",
        training={"converted": {"from": "adapterhub", "name": name_to_store(folder)}},
    )
    return Adapter(described, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    """The `config` of adapter_config.json, with the hidden size that stands beside it."""
    path = folder / CONFIG
    try:
        with open_inside(path) as file:
            content = file.read(_MAX_CONFIG + 1)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_CONFIG:
        raise ReftEdgeError(f"{path} has more than {_MAX_CONFIG:,} bytes")
    described = parse_object(content, str(path))
    config = described.get("config")
    if not isinstance(config, dict) or config.get("architecture") != "reft":
        kind = config.get("architecture") if isinstance(config, dict) else described.get("peft_type")
        raise ReftEdgeError(
            f"{folder} is an adapter of AdapterHub or PEFT of the kind {kind!r:.60}; only AdapterHub's ReFT adapters (reft) can be carried"
        )
    if not _flag(config, "output_reft", True):
        raise ReftEdgeError(f"{path}: output_reft is false; only edits of blocks' outputs can be carried")
    return config | ({"hidden_size": described["hidden_size"]} if "hidden_size" in described else {})


def _number(config: dict[str, Any], name: str, least: int, most: int) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ReftEdgeError(
            f"{CONFIG}: {name} is {value!r:.60}; expected a whole number from {least} to {most:,}"
        )
    return value


def _flag(config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ReftEdgeError(f"{CONFIG}: {name} is {value!r:.60}; expected true or false")
    return value


def _stored_positions(folder: Path, config: dict[str, Any]) -> str:
    """The spec of the prefix and suffix positions, such as f3+l2."""
    counts = [(part, _number(config, f"{name}_positions", 0, _MAX_POSITIONS)) for part, name in _PARTS]
    if not (parts := [f"{part}{count}" for part, count in counts if count]):
        raise ReftEdgeError(f"{folder} has no prefix_positions and no suffix_positions: it changes nothing")
    return "+".join(parts)


def _positions(folder: Path, stored: str, given: str | None) -> str:
    """What is stored, or, where it has no suffix and that is asked for, the generated tokens beside it."""
    if given == f"{stored}+gen" and "l" not in stored:
        return given
    _agree(folder, "positions", given, stored)
    return stored


def _agree(folder: Path, option: str, given: str | None, stored: str) -> None:
    if given not in (None, stored):
        raise ReftEdgeError(
            f"--{option} is {given}, but the {CONFIG} of {folder} says {stored}; leave it out"
        )


def _intervention(folder: Path, config: dict[str, Any], given: str | None) -> str:
    orthogonal = _flag(config, "orthogonality", True)
    kinds = ("loreft", "direft") if orthogonal else ("noreft", "nodireft")
    if given is not None and given not in kinds:
        raise ReftEdgeError(
            f"--intervention is {given}, but the tensors of {folder} are those of {' or '.join(kinds)}"
        )
    if "subtract_projection" in config:
        return kinds[0] if _flag(config, "subtract_projection", True) else kinds[1]
    if given is not None:
        return given
    if orthogonal:
        return kinds[0]
    raise ReftEdgeError(
        f"AdapterHub does not store whether {folder} is of NoReftConfig or of DiReftConfig: give --intervention noreft, or "
        "nodireft for DiReftConfig"
    )


def _read_tensors(folder: Path, rank: int, base: Base, tied: bool) -> dict[str, Array]:
    size, units = base.hidden_size, (1 if tied else 2) * base.num_layers
    limit = 8 * units * (size * size + 3 * rank * size + rank)
    if os.path.lexists(folder / _PICKLED) or not os.path.lexists(folder / _PLAIN):
        return read_tensors(folder / _PICKLED, limit, count=4 * units)
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / _PLAIN
    try:
        with open_inside(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found > limit + (1 << 16) + (1 << 10) * units:
                raise ReftEdgeError(f"{path} has {found:,} bytes; its tensors can have {limit:,} at most")
            tensors = load(file.read(found))
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise ReftEdgeError(f"{path} is not a usable safetensors file: {error}") from error


Units = dict[tuple[int, int], dict[str, Array]]
"""By layer and unit, the tensors by their last names."""


def _units(folder: Path, tensors: dict[str, Array], base: Base) -> Units:
    if len(tensors) > _MAX_TENSORS:
        raise ReftEdgeError(f"{folder} has {len(tensors):,} tensors; at most {_MAX_TENSORS:,} are accepted")
    found: Units = {}
    homes = set()
    for name, tensor in tensors.items():
        match = _NAMED.fullmatch(name)
        if match is None:
            raise ReftEdgeError(
                f"{folder} holds a tensor {name!r:.120}, which no ReFT adapter of AdapterHub has"
            )
        homes.add((match["home"], match["name"]))
        if int(match["layer"]) >= base.num_layers:
            raise ReftEdgeError(
                f"{folder} edits layer {match['layer']}; {base.name} has layers 0 to {base.num_layers - 1}"
            )
        found.setdefault((int(match["layer"]), int(match["unit"])), {})[match["tensor"]] = tensor
    if len(homes) != 1:
        raise ReftEdgeError(f"{folder} holds {len(homes)} adapters; expected one, in one stack of layers")
    return found


def _layers(folder: Path, config: dict[str, Any], found: Units, base: Base) -> tuple[int, ...]:
    layers = tuple(sorted({layer for layer, _ in found}))
    units = sorted({unit for _, unit in found})
    wanted = [0] if _flag(config, "tied_weights", False) else [0, 1]
    if units != wanted or len(found) != len(layers) * len(units):
        raise ReftEdgeError(f"{folder} does not have the units {wanted} at every layer that it edits")
    said = config.get("layers", "all")
    if said == "all":
        said = list(range(base.num_layers))
    if not isinstance(said, list) or sorted(set(map(str, said))) != sorted(map(str, layers)):
        raise ReftEdgeError(f"{folder} holds layers {list(layers)!r:.120}; its {CONFIG} says {said!r:.120}")
    return layers


def _unpack(folder: Path, kind: str, state: dict[str, Array], rank: int, size: int) -> dict[str, Array]:
    """One unit's tensors by our names, [r, d] and [r]."""
    shapes: dict[str, tuple[int, ...]] = {_SOURCE: (rank, size), _BIAS: (rank,)}
    if kind in ("loreft", "direft"):
        shapes |= {f"{_ROTATION}.original": (rank, size), f"{_ROTATION}.0.base": (size, size)}
    else:
        shapes[_MATRIX] = (rank, size)
    held = {name: tensor.shape for name, tensor in state.items()}
    if held != shapes:
        raise ReftEdgeError(
            f"{folder}: a {kind} unit has tensors {held!r:.300}; expected {shapes} for this base"
        )
    if any(not np.isfinite(tensor).all() for tensor in state.values()):
        raise ReftEdgeError(f"{folder} holds NaN or infinity")
    if kind in ("loreft", "direft"):
        original = np.ascontiguousarray(state[f"{_ROTATION}.original"].T)
        rows = householder_rows(original, state[f"{_ROTATION}.0.base"])
        return {"R": rows, "W": state[_SOURCE], "b": state[_BIAS]}
    return {"W1": state[_SOURCE], "W2": state[_MATRIX], "b": state[_BIAS]}


def _tell(folder: Path, stored: str, spec: str, report: Callable[[str], None]) -> None:
    cached = f"with a KV cache it also edits every generated token: give --positions {stored}+gen for that"
    if "l" in stored:
        cached = "with a KV cache it cannot generate where there are suffix positions, so generated tokens are not edited here"
    report(
        f"positions {spec}: of a prompt too short for them, AdapterHub edits all tokens, here at most half count for each part"
        + (f"; {cached}" if spec == stored else "")
    )
    if all(os.path.lexists(folder / name) for name in (_PICKLED, _PLAIN)):
        report(f"{_PICKLED} is read, as AdapterHub does where {_PLAIN} is beside it")
    if any((folder / name).exists() for name in _HEADS):
        report(f"the prediction head beside it ({_HEAD_CONFIG}) is left: the base's own head is used")
