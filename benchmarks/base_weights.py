"""What training on the exported, rounded weights wins back: SST-2 and ARC-Easy accuracy on a quantised graph.

    python benchmarks/base_weights.py DATA_FOLDER

DATA_FOLDER holds sst2/ and arc-easy/, each with train.jsonl and test.jsonl: rows {"text", "label"} for SST-2, and
{"prompt", "answer"} for ARC-Easy, whose prompt lists `Answer1: ... Answer4: ...`. A row is answered by the candidate
completion that the model finds likeliest a token. Both adapters see the same rows in the same order.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from reft_edge.adapter.file import load_adapter
from reft_edge.commands.screen import Screen
from reft_edge.commands.training_progress import training_progress
from reft_edge.export import Quantisation, export_model
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.data import load_dataset
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings


@dataclass(frozen=True)
class Question:
    prompt: str
    candidates: tuple[str, ...]
    answer: int


def sst2(row: dict) -> Question:
    return Question(f"Review: {row['text']}\nSentiment:", (" negative", " positive"), row["label"])


def arc(row: dict) -> Question:
    question, options = re.fullmatch(
        r"Please choose the correct answer to the question: (.*?)\n\n(.*?)\n\nAnswer format.*",
        row["prompt"],
        re.DOTALL,
    ).groups()
    candidates = re.split(r"\s*Answer\d: ", " " + options)[1:]
    return Question(
        f"Question: {question}\nAnswer:",
        tuple(" " + candidate.strip() for candidate in candidates),
        int(row["answer"].removeprefix("answer")) - 1,
    )


TASKS: dict[str, Callable[[dict], Question]] = {"sst2": sst2, "arc-easy": arc}


def questions(path: Path, read: Callable[[dict], Question], limit: int) -> list[Question]:
    with path.open() as file:
        return [read(json.loads(line)) for line, _ in zip(file, range(limit), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--rows", type=int, default=500, help="test rows to answer")
    parser.add_argument("--train-rows", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    console = Screen(stderr=True)
    folder = resolve_model(options.model, console.print)
    prompts = load_prompts(folder.path)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        quantisation = Quantisation(
            "k_quant"
        )  # rounded anew, also where the model is a GGUF with blocks of its own
        export_model(folder, work / "export", options.precision, quantisation=quantisation)
        for task in options.tasks:
            read = TASKS[task]
            held_out = questions(options.data / task / "test.jsonl", read, options.rows)
            with (work / "train.jsonl").open("w") as file:
                for question in questions(options.data / task / "train.jsonl", read, options.train_rows):
                    row = {"prompt": question.prompt, "completion": question.candidates[question.answer]}
                    file.write(json.dumps(row) + "\n")
            data = load_dataset(work / "train.jsonl", prompts, "raw", 1024)

            model = load_model(folder)
            found = {"base, PyTorch fp32": torch_accuracy(model, prompts, held_out)}
            for name, weights in (("plain", None), ("base weights", work / "export")):
                settings = TrainSettings(
                    positions="f3+l3",
                    rank=4,
                    lr=2e-3,
                    epochs=1,
                    seed=options.seed,
                    start="random",
                    prompt_format="raw",
                )
                with training_progress(console, console.say) as on_step:
                    train(
                        model,
                        folder.name,
                        data,
                        work / f"{name}.safetensors",
                        settings,
                        base_weights=weights,
                        on_step=on_step,
                    )
                if weights is None:
                    adapter = load_adapter(work / f"{name}.safetensors")
                    with steered(model, (Interventions.from_adapter(adapter), 1.0)) as steering:
                        found["plain adapter, PyTorch fp32"] = torch_accuracy(
                            model, prompts, held_out, steering
                        )
            del model
            graph = SteeredModel(work / "export")
            found[f"base, {options.precision}"] = graph_accuracy(graph, None, prompts, held_out)
            for name in ("plain", "base weights"):
                graph.load_adapter(work / f"{name}.safetensors", name=name)
                found[f"{name} adapter, {options.precision}"] = graph_accuracy(graph, name, prompts, held_out)
            del graph
            figures[task] = found
            console.print(task, found)
    if options.json:
        print(json.dumps(figures))
        return
    table = Table(title=f"{folder.name}, {options.rows} test rows, {options.train_rows} training rows")
    table.add_column("accuracy")
    for task in figures:
        table.add_column(task, justify="right")
    for name in next(iter(figures.values())):
        table.add_row(name, *(f"{found[name]:.3f}" for found in figures.values()))
    Console().print(table)


Score = Callable[[list[int], list[list[int]]], list[np.ndarray]]


def accuracy(prompts, held_out: list[Question], score: Score) -> float:
    """`score(prompt, completions)` gives the logits that predict each completion, `[tokens, vocabulary]`."""
    right = 0
    for question in held_out:
        prompt = prompts.encode_raw(question.prompt)
        completions = [prompts.encode_after(question.prompt, candidate) for candidate in question.candidates]
        likelihoods = []
        for completion, logits in zip(completions, score(prompt, completions), strict=True):
            shifted = logits - logits.max(1, keepdims=True)
            log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
            likelihoods.append(log_probabilities[np.arange(len(completion)), completion].mean())
        right += int(np.argmax(likelihoods)) == question.answer
    return right / len(held_out)


@torch.no_grad()
def torch_accuracy(model, prompts, held_out: list[Question], steering=None) -> float:
    def score(prompt: list[int], completions: list[list[int]]) -> list[np.ndarray]:
        found = []
        for completion in completions:
            ids = torch.tensor([prompt + completion[:-1]])
            keep = len(completion)
            if steering is None:
                logits = model(input_ids=ids, logits_to_keep=keep).logits
            else:
                with steering.prompts(torch.tensor([len(prompt)])):
                    logits = model(input_ids=ids, logits_to_keep=keep).logits
            found.append(logits[0].float().numpy())
        return found

    return accuracy(prompts, held_out, score)


def graph_accuracy(graph: SteeredModel, adapter: str | None, prompts, held_out: list[Question]) -> float:
    def score(prompt: list[int], completions: list[list[int]]) -> list[np.ndarray]:
        rows = [prompt + completion[:-1] for completion in completions]
        logits = graph.logits(rows, adapter, prompt_tokens=[len(prompt)] * len(rows))
        return [row[len(prompt) - 1 :] for row in logits]

    return accuracy(prompts, held_out, score)


if __name__ == "__main__":
    main()
