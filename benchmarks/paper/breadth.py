"""What is compared: tasks, methods, and the learning rates that are tried."""

import dataclasses
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

import encoders
from table import Method, lora, loreft
from tasks import TASKS, Row, Task, arc, gsm8k

from reft_edge.adapter.config import INTERVENTIONS


def number(row: Row) -> Row:
    read = {"prompt": f"Question: {row['prompt']}\nAnswer:", "answer": row["answer"]}
    return read | ({"completion": f" {row['completion']}"} if "completion" in row else {})


@dataclass(frozen=True)
class Study:
    """A training task, its tests, and whose learning rates it takes."""

    task: Task
    searched: str
    """The study on whose dev rows learning rates are chosen; the study itself, or another."""
    also: tuple[Task, ...] = ()
    """Further tests of the same adapters."""
    chat: bool = False
    """Whether prompts are asked through the model's chat template; without one, an empty line follows them."""
    compared: Task | None = None
    """Greedy answers to the first test rows, to be held against the base model's (win_rate.py)."""

    @property
    def tests(self) -> tuple[Task, ...]:
        return (self.task, *self.also)


def _known(name: str, **changed: Any) -> Task:
    return dataclasses.replace(TASKS[name], batch_size=16, steps=150, **changed)


STUDIES = {
    study.task.name: study
    for study in (
        Study(
            Task(
                "gsm8k",
                "GSM8K, log-likelihood",
                gsm8k,
                steps=120,
                batch_size=8,
                dev_rows=100,
                test_rows=400,
                test_file="train",
            ),
            "gsm8k",
        ),
        Study(
            Task("mawps", "MAWPS", number, 150, 16, 229, 231, dev_file="dev", max_tokens=28),
            "mawps",
            (
                Task("addsub", "AddSub", number, test_rows=395, max_tokens=28),
                Task("svamp", "SVAMP", number, test_rows=500, max_tokens=28),
            ),
        ),
        Study(_known("sst2", dev_rows=500, test_rows=1000), "sst2"),
        Study(_known("arc-easy", dev_rows=150, test_rows=1000), "sst2"),
        Study(Task("openbookqa", "OpenBookQA", arc, 150, 16, 250, 750, test_file="train"), "sst2"),
        Study(Task("social-iqa", "Social IQa", arc, 150, 16, 150, 600, test_file="train"), "sst2"),
        Study(_known("boolq", dev_rows=250, test_rows=1000), "sst2"),
        Study(
            Task("instructions", "instructions, log-likelihood", dict, 40, 4, 10, 80),
            "gsm8k",
            chat=True,
            compared=Task("instructions-answers", "instructions, answers", dict, test_rows=60, max_tokens=48),
        ),
    )
}
"""In the order in which they are run. A test without a file of its own is the end of the training file."""


def edits(intervention: str, positions: str, rank: int, **further: Any) -> dict[str, Any]:
    return {"intervention": intervention, "positions": positions, "rank": rank, "tied": True, **further}


ALWAYS = "all+gen"
METHODS = {
    method.name: method
    for method in (
        Method(
            "loreft", "LoReFT, rank 4, f3+l3", "reft-edge", edits("loreft", "f3+l3", 4), (2e-3, 6e-3, 1.5e-2)
        ),
        Method(
            "direft", "DiReFT, rank 4, f3+l3", "reft-edge", edits("direft", "f3+l3", 4), (2e-3, 6e-3, 1.5e-2)
        ),
        Method(
            "loreft-all",
            "LoReFT, rank 4, all+gen",
            "reft-edge",
            edits("loreft", ALWAYS, 4),
            (2e-3, 6e-3, 7e-4),
        ),
        Method(
            "post-block",
            "post-block (NoDiReFT, rank 4, all+gen)",
            "reft-edge",
            edits("nodireft", ALWAYS, 4),
            (2e-3, 6e-3, 7e-4),
        ),
        Method(
            "post-block-silu",
            "post-block with SiLU, rank 4",
            "reft-edge",
            edits("nodireft", ALWAYS, 4, act_fn="silu"),
            (2e-3, 6e-3, 7e-4),
        ),
        Method(
            "loreft-unchanged",
            "LoReFT, rank 4, f3+l3, unchanged start",
            "reft-edge",
            edits("loreft", "f3+l3", 4, start="unchanged"),
            (2e-3, 6e-3, 1.5e-2),
        ),
        Method(
            "post-block-unchanged",
            "post-block, rank 4, unchanged start",
            "reft-edge",
            edits("nodireft", ALWAYS, 4, start="unchanged"),
            (2e-3, 6e-3, 7e-4),
        ),
        Method("red", "RED, all+gen", "reft-edge", edits("red", ALWAYS, 1), (2e-3, 6e-3, 2e-2)),
        Method("bias", "bias only, all+gen", "reft-edge", edits("steering", ALWAYS, 1), (1e-2, 3e-3, 3e-2)),
        Method("lora", "LoRA, rank 8", "peft", lora(8), (1e-3, 3e-4, 3e-3)),
        Method("lora-r1", "LoRA, rank 1", "peft", lora(1), (1e-3, 3e-3, 1e-2)),
        Method("pyreft", "LoReFT, rank 4, f3+l3, pyreft", "pyreft", loreft(4), follows="loreft"),
        Method("dora", "DoRA, rank 8", "peft", lora(8) | {"use_dora": True}, (1e-3, 3e-4, 3e-3)),
    )
}
"""Of a method's learning rates the likeliest comes first."""
BASE = Method("base", "no adapter", "base", {}, (0.0,))


@dataclass(frozen=True)
class Comparison:
    """The studies of one kind of model, and the methods that are compared in them."""

    studies: dict[str, Study]
    methods: dict[str, Method]
    base: Method | None
    """What stands for the model without an adapter, where it can answer."""
    parameters: tuple[float, float]
    """The plots' range."""

    @property
    def all_methods(self) -> dict[str, Method]:
        return ({self.base.name: self.base} if self.base else {}) | self.methods


DECODERS = Comparison(STUDIES, METHODS, BASE, (1e4, 4e6))
ENCODERS = Comparison(
    {task.name: Study(task, encoders.TASKS[0].name) for task in encoders.TASKS},
    {method.name: method for method in encoders.METHODS},
    None,
    (5e2, 1e6),
)


def missing(method: Method, pyreft: str = "") -> str:
    """Why a method cannot be run here; empty if it can."""
    kind = method.settings.get("intervention")
    if kind and kind not in INTERVENTIONS:
        return f"this version of reft-edge has no intervention {kind!r}"
    if method.library == "peft" and find_spec("peft") is None:
        return "PEFT is not installed (pip install peft)"
    if method.library == "pyreft" and not pyreft:
        return "it needs an environment of its own (environments.sh); give its Python with --pyreft"
    return ""
