"""Write a Llama of random weights to a GGUF file, matrices as Q4_K, to measure conversions of models that large.

    python benchmarks/random_gguf.py FILE [--size 1b|8b]

The shapes are those of random_llama.py; 1b takes 0.66 GB, 8b 4.5 GB. Tokens are numbers.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from random_llama import SIZES, shards

KIND = gguf.GGMLQuantizationType.Q4_K
WEIGHTS, BYTES = gguf.GGML_QUANT_SIZES[KIND]


def blocks(shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.uint8]:
    """Q4_K super-blocks of weights that are about 0.02 large, `[rows, bytes]`."""
    made = random.integers(0, 256, (shape[0] * shape[1] // WEIGHTS, BYTES), np.uint8)
    made[:, :4] = np.array([8e-5, 6e-4], np.float16).view(np.uint8)
    return made.reshape(shape[0], -1)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    given = parser.parse_args()
    size, random = SIZES[given.size], np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(given.file), "llama", use_temp_file=True)
    writer.add_block_count(size["num_hidden_layers"])
    writer.add_context_length(size["max_position_embeddings"])
    writer.add_embedding_length(size["hidden_size"])
    writer.add_feed_forward_length(size["intermediate_size"])
    writer.add_head_count(size["num_attention_heads"])
    writer.add_head_count_kv(size["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(size["hidden_size"] // size["num_attention_heads"])
    writer.add_vocab_size(size["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = ["<s>", "</s>", "ab", *map(chr, range(33, 127))]
    writer.add_token_list(words + [f"<{number}>" for number in range(size["vocab_size"] - len(words))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size["num_hidden_layers"])
    for shapes in shards(size).values():
        for llamas, shape in shapes.items():
            name = names.get_name(llamas, try_suffixes=(".weight",))
            if len(shape) == 1:
                writer.add_tensor(name, np.ones(shape, np.float32))
            else:
                writer.add_tensor(name, blocks(shape, random), raw_dtype=KIND)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
