"""What a conversion's source and result are, and that all that it needs was given."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.convert.base import find_base
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place
from reft_edge.model.gguf_header import is_gguf

OURS, GGUF, PACKED, EASYSTEER = ".safetensors", ".gguf", ".onnx_adapter", ".json"
_MAX_HUB = 8 << 30
"""Bytes; DiReFT of a model with 7 billion parameters, untied at every layer, has 4.5 GB, since pyreft stores [d, d] for each."""
_HUB_FILES = [
    "config.json",
    "*intkey_*.bin",
    "*pytorch_model.bin",
    "adapter_config.json",
    "pytorch_adapter.bin",
    "adapter.safetensors",
]


@dataclass(frozen=True)
class Given:
    """What the source's format may not say."""

    model: str | None = None
    folder: Path | None = None
    """An exported folder of the base model."""
    positions: str | None = None
    act_fn: str | None = None
    intervention: str | None = None
    raw: bool | None = None


@dataclass(frozen=True)
class Converted:
    """What was read and what became of it."""

    source: str
    result: str
    """Formats: `reft-edge`, `pyreft`, `adapterhub`, `control vector`, `onnx_adapter` or `easysteer`."""
    adapter: Adapter


def convert(
    source: str, output: Path, given: Given, report: Callable[[str], None] = lambda note: None
) -> Converted:
    """Convert between our adapter file and another library's format; formats are told from names.

    `report` is told what a user must know, such as what the other library does not store. Raises
    ReftEdgeError that names the option for what is missing, or what cannot be carried.
    """
    path = Path(source)
    kind, ending = kind_of(path), output.suffix.lower()
    if kind != OURS:
        if ending != OURS:
            raise ReftEdgeError(f"{output} is no adapter file: other formats are converted to {OURS}")
        check_place(output)
        library, adapter = _read(source, kind, given, report)
        save_adapter(adapter, output)
        return Converted(library, "reft-edge", adapter)
    if ending == OURS:
        raise ReftEdgeError(
            f"{source} and {output} are both adapter files; give a {GGUF}, {PACKED} or {EASYSTEER} file, or a folder for pyreft"
        )
    _refuse(given, source, "positions", "act_fn", "intervention", "raw", "model")
    if ending != PACKED and given.folder is not None:
        raise ReftEdgeError(f"{source} says which base it is for; --for DIR is for {PACKED} files")
    adapter = load_adapter(path)
    if ending in (GGUF, PACKED, EASYSTEER):
        check_place(output)
    if ending == GGUF:
        from reft_edge.convert.control_vector import to_control_vector

        to_control_vector(adapter, output)
        return Converted("reft-edge", "control vector", adapter)
    if ending == PACKED:
        from reft_edge.convert.onnx_adapter import pack_adapter

        if given.folder is None:
            raise ReftEdgeError(f"a {PACKED} file is for one exported folder: give it with --for DIR")
        pack_adapter(path, given.folder, output, report=report)
        return Converted("reft-edge", "onnx_adapter", adapter)
    if ending == EASYSTEER:
        from reft_edge.convert.to_easysteer import to_easysteer

        for note in to_easysteer(adapter, output):
            report(note)
        return Converted("reft-edge", "easysteer", adapter)
    if ending:
        raise ReftEdgeError(
            f"{output} has no ending that is known: {GGUF}, {PACKED}, {EASYSTEER} for EasySteer, or none, for a folder that pyreft loads"
        )
    from reft_edge.convert.to_pyreft import to_pyreft

    for note in to_pyreft(adapter, output):
        report(note)
    return Converted("reft-edge", "pyreft", adapter)


def kind_of(path: Path) -> str:
    """OURS, GGUF, PACKED or nothing, for a folder: by the first bytes of a file that is GGUF, else by the name's ending."""
    try:
        if not path.is_dir() and is_gguf(path):
            return GGUF
    except OSError:  # what reads it says so
        pass
    ending = path.suffix.lower()
    return ending if ending in (OURS, GGUF, PACKED) and not path.is_dir() else ""


def _read(source: str, kind: str, given: Given, report: Callable[[str], None]) -> tuple[str, Adapter]:
    path = Path(source)
    if kind == PACKED:
        from reft_edge.convert.onnx_adapter import from_onnx_adapter
        from reft_edge.model.manifest import load_manifest

        if given.folder is None:
            raise ReftEdgeError(f"{source} is for one exported folder: give it with --for DIR")
        _refuse(given, source, "positions", "act_fn", "intervention", "model")
        return "onnx_adapter", from_onnx_adapter(path, load_manifest(given.folder), _raw(given, source))
    if kind == GGUF:
        from reft_edge.convert.control_vector import EVERY_TOKEN, from_control_vector

        _refuse(given, source, "act_fn", "intervention")
        raw = _raw(given, source)
        if not path.exists():
            raise ReftEdgeError(f"there is no file {source}")
        base = find_base(given.model, given.folder, report)
        if given.positions is None:
            report(f"control vectors act on every token: positions {EVERY_TOKEN}")
        return "control vector", from_control_vector(path, base, raw, given.positions or EVERY_TOKEN)
    from reft_edge.convert.from_adapterhub import from_adapterhub, is_adapterhub, refuse_other_folders
    from reft_edge.convert.from_pyreft import Asked, from_pyreft

    asked = Asked(given.positions, given.act_fn, given.intervention, given.raw)
    folder = _foreign_folder(source, report)

    def found() -> Base:
        return find_base(given.model, given.folder, report)

    if is_adapterhub(folder):
        return "adapterhub", from_adapterhub(folder, found, asked, report)
    refuse_other_folders(folder)
    return "pyreft", from_pyreft(folder, found, asked, report)


def _raw(given: Given, source: str) -> bool:
    if given.raw is None:
        raise ReftEdgeError(
            f"{source} does not say how prompts are written: give --chat (through the model's chat template) or --raw"
        )
    return given.raw


def _refuse(given: Given, source: str, *options: str) -> None:
    if needless := [name for name in options if getattr(given, name) is not None]:
        option = "raw/--chat" if needless[0] == "raw" else needless[0].replace("_", "-")
        raise ReftEdgeError(f"{source} already says what --{option} would; leave the option out")


def _foreign_folder(source: str, report: Callable[[str], None]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ReftEdgeError(
            f"cannot convert {source}; give a folder that pyreft or AdapterHub wrote or its Hub id, or a file that ends in {GGUF}, "
            f"{PACKED} or {OURS}"
        )
    from huggingface_hub import snapshot_download

    from reft_edge.model.hub import from_cache, look_up, unreachable

    try:
        revision, sizes = look_up(source, report)
    except Exception as error:  # huggingface_hub and what it stands on raise many kinds
        return from_cache(source, error)
    _check_listing(source, sizes)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise unreachable(source, error) from error


def _check_listing(source: str, sizes: Mapping[str, int]) -> None:
    """Raise ReftEdgeError, before anything is downloaded, for a repository that is none of pyreft's or a huge one."""
    wanted = {name: size for name, size in sizes.items() if any(fnmatch(name, glob) for glob in _HUB_FILES)}
    if not any(fnmatch(name, "*intkey_*.bin") or name == "adapter_config.json" for name in wanted):
        raise ReftEdgeError(
            f"{source} on the Hub holds no intkey_*.bin, which pyreft's ReftModel.save writes, and no adapter_config.json of AdapterHub"
        )
    if (total := sum(wanted.values())) > _MAX_HUB:
        raise ReftEdgeError(
            f"{source} on the Hub has {total:,} bytes to download, more than {_MAX_HUB:,}; look at it first, then give its folder"
        )
