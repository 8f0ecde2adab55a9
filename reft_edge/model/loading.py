"""A model folder as a PyTorch model, and its tokenizer and chat template."""

from dataclasses import replace
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.folders import scratch_folder
from reft_edge.json_files import read_object
from reft_edge.model.cache import cache_folder
from reft_edge.model.pretrained import check_whole, from_folder
from reft_edge.model.prompts import Prompts, load_prompts, read_end_ids
from reft_edge.model.source import ModelFolder


def load_model(folder: ModelFolder, dtype: Any = None) -> Any:
    """The PyTorch model, in evaluation mode, its parameters frozen.

    Raises ReftEdgeError if it cannot be loaded or the folder lacks some of its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = from_folder(
        AutoModelForCausalLM, folder.path, folder.name, dtype=dtype or torch.float32, output_loading_info=True
    )
    check_whole(folder.name, loading["missing_keys"])
    return model.eval().requires_grad_(False)


def load_model_prompts(folder: ModelFolder) -> Prompts:
    """The model's tokenizer and chat template; a slow tokenizer is converted by transformers, in the cache."""
    if (folder.path / "tokenizer.json").is_file():
        return load_prompts(folder.path)
    from transformers import AutoTokenizer

    try:
        tokenizer = from_folder(AutoTokenizer, folder.path, folder.name)
        with scratch_folder(cache_folder()) as temporary:
            tokenizer.save_pretrained(temporary)
            return replace(load_prompts(temporary), end_ids=read_end_ids(folder.path))
    except (ReftEdgeError, OSError, ValueError, ImportError) as error:
        raise ReftEdgeError(f"{folder.name} has no tokenizer that can be loaded: {error}") from error


def context_of(model: ModelFolder) -> int | None:
    """Tokens that a decoder's context holds, by its config.json; None where that does not say. Raises ReftEdgeError if it
    cannot be read."""
    config = read_object(model.path / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            count = part.get(name)
            if isinstance(count, int) and count > 0:
                return count
    return None
