"""The losses of a training in a file that grows with it: JSON, one object a line."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place, write_atomically
from reft_edge.jsonl import read_lines
from reft_edge.training.settings import StepReport


@dataclass
class LossLog:
    """Lines `{"step", "loss", "lr", "tokens_per_second"}`, with `"evaluation_loss"` where held-out rows were evaluated.

    A number that is not finite is null. A training that continues keeps the lines of the steps before.
    """

    path: Path
    resume: bool
    report: Callable[[str], None]
    _begun: bool = field(default=False, init=False)
    _broken: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Raises ReftEdgeError if the file cannot be written, or is there and is no such log."""
        check_place(self.path)
        if self.path.exists():
            self._kept(0)

    def __call__(self, step: StepReport) -> None:
        """Write a step. The first one begins the file anew, but for steps before it where the training continues."""
        line: dict[str, Any] = {
            "step": step.step,
            "loss": step.loss,
            "lr": step.lr,
            "tokens_per_second": round(step.tokens_per_second, 1),
        }
        if step.evaluation is not None:
            line["evaluation_loss"] = step.evaluation if math.isfinite(step.evaluation) else None
        self._write(step.step, line)

    def end(self, steps: int, evaluation: float | None) -> None:
        """Write the held-out loss at the end."""
        self._write(steps + 1, {"step": steps, "evaluation_loss": evaluation})

    def _write(self, before: int, line: dict[str, Any]) -> None:
        if self._broken:
            return
        try:
            if not self._begun:
                kept = self._kept(before) if self.resume and self.path.exists() else []
                write_atomically(self.path, "".join(f"{text}\n" for text in kept).encode())
                self._begun = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except (ReftEdgeError, OSError) as error:
            self._broken = True
            self.report(f"the loss log ends before step {line['step']}: {error}. The training goes on")

    def _kept(self, before: int) -> list[str]:
        """The file's lines of steps before this one. Raises ReftEdgeError if it is no such log."""
        lines = list(read_lines(self.path))
        kept = []
        for number, text in lines:
            step = _step_of(text)
            if step is None and (number, text) == lines[-1] and len(lines) > 1:
                break  # a killed training can leave half a line
            if step is None:
                raise ReftEdgeError(f"{self.path} line {number} is not of a loss log; give another file")
            if step < before:
                kept.append(text)
        return kept


def _step_of(text: str) -> int | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = isinstance(row, dict) and isinstance(row.get("step"), int) and row.keys() <= _KEYS
    return int(row["step"]) if known else None


_KEYS = {"step", "loss", "lr", "tokens_per_second", "evaluation_loss"}
