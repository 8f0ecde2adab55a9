"""A tiny GGUF file, written as llama.cpp's converter would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_PARTS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)
"""Of a block, in the file's order."""
_HALVES = {  # where a block has its 16-bit factors
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}


def random_blocks(shape: tuple[int, int], kind: str, seed: int = 0, spread: float = 0.02) -> Any:
    """Bytes `[rows, bytes]` of a tensor of that kind: every field is random, the weights are about `spread` large."""
    rng = np.random.default_rng(seed)
    weights, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // weights, stored), dtype=np.uint8)
    for position in _HALVES[kind]:
        factor = rng.uniform(0.5, 1, blocks.shape[:2]).astype(np.float16)
        blocks[..., position : position + 2] = factor[..., None].view(np.uint8)
    size = np.std(gguf.quants.dequantize(blocks.reshape(shape[0], -1), gguf.GGMLQuantizationType[kind]))
    for position in _HALVES[kind]:
        halves = np.ascontiguousarray(blocks[..., position : position + 2]).view(np.float16)
        blocks[..., position : position + 2] = (halves * (spread / size)).astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def quantised(weight: Any, kind: str) -> Any:
    """`weight [rows, columns]` in 4 or 5 bits as `Q4_K` or `Q5_K`, roughly, or as gguf itself does."""
    if kind not in ("Q4_K", "Q5_K"):
        return gguf.quants.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType[kind])
    levels = 15 if kind == "Q4_K" else 31
    blocks = weight.reshape(len(weight), -1, 8, 32)
    low = np.minimum(blocks.min(axis=-1), 0)
    step = (blocks.max(axis=-1) - low) / levels
    factors = [(part.max(axis=-1, keepdims=True) / 63).astype(np.float16) for part in (step, -low)]
    fine, offset = (
        np.rint(part / np.where(factor == 0, 1, factor).astype(np.float32)).clip(0, 63).astype(np.uint8)
        for part, factor in zip((step, -low), factors, strict=True)
    )
    scale, shift = (factors[0].astype(np.float32) * fine)[..., None], (factors[1] * offset)[..., None]
    codes = np.rint((blocks + shift) / np.where(scale == 0, 1, scale)).clip(0, levels).astype(np.uint8)
    six_bits = np.concatenate(
        [
            fine[..., :4] | (fine[..., 4:] >> 4) << 6,
            offset[..., :4] | (offset[..., 4:] >> 4) << 6,
            (fine[..., 4:] & 0xF) | (offset[..., 4:] & 0xF) << 4,
        ],
        axis=-1,
    )
    high = [np.packbits(codes >> 4, axis=-2, bitorder="little")[..., 0, :]] if levels == 31 else []
    low_bits = (codes[..., 0::2, :] & 0xF) | (codes[..., 1::2, :] & 0xF) << 4
    parts = [*(factor.view(np.uint8) for factor in factors), six_bits, *high]
    packed = np.concatenate([*parts, low_bits.reshape(*low_bits.shape[:2], -1)], axis=-1)
    return packed.reshape(len(weight), -1)


def write_gguf(path: Path, model: Any, kind: str | Callable[[str], str] = "F32") -> None:
    """A tiny Llama as llama.cpp would store it; matrices in blocks of `kind`, such as Q4_1, or of the kind that it says for
    a tensor's name. Weights in kinds that gguf cannot write are random.
    """

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted("abcdefghijklmnopqrstuvwxyzĠĊ")
    words = ["<s>", "</s>", "ab", *alphabet]
    words += [f"<{i}>" for i in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)

    def permute(weight, heads):  # llama.cpp interleaves rotary halves
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    def kind_of(name):
        if callable(kind):
            return kind(name)
        return "Q8_0" if name == "token_embd.weight" and kind != "F32" else kind

    def add(name, weight):
        stored = kind_of(name)
        if stored in ("F32", "F16"):
            writer.add_tensor(name, weight.astype({"F32": np.float32, "F16": np.float16}[stored]))
            return
        own = stored in ("Q2_K", "Q3_K", "Q6_K", "IQ4_NL")
        blocks = random_blocks(weight.shape, stored) if own else quantised(weight, stored)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[stored])

    add("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    if not config.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for part in _PARTS:
            llamas = f"model.layers.{layer}.{part}.weight"
            name, weight = names.get_name(llamas, try_suffixes=(".weight",)), state[llamas].numpy()
            if part == "self_attn.q_proj":
                weight = permute(weight, config.num_attention_heads)
            elif part == "self_attn.k_proj":
                weight = permute(weight, config.num_key_value_heads)
            if weight.ndim == 2:
                add(name, weight)
            else:
                writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
