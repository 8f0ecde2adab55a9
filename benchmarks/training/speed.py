"""reft-edge beside pyreft in training: same machine, weights, initial adapter and batches, taking turns step by step.

    python benchmarks/training/speed.py PYREFT [--rows text|demo|FILE.jsonl]

PYREFT is an environment with pyreft, as benchmarks/runtime/environments.sh makes it. SmolLM2-135M, LoReFT of rank 4,
f3+l3. Batches are of

- `text`: 16 rows of 40 tokens of prompt and 10 of completion, from a text that ships with reft-edge, at every layer;
- `demo`: the demo's twelve chat rows behind a system prompt, at its four layers, tied;
- a file: 16 of its first 64 rows, prompts as they stand, at every layer.

Every side is a process of its own; printed are medians of a step's seconds, the memory's peak, and the last loss, without
the steps of the first epoch, which are warm-up.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from stage import Side, prepare, report_tokens, variant

from reft_edge.commands.demo_steps import SETTINGS as DEMO
from reft_edge.model.loading import load_model_prompts
from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.training.data import load_dataset
from reft_edge.training.settings import TrainSettings
from reft_edge.training.turns import Example


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pyreft", type=Path, help="environment with pyreft")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", default="text", help="text, demo, or a file of prompts and completions")
    parser.add_argument("--steps", type=int, default=8, help="measured, behind the first epoch")
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
    rows, settings = batches(source, options.rows)
    warm = -(-len(rows) // settings.batch_size) if options.rows != "text" else 1
    settings = dataclasses.replace(settings, max_steps=warm + options.steps)
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
        for _ in range(warm + options.steps):
            for name, side in sides.items():
                found[name].append(side.step())
        for side in sides.values():
            side.close()
    figures = {name: summary(steps[warm:]) for name, steps in found.items()}
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
        title=f"{source.name}, {options.rows}: batches of {settings.batch_size} rows, layers {settings.layers}",
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


def batches(source: ModelFolder, rows: str) -> tuple[list[Example], TrainSettings]:
    """What is trained on, and how."""
    every_layer = TrainSettings(
        positions="f3+l3",
        rank=4,
        lr=2e-3,
        warmup=0.0,
        schedule="constant",
        batch_size=16,
        prompt_format="raw",
        dtype="fp32",
    )
    if rows == "text":
        return windows(report_tokens(source)), every_layer
    prompts = load_model_prompts(source)
    if rows != "demo":
        return load_dataset(Path(rows), prompts, "raw", 1024).examples[:64], every_layer
    with as_file(files("reft_edge") / "demo_data" / "emoji.jsonl") as demo:
        found = load_dataset(demo, prompts, "chat", 1024).examples
    return found, dataclasses.replace(DEMO, rank=4, warmup=0.0, dtype="fp32", prompt_format="chat")


def windows(tokens: list[int], prompt: int = 40, completion: int = 10) -> list[Example]:
    length = prompt + completion
    return [
        Example(tuple(tokens[start : start + prompt]), tuple(tokens[start + prompt : start + length]))
        for start in range(0, len(tokens) - length, 7)
    ]


def summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "peak_mb": steps[-1]["peak_mb"],
        "loss": steps[-1]["loss"],
    }


if __name__ == "__main__":
    main()
