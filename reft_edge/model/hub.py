"""Models on the Hugging Face Hub: what of a repository is downloaded, which is one set of weights."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from reft_edge.deadline import in_time
from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import read_object
from reft_edge.model.pretrained import quiet_libraries

LOOK_UP = 120.0
"""Seconds that the Hub may take to say what a repository holds."""

_INDEX = "{}.index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers looks for them."""
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")
_TEXT = re.compile(
    r"[^/]+\.(?:json|model|txt|jinja|vocab)|1_Pooling/config\.json|additional_chat_templates/[^/]+\.jinja"
)


def download_model(model: str, report: Callable[[str], None]) -> Path:
    """The folder in the Hub's cache that holds the model's configuration, tokenizer and one set of weights.

    Raises ReftEdgeError if the Hub cannot be reached and the model is not in the cache, or has no weights to load.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    quiet_libraries()
    try:
        revision, sizes = look_up(model, report)
    except Exception as error:  # huggingface_hub and what it stands on raise many kinds
        return from_cache(model, error)
    index = index_file(sizes)
    try:
        shards = shard_names(Path(hf_hub_download(model, index, revision=revision))) if index else ()
        files = choose_files(model, sizes, shards)
        report(f"downloading {model} ({sum(sizes[name] for name in files) / 1e6:,.0f} MB, once)")
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except ReftEdgeError:
        raise
    except Exception as error:
        raise unreachable(model, error) from error


def look_up(model: str, report: Callable[[str], None]) -> tuple[str | None, dict[str, int]]:
    """The newest revision of a repository of models, and its files with their bytes.

    Raises ReftEdgeError if the Hub takes longer than LOOK_UP, and many other exceptions if it has none or cannot be reached.
    """
    from huggingface_hub import HfApi

    report(f"looking up {model} on the Hugging Face Hub")
    found = in_time(
        lambda: HfApi().model_info(model, files_metadata=True, timeout=30), LOOK_UP, "the look-up on the Hub"
    )
    return found.sha, {file.rfilename: file.size or 0 for file in found.siblings or []}


def from_cache(model: str, error: Exception) -> Path:
    """The copy of an earlier download. Raises ReftEdgeError with the reason why the Hub gave none if there is no such copy."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:
        raise unreachable(model, error) from error


def unreachable(model: str, error: Exception) -> ReftEdgeError:
    """What to raise where neither this machine nor the Hub has a model."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ReftEdgeError(
        f"there is no folder or file {model}, and it could not be had from the Hub: {reason}"
    )


def index_file(names: Collection[str]) -> str | None:
    """The file that says which parts the weights are in; None where they are one file or there are none."""
    for weights in _WEIGHTS:
        if weights in names:
            return None
        if _INDEX.format(weights) in names:
            return _INDEX.format(weights)
    return None


def shard_names(index: Path) -> tuple[str, ...]:
    """The parts that an index names, each once. Raises ReftEdgeError for one that is none."""
    weights = read_object(index).get("weight_map")
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights.values()):
        raise ReftEdgeError(f"{index} does not say which files hold the weights")
    return tuple(sorted(set(weights.values())))


def choose_files(model: str, names: Collection[str], shards: Collection[str] = ()) -> list[str]:
    """Configuration, tokenizer and one set of weights, of all the files in a repository.

    Raises ReftEdgeError that says what it holds if there are no weights in a layout that can be loaded.
    """
    weights = sorted(shards) or [name for name in _WEIGHTS if name in names][:1]
    if missing := [name for name in weights if name not in names]:
        raise ReftEdgeError(f"{model} on the Hub lacks {missing[0]}, which its index of weights names")
    if not weights:
        held = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
        hint = (
            "; download the .gguf file that you want and give its path"
            if any(name.endswith(".gguf") for name in held)
            else ""
        )
        raise ReftEdgeError(
            f"{model} on the Hub has no {' or '.join(_WEIGHTS)}, nor an index of parts of one; "
            f"it has {', '.join(held[:4]) or 'no weights'}{hint}"
        )
    indexes = {_INDEX.format(name) for name in _WEIGHTS} - {index_file(names)}
    texts = [name for name in names if _TEXT.fullmatch(name) and name not in indexes]
    return sorted({*texts, *weights})
