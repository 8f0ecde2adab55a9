"""SST-2 as a prompt: accuracy of the base and of a LoReFT adapter, in PyTorch and through the exported graph.

    python benchmarks/sst2.py DATA_FOLDER

DATA_FOLDER holds train.jsonl and test.jsonl (and dev.jsonl for --split dev) with rows {"text", "label"}; label 1 is
positive. A row is answered by the likelier first token of " positive" and " negative".
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from reft_edge.adapter.file import load_adapter
from reft_edge.commands.screen import Screen
from reft_edge.commands.training_progress import training_progress
from reft_edge.export import export_model
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.data import load_dataset
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings

LABELS = (" negative", " positive")


def rows(path: Path, limit: int) -> list[dict]:
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(limit), strict=False)]


def prompt(row: dict) -> str:
    return f"Review: {row['text']}\nSentiment:"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=500, help="rows of the split to answer")
    parser.add_argument("--train-rows", type=int, default=1600)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    console = Screen(stderr=True)
    folder = resolve_model(options.model, console.print)
    prompts = load_prompts(folder.path)
    model = load_model(folder)
    targets = [prompts.encode_plain(label)[0] for label in LABELS]
    held_out = rows(options.data / f"{options.split}.jsonl", options.rows)
    tokens = [prompts.encode_raw(prompt(row)) for row in held_out]
    labels = np.array([row["label"] for row in held_out])

    def accuracy(answers: list[int]) -> float:
        return float(np.mean(np.array(answers) == labels))

    @torch.no_grad()
    def torch_answers() -> list[int]:
        return [
            int(model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1, targets].argmax())
            for ids in tokens
        ]

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with (work / "train.jsonl").open("w") as file:
            for row in rows(options.data / "train.jsonl", options.train_rows):
                file.write(json.dumps({"prompt": prompt(row), "completion": LABELS[row["label"]]}) + "\n")
        settings = TrainSettings(
            positions="f3+l3",
            rank=4,
            lr=options.lr,
            epochs=options.epochs,
            seed=options.seed,
            start="random",
            dtype=options.dtype,
            prompt_format="raw",
        )
        with training_progress(console, console.say) as on_step:
            result = train(
                model,
                folder.name,
                load_dataset(work / "train.jsonl", prompts, "raw", 1024),
                work / "sst2.safetensors",
                settings,
                on_step=on_step,
            )
        adapter = load_adapter(work / "sst2.safetensors")
        figures = {
            "rows": len(held_out),
            "train_rows": options.train_rows,
            "steps": result.steps,
            "seconds": round(result.seconds),
            "parameters": result.parameters,
            "share": result.parameters / result.base_parameters,
            "bytes": result.size,
        }
        figures["base, PyTorch"] = accuracy(torch_answers())
        with steered(model, (Interventions.from_adapter(adapter), 1.0)):
            in_torch = torch_answers()
        figures["adapter, PyTorch"] = accuracy(in_torch)
        for precision in options.precision:
            export_model(folder, work / precision, precision)
            steered_model = SteeredModel(work / precision)
            steered_model.load_adapter(work / "sst2.safetensors", name="sst2")
            for adapter_name in (None, "sst2"):
                answers = [
                    int(steered_model.logits([ids], adapter_name)[0][-1, targets].argmax()) for ids in tokens
                ]
                figures[f"{'adapter' if adapter_name else 'base'}, ONNX {precision}"] = accuracy(answers)
            if precision == "fp32":
                figures["same answers, PyTorch and ONNX fp32"] = float(
                    np.mean(np.array(answers) == np.array(in_torch))
                )
            started = time.perf_counter()
            steered_model.load_adapter(work / "sst2.safetensors", name="again")
            figures[f"adapter load ms, {precision}"] = round((time.perf_counter() - started) * 1000, 2)

    if options.json:
        print(json.dumps(figures))
        return
    table = Table(title=f"SST-2 {options.split}, first {len(held_out)} rows")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, figure in figures.items():
        table.add_row(name, f"{figure:.4f}" if isinstance(figure, float) else f"{figure:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
