"""One cell: an adapter trained and tested. `begin` and `make` run in run.py's processes, each with the model in memory."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

import encoders
import numpy as np
import torch
from breadth import BASE, DECODERS, ENCODERS, Comparison, Study
from elsewhere import made_by
from likeness import likeness
from minilm import packaged_minilm
from table import Method, drawn, encoded, generated, options
from tasks import Task, completion, load
from worker import OPEN, Adapted, Job, OnStep, greedy, mean_likelihoods, trained

from reft_edge.evaluation.answering import judge
from reft_edge.evaluation.tasks import Question
from reft_edge.model.encoders import default_pooling, is_encoder, load_encoder
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.prompts import Prompts
from reft_edge.model.source import ModelFolder
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import rate


@dataclass(frozen=True)
class Cell:
    study: str
    method: str
    lr: float
    seed: int


class _Process:
    """What a process keeps from cell to cell."""

    model: Any
    prompts: Prompts
    folder: Path
    comparison: Comparison
    pooling: str
    """Of an encoder."""
    studies: dict[str, dict[str, Any]]
    dtype: str
    work: Path
    batch: int
    pyreft: str
    """The Python of pyreft's environment."""


def prepare(data: Path, study: Study, prompts: Prompts) -> dict[str, Any]:
    """A study's rows as token ids: to train on, and to ask of dev and test rows, by the name of each."""
    parts = {
        part: [through_template(row, prompts) if study.chat else row for row in rows]
        for part, rows in load(data, study.task).items()
    }
    tests = {"dev": asked(study.task, parts["dev"], prompts)}
    for task in study.tests:
        rows = parts["test"] if task is study.task else only_test(data, task)
        tests[task.name] = asked(task, rows, prompts)
    if study.compared:
        packaged_minilm()  # before several processes want it
        tests[study.compared.name] = to_compare(study.compared, parts["test"], prompts)
    task = study.task
    return {
        "rows": [encoded(prompts, row) for row in parts["train"]],
        "tests": tests,
        "steps": task.steps,
        "batch_size": task.batch_size,
    }


def only_test(data: Path, task: Task) -> list[dict[str, Any]]:
    with (data / task.name / "test.jsonl").open(encoding="utf-8") as file:
        return [task.read(json.loads(line)) for line in file][: task.test_rows]


def through_template(row: dict[str, Any], prompts: Prompts) -> dict[str, Any]:
    if prompts.template is None:
        return row | {"prompt": f"{row['prompt']}\n\n"}
    return row | {"prompt": prompts.prompt_text(row["prompt"], "chat")}


def to_compare(task: Task, rows: list[dict[str, Any]], prompts: Prompts) -> dict[str, Any]:
    rows = rows[: task.test_rows]
    found = generated(prompts, (row["prompt"] for row in rows), task.max_tokens)
    return {"asked": found, "references": [completion(row) for row in rows]}


def asked(task: Task, rows: list[dict[str, Any]], prompts: Prompts) -> dict[str, Any]:
    """Rows as questions: to answer, to choose in, or whose completion's likelihood is wanted."""
    if task.max_tokens:
        found = generated(prompts, (row["prompt"] for row in rows), task.max_tokens)
        return {"asked": found, "expected": [str(row["answer"]) for row in rows]}
    questions = [options(prompts, row["prompt"], row.get("choices") or [completion(row)]) for row in rows]
    answers = [row["answer"] for row in rows] if "choices" in rows[0] else None
    return {"questions": questions, "answers": answers}


def begin(
    folder: str,
    device: str,
    dtype: str,
    threads: int,
    prepared: str,
    work: str,
    batch: int,
    pyreft: str = "",
) -> None:
    torch.set_num_threads(threads)
    _Process.folder = Path(folder)
    source = ModelFolder(_Process.folder, _Process.folder.name)
    encoder = is_encoder(source)
    _Process.comparison = ENCODERS if encoder else DECODERS
    _Process.pooling = default_pooling(source) if encoder else ""
    _Process.model = (load_encoder if encoder else load_model)(source).to(device)
    _Process.prompts = load_model_prompts(source)
    _Process.studies = json.loads(Path(prepared).read_text(encoding="utf-8"))
    _Process.dtype, _Process.work, _Process.batch, _Process.pyreft = dtype, Path(work), batch, pyreft


