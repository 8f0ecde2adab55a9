"""Encoders: which model folders hold one, their text as tokens, and their PyTorch model."""

from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import read_object
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.pretrained import check_whole, from_folder
from reft_edge.model.source import ModelFolder
from reft_edge.model.texts import TextTokens

MODEL_TYPES = ("bert", "distilbert", "roberta")
TASKS = ("completion", "classification", "preference")


def is_encoder(model: ModelFolder) -> bool:
    """Whether the folder holds an encoder of MODEL_TYPES, by its config.json."""
    config = read_config(model)
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    decodes = config.get("is_decoder") or any(str(name).endswith("ForCausalLM") for name in names)
    return config.get("model_type") in MODEL_TYPES and not decodes


def check_task(task: str, model: ModelFolder) -> None:
    """Raise ReftEdgeError unless the task is known and the model can learn it."""
    if task not in TASKS:
        raise ReftEdgeError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if (task == "classification") != is_encoder(model):
        kind, needed = (
            ("an encoder", TASKS[1]) if is_encoder(model) else ("no encoder", f"{TASKS[0]} or {TASKS[2]}")
        )
        raise ReftEdgeError(
            f"{model.name} is {kind} ({', '.join(MODEL_TYPES)} are); it is trained with --task {needed}"
        )


def read_config(model: ModelFolder) -> dict[str, Any]:
    """config.json as it stands. Raises ReftEdgeError if it cannot be read."""
    return read_object(model.path / "config.json")


def context_length(config: dict[str, Any]) -> int:
    """Most tokens that have a position of their own; RoBERTa's positions start after the padding token's id."""
    positions = _count(config, "max_position_embeddings", 512)
    if config.get("model_type") == "roberta":
        return positions - _count(config, "pad_token_id", 1) - 1
    return positions


def load_text_tokens(model: ModelFolder, limit: int | None = None) -> TextTokens:
    """The model's own tokenizer and context length, or a smaller `limit`. Raises ReftEdgeError for one below 1."""
    longest = context_length(read_config(model))
    if limit is not None and limit < 1:
        raise ReftEdgeError(f"texts cannot be cut to {limit} tokens; expected 1 or more")
    return TextTokens.of(load_model_prompts(model).tokenizer, min(longest, limit or longest))


def default_pooling(model: ModelFolder) -> str:
    """`mean` for a sentence-transformers model that pools so, else `cls`."""
    path = model.path / "1_Pooling" / "config.json"
    return "mean" if path.is_file() and read_object(path).get("pooling_mode_mean_tokens") is True else "cls"


def load_network(model: ModelFolder) -> Any:
    """The PyTorch model of either kind. Raises ReftEdgeError as `load_encoder` and `load_model` do."""
    return load_encoder(model) if is_encoder(model) else load_model(model)


def load_encoder(model: ModelFolder) -> Any:
    """The PyTorch encoder without a pooler or head, in evaluation mode, its parameters frozen.

    Raises ReftEdgeError if it cannot be loaded or the folder lacks some of its weights.
    """
    import torch
    from transformers import AutoModel

    encoder, loading = from_folder(
        AutoModel, model.path, model.name, dtype=torch.float32, output_loading_info=True
    )
    check_whole(model.name, [name for name in loading["missing_keys"] if not name.startswith("pooler.")])
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    return encoder.eval().requires_grad_(False)


def has_token_types(encoder: Any) -> bool:
    """Whether the PyTorch encoder tells the first text of a pair from the second."""
    return int(getattr(encoder.config, "type_vocab_size", 0) or 0) > 1


def _count(config: dict[str, Any], name: str, default: int) -> int:
    found = config.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ReftEdgeError(f"{name} in config.json is {found!r:.80}; expected a whole number")
    return found
