"""A frozen base held in 4 or 8 bits while an adapter is trained against it, by bitsandbytes."""

import logging
from importlib.util import find_spec
from typing import Any

import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.pretrained import from_folder
from reft_edge.model.source import ModelFolder


def load_quantised(folder: ModelFolder, load_in: str, device: torch.device, compute: torch.dtype) -> Any:
    """The decoder on `device` with its linear layers in `4bit` (NF4, products in `compute`) or `8bit` (LLM.int8).

    It keeps the fingerprint of the weights as they are stored, so that its adapters run wherever the model does.
    Raises ReftEdgeError if bitsandbytes is missing or cannot work on this device.
    """
    if find_spec("bitsandbytes") is None:
        raise ReftEdgeError("--load-in needs bitsandbytes; install it with: pip install 'reft-edge[bits]'")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line for every product in 8 bits
    stored = fingerprint(load_model(folder, dtype="auto"))
    config = BitsAndBytesConfig(
        load_in_4bit=load_in == "4bit",
        load_in_8bit=load_in == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
    )
    try:
        model = from_folder(
            AutoModelForCausalLM,
            folder.path,
            folder.name,
            quantization_config=config,
            dtype=torch.float32,
            device_map={"": device},
        )
        model.eval().requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # that layout is for inference alone
        _try(model)
    except Exception as error:  # bitsandbytes, transformers and torch raise many kinds here
        raise ReftEdgeError(
            f"cannot hold {folder.name} in {load_in} on {device}: {error}; leave --load-in out"
        ) from error
    model.base_fingerprint = stored
    return model


def _try(model: Any) -> None:
    """One pass there and back: what a backend cannot do shows only then."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    states = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=states).logits.sum().backward()
    if states.grad is None:
        raise RuntimeError("no gradient comes through its layers")