def make(cell: Cell) -> dict[str, Any]:
    """Train and test; what a line of the results says but for the cell itself."""
    started = time.perf_counter()
    study, method = _Process.studies[cell.study], _Process.comparison.all_methods[cell.method]
    settings = TrainSettings(lr=cell.lr or 1.0, max_steps=study["steps"])
    adapter = _Process.work / f"{os.getpid()}.safetensors"
    job = {
        "library": method.library,
        "settings": method.settings,
        "model": str(_Process.folder),
        "adapter": str(adapter if method.library == "reft-edge" else adapter.with_suffix("")),
        "dtype": _Process.dtype,
        "seed": cell.seed,
        "lr": cell.lr,
        "train": {
            "rows": study["rows"],
            "batches": batches(study, cell.seed),
            "rates": [cell.lr * rate(settings, step, study["steps"]) for step in range(study["steps"])],
        },
    }
    made = (made_elsewhere if method.library == "pyreft" else made_here)(method, job, study["tests"])
    losses = made.pop("losses")
    last = losses[-max(1, len(losses) // 10) :]
    loss = round(sum(last) / len(last), 5) if last else None
    return {"loss": loss} | made | {"seconds": round(time.perf_counter() - started, 2)}


def made_here(method: Method, job: Job, tests: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    losses: list[float] = []
    adapted = adapted_by(method, job, losses.append)
    trained_for = time.perf_counter() - started
    try:
        scores = {name: score(adapted, test) for name, test in tests.items()}
    finally:
        adapted.detach()
        _Process.model.requires_grad_(False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "losses": losses,
        "parameters": sum(parameter.numel() for parameter in adapted.parameters),
        "scores": scores,
        "train_seconds": round(trained_for, 2),
    }


def made_elsewhere(method: Method, job: Job, tests: dict[str, Any]) -> dict[str, Any]:
    """The same by the method's own environment."""
    found = made_by(_Process.pyreft, job, tests, str(next(_Process.model.parameters()).device))
    answers = {
        name: of_answers(test, found["tests"][name])
        if "asked" in test
        else of_likelihoods(test, found["tests"][name])
        for name, test in tests.items()
    }
    return {"losses": found["losses"], "parameters": found["parameters"], "scores": answers}


def batches(study: dict[str, Any], seed: int) -> list[list[int]]:
    """Row numbers of every step."""
    if _Process.pooling:
        return encoders.batches(study, seed)
    return drawn(seed, len(study["rows"]), study["batch_size"], study["steps"])


def adapted_by(method: Method, job: Job, on_step: OnStep) -> Adapted:
    if _Process.pooling:
        return encoders.trained(job, _Process.model, _Process.pooling, on_step)
    return OPEN["base"](job, _Process.model) if method is BASE else trained(job, _Process.model, on_step)


def score(adapted: Adapted, test: dict[str, Any]) -> dict[str, Any]:
    """`right`: a 1 or 0 for each question; `likelihood`: nats a token of each completion; or `answers`, their `likeness` to
    the references, and their `lengths` in characters.
    """
    if "labelled" in test:
        answers = encoders.answered(adapted, test["labelled"], _Process.batch, _Process.dtype)
        return {"right": "".join(str(int(right)) for right in answers)}
    if "asked" in test:
        return of_answers(test, greedy(adapted, test["asked"], 4 * _Process.batch))
    return of_likelihoods(test, mean_likelihoods(adapted, test["questions"], _Process.batch))


def of_answers(test: dict[str, Any], found: list[list[int]]) -> dict[str, Any]:
    """`found`: the answers' token ids."""
    texts = [_Process.prompts.decode(ids) for ids in found]
    if "references" in test:
        texts = [text.strip() for text in texts]
        alike = [round(value, 4) for value in likeness(texts, test["references"])]
        return {"likeness": alike, "lengths": [len(text) for text in texts], "answers": texts}
    judged = [
        judge("number", Question(row, "", expected), text).right
        for row, (expected, text) in enumerate(zip(test["expected"], texts, strict=True))
    ]
    return {"right": "".join(str(int(right)) for right in judged)}


def of_likelihoods(test: dict[str, Any], found: list[list[float]]) -> dict[str, Any]:
    """`found`: nats a token of every option."""
    if test["answers"] is None:
        return {"likelihood": [round(likelihood, 4) for (likelihood,) in found]}
    pairs = zip(found, test["answers"], strict=True)
    return {"right": "".join(str(int(int(np.argmax(row)) == answer)) for row, answer in pairs)}
