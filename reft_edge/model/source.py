"""Where MODEL comes from: a folder, a GGUF file, a Hugging Face Hub id, or a name of `packaged.py`.

Everything ends as a local folder in the Hugging Face layout. GGUF files are converted once into the cache
(`reft_edge.model.cache`). Which kind a file is, its first bytes say, not its name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.folders import replace_folder
from reft_edge.json_files import read_object
from reft_edge.model.cache import cache_folder, check_own
from reft_edge.model.gguf_header import MAX_GGUF_HEADER, GgufHeader, check_model, is_gguf, read_gguf_header
from reft_edge.model.hub import download_model
from reft_edge.model.packaged import PACKAGED_MODELS, packaged_gguf
from reft_edge.model.pretrained import from_folder

_LARGER = 1.25
"""Most parameters that a model may have for one number in its GGUF: some are stored once and used twice."""

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

    Raises ReftEdgeError if the file is malformed, ends early, or holds what transformers cannot read.
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
    report(f"converting {gguf.name} to the Hugging Face layout (once)")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = {"gguf_file": str(gguf.absolute())}
    config = from_folder(AutoConfig, gguf.parent, str(gguf), **file)
    _check_size(config, header, gguf)
    tokenizer = from_folder(AutoTokenizer, gguf.parent, str(gguf), **file)
    model = from_folder(AutoModelForCausalLM, gguf.parent, str(gguf), dtype=torch.float32, **file)
    with replace_folder(target, "config.json") as folder:
        _save_plain(model, folder)
        tokenizer.save_pretrained(folder)
    return target


def check_whole(name: str, missing: Any) -> None:
    """Raise ReftEdgeError if a loaded model got random numbers for weights that its folder does not have."""
    if missing:
        raise ReftEdgeError(f"{name} lacks {len(missing)} of its weights, {sorted(missing)[0]} among them")


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


def _stem(gguf: Path) -> str:
    return gguf.stem if gguf.suffix.lower() == ".gguf" else gguf.name


def _check_size(config: Any, header: GgufHeader, gguf: Path) -> None:
    """Raise ReftEdgeError if the metadata describe a model of more parameters than the file has numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers and torch raise many kinds here
        raise ReftEdgeError(f"cannot load {gguf}: {str(error) or type(error).__name__}") from error
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(tensor.shape) for tensor in header.tensors)
    if described > _LARGER * stored + 1024:
        raise ReftEdgeError(
            f"cannot read {gguf}: its metadata describe a model of {described:,} parameters, and it holds {stored:,} numbers"
        )


def _save_plain(model: Any, folder: Path) -> None:
    """`save_pretrained` for a model that transformers refuses to save because it came from a GGUF."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model.save_pretrained(folder)
