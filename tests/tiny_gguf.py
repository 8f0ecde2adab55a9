"""A tiny GGUF file, written as llama.cpp's converter would."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(path: Path, model: Any, kind: str = "F32") -> None:
    """A tiny Llama as llama.cpp would store it; matrices in blocks of `kind`, such as Q4_1."""

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
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }

    def permute(weight, heads):  # llama.cpp interleaves rotary halves
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    def add(name, weight):
        stored = gguf.GGMLQuantizationType["Q8_0" if name == "token_embd.weight" and kind != "F32" else kind]
        blocks = gguf.quants.quantize(np.ascontiguousarray(weight), stored)
        writer.add_tensor(name, blocks, raw_dtype=None if kind == "F32" else stored)

    add("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"].numpy()
            if theirs == "attn_q":
                weight = permute(weight, config.num_attention_heads)
            elif theirs == "attn_k":
                weight = permute(weight, config.num_key_value_heads)
            if weight.ndim == 2:
                add(f"blk.{layer}.{theirs}.weight", weight)
            else:
                writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
