"""reft-edge beside pyreft in training: same machine, weights, initial adapter and batches, taking turns step by step.

    python benchmarks/training/speed.py PYREFT

PYREFT is an environment with pyreft, as benchmarks/runtime/environments.sh makes it. SmolLM2-135M, LoReFT of rank 4 at every
layer, f3+l3, 16 rows of 50 tokens (40 of prompt, 10 of completion) from a text that ships with reft-edge. Every side is a
process of its own; printed are medians of a step's seconds, the memory's peak, and the last loss, the first step left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stage import Side, prepare, report_tokens, variant

from reft_edge.model.source import resolve_model
from reft_edge.training.settings import TrainSettings
from reft_edge.training.turns import Example


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pyreft", type=Path, help="environment with pyreft")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--completion-tokens", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="the first is warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sides",
        nargs="+",
        default=[
            "pyreft",
            *(f"reft-edge {how}" for how in ("fp32", "fp32 compiled", "bf16", "bf16 compiled")),
        ],
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    source = resolve_model(options.model)
    tokens = report_tokens(source)
    length = options.prompt_tokens + options.completion_tokens
    rows = [windows(tokens[start : start + length], options.prompt_tokens)
            for start in range(0, len(tokens) - length, 7)]  # fmt: skip
    settings = TrainSettings(
        positions="f3+l3",
        rank=4,
        lr=2e-3,
        warmup=0.0,
        schedule="constant",
        max_steps=options.steps,
        batch_size=options.rows,
        prompt_format="raw",
        dtype="fp32",
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        job = prepare(source, rows, settings, options.threads, work)
        sides = {}
        for name in options.sides:
            kind, *how = name.split()
            mine = variant(job, name, "bf16" if "bf16" in how else "fp32", "compiled" in how)
            python = str(options.pyreft / "bin/python") if kind == "pyreft" else sys.executable
            sides[name] = Side(kind, python, mine, work / f"{name}.log")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(options.steps):
            for name, side in sides.items():
                found[name].append(side.step())
        for side in sides.values():
            side.close()
    figures = {name: summary(steps[1:]) for name, steps in found.items()}
    if options.json:
        print(json.dumps({"figures": figures, "steps": found}))
        return
    reference = next(iter(figures.values()))
    table = Table(
        "",
        "s a step",
        "steps/s, x",
        "peak MB",
        "peak, x",
        "loss",
        title=f"{source.name}, {options.rows} rows of {length} tokens",
    )
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{reference['seconds'] / row['seconds']:.2f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['peak_mb'] / reference['peak_mb']:.2f}",
            f"{row['loss']:.4f}",
        )
    Console().print(table)


def windows(tokens: list[int], prompt: int) -> Example:
    return Example(tuple(tokens[:prompt]), tuple(tokens[prompt:]))


def summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "peak_mb": steps[-1]["peak_mb"],
        "loss": steps[-1]["loss"],
    }


if __name__ == "__main__":
    main()
