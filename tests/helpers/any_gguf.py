"""A GGUF file of any architecture that transformers reads, with random weights."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

BLOCKS, TOKENS = 3, 96
WHOLE = {
    "block_count": BLOCKS,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.key_length": 16,
    "attention.sliding_window": 8,
    "rope.dimension_count": 16,
    "expert_count": 4,
    "expert_used_count": 2,
    "shortconv.l_cache": 3,
}
FRACTIONS = {
    "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.layer_norm_epsilon": 1e-5,
}
TURNED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
"""Matrices that GPT-2 has the other way round."""


def write_any_gguf(
    path: Path, architecture: str, kind: str = "Q8_0", untied: bool = False, leave_out: str = ""
) -> None:
    """Write a tiny model, without the tensor `leave_out`; matrices are in blocks of `kind` where their rows are long enough."""
    heads = [0, 2, 0] if architecture == "lfm2" else 2
    _write(path, architecture, heads, {}, kind)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=str(path))
    if untied:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = _shapes(model, architecture)
    shapes.pop(leave_out, None)
    _write(path, architecture, heads, shapes, kind)


def _shapes(model: Any, architecture: str) -> dict[str, tuple[int, ...]]:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, BLOCKS)
    shapes = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        stem, _, end = name.rpartition(".")
        found = names.get_name(stem)
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            half = (shape[0], shape[1] // 2, shape[2])
            shapes |= {f"blk.{block}.ffn_{part}_exps.weight": half for part in ("gate", "up")}
            continue
        if name.endswith("experts.down_proj"):
            found, end = f"blk.{name.split('.')[2]}.ffn_down_exps", "weight"
        assert found is not None, name
        if architecture == "gpt2" and end == "weight" and any(part in found for part in TURNED):
            shape = shape[::-1]
        shapes[f"{found}.{end}"] = (shape[0], shape[2]) if "shortconv.conv" in found else shape
    return shapes


def _write(path: Path, architecture: str, heads: Any, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(f"tiny {architecture}")
    for name, value in WHOLE.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, number in FRACTIONS.items():
        writer.add_float32(f"{architecture}.{name}", number)
    writer.add_head_count_kv(heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{number}>" for number in range(TOKENS)])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(95)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = random.normal(0, 0.5, shape).astype(np.float32)
        if len(shape) == 2 and shape[1] % 32 == 0:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(weight, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
