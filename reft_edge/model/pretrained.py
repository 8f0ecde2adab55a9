"""Model folders handed to transformers: in one place, quietly, and never with Python code that a folder brings."""

from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import read_object

_TWO_KINDS = {"full_attention", "sliding_attention"}


def from_folder(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """What `kind.from_pretrained` makes of a folder; `kind` is a class of transformers', `name` is for people.

    Nothing is looked up on the Hub, and nobody is asked whether the folder's code may run: it does not. Raises ReftEdgeError
    if transformers cannot load the folder.
    """
    quiet_libraries()
    if not kind.__name__.endswith("Tokenizer") and "gguf_file" not in options:
        config = read_object(folder / "config.json")
        if transformers_4():
            options |= rotary_for_4(config, name)
        if caps_attention(config):
            options.setdefault("attn_implementation", "eager")
    try:
        return kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # transformers, gguf and torch raise many kinds here
        if _brings_code(folder):
            raise ReftEdgeError(
                f"{name} is a model with Python code of its own (auto_map in its config.json), which is never run; "
                "give a model that transformers has a class for"
            ) from error
        raise ReftEdgeError(f"cannot load {name}: {str(error) or type(error).__name__}") from error


def check_whole(name: str, missing: Any) -> None:
    """Raise ReftEdgeError if a loaded model got random numbers for weights that its folder does not have."""
    if missing:
        raise ReftEdgeError(f"{name} lacks {len(missing)} of its weights, {sorted(missing)[0]} among them")


def caps_attention(config: dict[str, Any]) -> bool:
    """Whether a config.json caps attention's logits (Gemma 2), which PyTorch's fused attention cannot: transformers 5.17 and
    older take it all the same, and leave the cap out."""
    text = config.get("text_config")
    return any(
        isinstance(part, dict) and part.get("attn_logit_softcapping") is not None for part in (config, text)
    )


def rotary_for_4(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What transformers 4 must be told of a config.json that transformers 5 wrote: it does not look at `rope_parameters`.

    Empty where there is nothing to tell. Raises ReftEdgeError if `name` has settings that transformers 4 cannot hold.
    """
    text, rotary = config.get("text_config"), config.get("rope_parameters")
    if isinstance(text, dict) and (told := rotary_for_4(text, name)):
        return {"text_config": text | told}
    if not isinstance(rotary, dict) or "rope_theta" in config:
        return {}
    settings: dict[str, Any] = {}
    if config.get("model_type") == "gemma3_text" and set(rotary) == _TWO_KINDS:
        settings["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    if any(isinstance(value, dict) for value in rotary.values()):
        raise ReftEdgeError(
            f"{name} has rotary settings for each kind of layer (rope_parameters in its config.json), which transformers 4 "
            "does not know; install transformers 5"
        )
    scaling = dict(rotary)
    settings |= {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    return (
        settings if scaling.get("rope_type", "default") == "default" else settings | {"rope_scaling": scaling}
    )


def transformers_4() -> bool:
    """Whether the installed transformers is of the 4th series."""
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5


def quiet_libraries() -> None:
    """transformers and huggingface_hub print bars and warnings of their own, which would run into ours and into logs."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _brings_code(folder: Path) -> bool:
    try:
        return "auto_map" in read_object(folder / "config.json")
    except ReftEdgeError:
        return False
