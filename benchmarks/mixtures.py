"""Perplexity of a model whose matrices are rounded to 4 bits, with some of them in 8, on the text of `export --report`.

    python benchmarks/mixtures.py [MODEL] [--block-size 128]

Each mixture is computed in PyTorch, with activations as they are. Megabytes are what the 8-bit weights would add to an export
of random_llama.py's 1.17B model.
"""

import argparse
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from random_llama import SIZES, shards
from torch import Tensor, nn

from reft_edge.export.nbits import Form
from reft_edge.export.rounding import Rounded
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import resolve_model

ROW_TOKENS = 256
QKV = ("q_proj", "k_proj", "v_proj")
Place = tuple[int, str]
"""A layer's number and the name of one of its matrices."""


def rounded(weight: Tensor, bits: int, size: int, algorithm: str) -> Tensor:
    """A matrix as an export stores it, `[rows, columns]`, float32."""
    matrix = Rounded(lambda: weight, *weight.shape, Form(bits, size, zeros=algorithm == "k_quant"), algorithm)
    parts = [
        (part.codes.astype(np.float32) - part.zeros[..., None]) * part.scales[..., None]
        for part in matrix.stored()
    ]
    return torch.from_numpy(np.concatenate(parts).reshape(len(weight), -1)[:, : weight.shape[1]])


@torch.no_grad()
def perplexity(model: Any, rows: list[list[int]]) -> float:
    """Of every token but each row's first."""
    losses = [
        nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row])).logits[0, :-1].float(),
            torch.tensor(row[1:]),
            reduction="none",
        )
        for row in rows
    ]
    return float(torch.cat(losses).mean().exp())


def mixtures(layers: int) -> dict[str, set[Place]]:
    """What is held in 8 bits."""

    def of(numbers: Iterable[int], *names: str) -> set[Place]:
        return {(number, name) for number in numbers for name in names}

    edges = [n for n in range(layers) if n < layers / 8 or n >= 7 * layers / 8]
    half = [n for n in range(layers) if n in edges or (n - round(layers / 8)) % 3 == 2]
    return {
        "nothing": set(),
        "down_proj and qkv_proj of half of the layers": of(half, "down_proj", *QKV),
        "down_proj and v_proj of these": of(half, "down_proj", "v_proj"),
        "down_proj of these": of(half, "down_proj"),
        "qkv_proj of these": of(half, *QKV),
        "down_proj and v_proj of the first and last eighth": of(edges, "down_proj", "v_proj"),
        "v_proj of all layers": of(range(layers), "v_proj"),
    }


def megabytes(chosen: set[Place], layers: int) -> float:
    """What 8 bits in place of 4 take in the 1.17B model, for the same share of its layers."""
    size = SIZES["1b"]
    shapes = {name.split(".")[-2]: shape for name, shape in next(iter(shards(size).values())).items()}
    numbers = sum(int(np.prod(shapes[name])) for _, name in chosen)
    return numbers / 2e6 * size["num_hidden_layers"] / layers


def head_megabytes() -> float:
    """Of the 1.17B model's head in 8 bits."""
    return SIZES["1b"]["vocab_size"] * SIZES["1b"]["hidden_size"] / 1e6


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--block-size", type=int, default=128)
    options = parser.parse_args()
    source = resolve_model(options.model)
    model, size = load_model(source), options.block_size
    text = files("reft_edge.export").joinpath("report_text.txt").read_text(encoding="utf-8")
    ids = load_prompts(source.path).encode_raw(text)
    rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids), ROW_TOKENS)]
    print(f"fp32: {perplexity(model, rows):.2f}", flush=True)

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table, written = embedding.weight.data, head.weight.data
    layers = decoder_layers(model)
    matrices = {
        (number, path.rsplit(".", 1)[-1]): module
        for number, layer in enumerate(layers)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    plain = {place: module.weight.data for place, module in matrices.items()}
    in_4 = {place: rounded(weight, 4, size, "k_quant") for place, weight in plain.items()}
    head.weight = nn.Parameter(written, requires_grad=False)
    embedding.weight = nn.Parameter(rounded(table, 4, size, "k_quant"), requires_grad=False)

    def measure(name: str, chosen: set[Place], head_bits: int) -> None:
        head.weight.data = rounded(written, head_bits, size, "k_quant")
        for place, module in matrices.items():
            module.weight.data = rounded(plain[place], 8, size, "k_quant") if place in chosen else in_4[place]
        more = megabytes(chosen, len(layers)) - (8 - head_bits) / 8 * head_megabytes()
        print(f"{name}: {perplexity(model, rows):.2f}, {more:.0f} MB more", flush=True)

    for name, chosen in mixtures(len(layers)).items():
        measure(name, chosen, 8)
    half = mixtures(len(layers))["down_proj and qkv_proj of half of the layers"]
    measure("the same, with the head in 4 bits", half, 4)


if __name__ == "__main__":
    main()
