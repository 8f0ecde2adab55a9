"""The tasks of table.py: rows of the data as prompts, completions and choices, and how many of them are used."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`read` gives a row's prompt, with the answer among `choices`, or with a completion and a number."""

    name: str
    title: str
    read: Callable[[Row], Row]
    steps: int = 100
    batch_size: int = 8
    dev_rows: int = 250
    test_rows: int = 500
    dev_file: str = "train"
    """Where dev rows come from; of the training file the last ones."""
    test_file: str = "test"
    """Where test rows come from; of the training file the last ones, and the dev rows before them."""
    max_tokens: int = 0
    """Of a generated answer; 0: answers are chosen by likelihood."""
    folder: str = ""
    """Of the data; by default the task's name."""


def sst2(row: Row) -> Row:
    return {
        "prompt": f"Review: {row['text']}\nSentiment:",
        "choices": [" negative", " positive"],
        "answer": row["label"],
    }


def arc(row: Row) -> Row:
    found = re.fullmatch(
        r"Please choose the correct answer to the question: (.*?)\n\n(.*?)\n\nAnswer format.*",
        row["prompt"],
        re.DOTALL,
    )
    assert found is not None, row
    choices = [" " + choice.strip() for choice in re.split(r"(?:^|\s)Answer\d: ", found[2]) if choice.strip()]
    answer = int(row["answer"].removeprefix("answer")) - 1
    return {"prompt": f"Question: {found[1]}\nAnswer:", "choices": choices, "answer": answer}


def boolq(row: Row) -> Row:
    found = re.search(r"question: (.*?)\n\nAnswer format", row["prompt"], re.DOTALL)
    assert found is not None, row
    return {
        "prompt": f"Question: {found[1]}\nTrue or false? Answer:",
        "choices": [" false", " true"],
        "answer": int(row["answer"] == "true"),
    }


def gsm8k(row: Row) -> Row:
    read = {"prompt": f"Question: {row['prompt']}\nAnswer:", "answer": row["answer"]}
    return read | ({"completion": " " + row["completion"]} if "completion" in row else {})


TASKS = {
    task.name: task
    for task in (
        Task("sst2", "SST-2", sst2, dev_file="dev"),
        Task("arc-easy", "ARC-Easy", arc, dev_rows=150),
        Task("boolq", "BoolQ", boolq),
        Task("gsm8k", "GSM8K", gsm8k, steps=50, dev_rows=50, test_rows=100, max_tokens=200),
    )
}


def load(folder: Path, task: Task) -> dict[str, list[Row]]:
    """The rows of `train`, `dev` and `test`; no training row is a dev row."""
    names = {"train", task.dev_file, task.test_file}
    files = {name: _read(folder / (task.folder or task.name) / f"{name}.jsonl") for name in names}
    train = files["train"]
    if task.test_file == "train":
        train, files["train"] = train[: -task.test_rows], train[-task.test_rows :]
    if task.dev_file == "train":
        train, dev = train[: -task.dev_rows], train[-task.dev_rows :]
    else:
        dev = files[task.dev_file][: task.dev_rows]
    parts = {
        "train": train[: task.steps * task.batch_size],
        "dev": dev,
        "test": files[task.test_file][: task.test_rows],
    }
    return {part: [task.read(row) for row in rows] for part, rows in parts.items()}


def completion(row: Row) -> str:
    return row["completion"] if "completion" in row else row["choices"][row["answer"]]


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
