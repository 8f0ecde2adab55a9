"""Write a Llama with random bfloat16 weights to disk, shard by shard, to measure exports of models that large.

    python benchmarks/random_llama.py FOLDER [--size 1b|8b]

It never stands in memory: 1b has 1.17 billion parameters (2.3 GB), 8b the shape of Llama 3.1 8B (16 GB). The tokenizer is
SmolLM2's.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from reft_edge.model.source import resolve_model

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 49152, "max_position_embeddings": 2048},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
}  # fmt: skip


def shards(size: dict[str, int]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each shard's tensors: one shard a block, one for the rest."""
    hidden, wide = size["hidden_size"], size["intermediate_size"]
    narrow = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    found = {
        f"model-{layer:05}.safetensors": {
            f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()
        }
        for layer in range(size["num_hidden_layers"])
    }
    table = (size["vocab_size"], hidden)
    found["model-rest.safetensors"] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (hidden,),
        "lm_head.weight": table,
    }
    return found


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    given = parser.parse_args()
    size, folder = SIZES[given.size], given.folder
    folder.mkdir(parents=True)
    tokenizer = resolve_model("smollm2").path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, **size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    places = {}
    for file, shapes in shards(size).items():
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


if __name__ == "__main__":
    main()
