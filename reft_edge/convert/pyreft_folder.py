"""A folder of pyreft's: its intervention files by their names, what its config.json says, and whether the two agree."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reft_edge.convert.folder import open_inside
from reft_edge.convert.pyreft_format import CLASSES, COMPONENTS
from reft_edge.convert.tensor_file import read_tensors
from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import parse_object

TRAINED_BASE = "pytorch_model.bin"
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
class PyreftFile:
    """One intervention's file; `number` says which of the layer's interventions it is."""

    path: Path
    layer: int
    component: str
    number: int


@dataclass(frozen=True)
class Described:
    """What a config.json says."""

    intervention: str
    rank: int | None
    files: set[str]
    """Names of the files it speaks of."""


@dataclass(frozen=True)
class PyreftFolder:
    """What a folder holds, its tensors left unread."""

    path: Path
    files: list[PyreftFile]
    described: Described | None
    """None without a config.json."""


def read_folder(folder: Path) -> PyreftFolder:
    """Find the interventions in a folder, or in its folder `intervenable_model`.

    Raises ReftEdgeError if there are none, if they edit what cannot be carried, if the base was trained, too, or if
    config.json is malformed or names other files.
    """
    if not any(folder.glob("intkey_*.bin")) and (folder / _SUBFOLDER).is_dir():
        folder = folder / _SUBFOLDER
    files = _list_files(folder)
    _refuse_trained_base(folder)
    described = _read_config(folder)
    if described is not None:
        _check_names(described, files, folder)
    return PyreftFolder(folder, files, described)


def find_layers(files: Sequence[PyreftFile]) -> tuple[tuple[int, ...], str]:
    """The layers, ascending, once every layer is known to have the same interventions of one component.

    Raises ReftEdgeError if they have not.
    """
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


def _list_files(folder: Path) -> list[PyreftFile]:
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
        files.append(PyreftFile(path, int(found["layer"]), component, int(found["number"])))
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


def _read_config(folder: Path) -> Described | None:
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
    return Described(CLASSES[names.pop()], rank, {f"intkey_{key}.bin" for key in keys})


def _check_names(described: Described, files: Sequence[PyreftFile], folder: Path) -> None:
    """Raise ReftEdgeError unless config.json and the folder have the same files."""
    if unlike := described.files ^ {file.path.name for file in files}:
        name = sorted(unlike)[0]
        which = (
            "lacks {}, which its config.json names"
            if name in described.files
            else "has {}, which its config.json does not name"
        )
        raise ReftEdgeError(f"{folder} {which.format(name)}")
