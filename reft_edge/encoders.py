"""Encoders: which model folders hold one, their text as tokens, and their PyTorch model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import read_object
from reft_edge.models import ModelFolder, check_whole, load_model_prompts
from reft_edge.pretrained import from_folder
from reft_edge.prompts import encode

MODEL_TYPES = ("bert", "distilbert", "roberta")
TASKS = ("completion", "classification", "preference")

Text = str | tuple[str, str]
"""A text, or a pair of texts."""


@dataclass(frozen=True)
class Tokens:
    """One text, or pair of texts, as the encoder reads it, special tokens included."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """0 for the first text's tokens, 1 for the second's."""


@dataclass(frozen=True)
class TextTokens:
    """From text to tokens, cut to what the encoder can read."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, limit: int) -> "TextTokens":
        """Cut to `limit` tokens, special ones included; of a pair, the longer text is cut first."""
        tokenizer.enable_truncation(limit)
        tokenizer.no_padding()
        return cls(tokenizer)

    def batch(self, texts: Sequence[Text]) -> list[Tokens]:
        """Several texts at once; other threads run meanwhile. Raises ReftEdgeError if nothing is left to read of one."""
        found = self.tokenizer.encode_batch(list(texts))
        if not all(encoded.ids for encoded in found):
            raise ReftEdgeError("the text is empty; an encoder needs at least one token")
        return [Tokens(tuple(encoded.ids), tuple(encoded.type_ids)) for encoded in found]

    def __call__(self, text: Text) -> Tokens:
        """Raises ReftEdgeError if nothing is left to read."""
        first, second = (text, None) if isinstance(text, str) else text
        encoded = encode(self.tokenizer, first, second)
        if not encoded.ids:
            raise ReftEdgeError("the text is empty; an encoder needs at least one token")
        return Tokens(tuple(encoded.ids), tuple(encoded.type_ids))


def parse_row(row: Any) -> tuple[Text, str]:
    """The text, or pair of texts, and label of a parsed row. Raises ReftEdgeError if it is not of the known form."""
    if not isinstance(row, dict):
        raise ReftEdgeError('expected an object like {"text": ..., "label": ...}')
    text, second, label = row.get("text"), row.get("text2"), row.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(text, str) or not isinstance(label, str) or not isinstance(second, str | None):
        raise ReftEdgeError(
            'expected text under "text" (and under "text2" for pairs) and a text or whole number under '
            f'"label"; found the fields {sorted(row)}'
        )
    return (text if second is None else (text, second)), label


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
