"""Where MODEL comes from: a folder, a GGUF file, a Hugging Face Hub id, or a name of `packaged.py`.

Everything ends as a local folder in the Hugging Face layout. GGUF files are converted once into the cache
(`reft_edge.model.cache`). Which kind a file is, its first bytes say, not its name.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.folders import replace_folder
from reft_edge.json_files import read_object
from reft_edge.model.cache import cache_folder, check_own
from reft_edge.model.gguf_conversion import bytes_to_write, write_model, write_tokenizer
from reft_edge.model.gguf_header import MAX_GGUF_HEADER, check_model, is_gguf, read_gguf_header
from reft_edge.model.hub import download_model
from reft_edge.model.packaged import PACKAGED_MODELS, packaged_gguf
from reft_edge.model.pretrained import from_folder

Report = Callable[[str], None]


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine, in the Hugging Face layout."""

    path: Path
    name: str
    """For people: what the user asked for, without folders."""
    gguf: Path | None = None
    """The file that `path` was converted from, if it was."""


def resolve_model(model: str, report: Report = lambda message: None) -> ModelFolder:
    """Make MODEL a local folder; `report` is told of steps that take seconds.

    Raises ReftEdgeError if it is none of: a folder with config.json, a GGUF file, a name of `PACKAGED_MODELS`, a Hub id.
    """
    path = Path(model)
    if path.is_dir():
        return _folder(model, path)
    if path.exists() or path.is_symlink():
        _check_gguf(path)
        return ModelFolder(convert_gguf(path, report), _stem(path), path)
    if path.suffix.lower() == ".gguf":
        raise ReftEdgeError(f"there is no file {model}")
    if model in PACKAGED_MODELS:
        gguf = packaged_gguf(model, report)
        return ModelFolder(convert_gguf(gguf, report), PACKAGED_MODELS[model].title, gguf)
    if model and model.count("/") <= 1 and not model.startswith((".", "/")):
        return ModelFolder(download_model(model, report), model)
    raise ReftEdgeError(
        f"there is no model at {model}; give a folder, a .gguf file, a Hub id, or {' or '.join(PACKAGED_MODELS)}"
    )


def convert_gguf(gguf: Path, report: Report = lambda message: None) -> Path:
    """A Hugging Face folder with the GGUF's dequantised weights, from the cache if it was converted before.

    Raises ReftEdgeError if the file is malformed, ends early, or holds what transformers cannot read, and if the disk has too
    little room.
    """
    header = read_gguf_header(gguf, MAX_GGUF_HEADER)
    target = cache_folder() / f"{_stem(gguf)}-{sha256_of(gguf)[:16]}"
    if target.is_dir():
        check_own(target)
        return target
    try:
        check_model(header)
    except ReftEdgeError as error:
        raise ReftEdgeError(f"cannot read {gguf}: {error}") from error
    _check_room(gguf, bytes_to_write(header), target.parent)
    report(f"converting {gguf.name} to the Hugging Face layout (once)")
    with replace_folder(target, "config.json") as folder:
        write_tokenizer(gguf, folder)
        write_model(gguf, header, folder)
    return target


def load_config(folder: ModelFolder) -> Any:
    """The configuration of the model's text part, as transformers reads it. Raises ReftEdgeError if it cannot."""
    from transformers import AutoConfig

    return from_folder(AutoConfig, folder.path, folder.name).get_text_config()


def class_name(config: Any) -> str:
    """The name of the model's class, also where its config.json does not say it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = getattr(config, "architectures", None)
    return str(
        named[0] if named else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    )


def _folder(model: str, path: Path) -> ModelFolder:
    if not (path / "config.json").is_file():
        raise ReftEdgeError(
            f"{model} has no config.json; expected a model in the Hugging Face layout"
            + (
                " (this is an exported folder: train and export take the model it was made from)"
                if (path / "reft_edge.json").is_file()
                else ""
            )
        )
    read_object(path / "config.json")
    return ModelFolder(path.resolve(), path.resolve().name)


def _check_gguf(path: Path) -> None:
    try:
        if is_gguf(path):
            return
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    raise ReftEdgeError(
        f"{path} is a file of unknown kind: it does not begin as GGUF does; give a GGUF file, a folder in the Hugging Face "
        "layout, or a Hub id"
    )


def _check_room(gguf: Path, needed: int, folder: Path) -> None:
    """Raise ReftEdgeError before the conversion has filled the disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ReftEdgeError(
            f"there is too little room to convert {gguf.name}: its weights take {needed / 1e9:,.1f} GB in {folder}, four bytes "
            f"each, and {free / 1e9:,.1f} GB are free; make room, or set REFT_EDGE_CACHE to a folder on another disk"
        )


def _stem(gguf: Path) -> str:
    return gguf.stem if gguf.suffix.lower() == ".gguf" else gguf.name
