"""One training of a search, which is told to stop early where it is worse than others or out of time."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_edge.adapter.file import load_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.folders import scratch_folder
from reft_edge.search.scores import Measured, measure
from reft_edge.steering.hooks import Steering, steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.frozen_base import frozen
from reft_edge.training.run import train
from reft_edge.training.session import Session
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import Trainer

RUNGS = (1, 2, 4)
"""Quarters of a training after which held-out rows are measured; the last is its end."""
_PROBED = 3
"""Steps by which the time of one is measured."""

Reached = Callable[[int, Measured], bool]
"""Gets a rung and what was measured there; says whether the training is to stop, since others are better."""


class StoppedError(Exception):
    """A training that is not to go on; its words say why."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    measured: Measured | None = None
    """At its end; None where it did not come to it."""
    adapter: bytes = field(default=b"", repr=False)
    """The file."""
    parameters: int = 0
    steps: int = 0
    """Steps that were done."""
    seconds: float = 0.0
    stopped: str = ""
    """Why it was stopped: `worse` or `time`."""
    error: str = ""


@dataclass(frozen=True)
class Pace:
    """How long things take."""

    step: float
    """Seconds a training step."""
    measuring: float
    """Seconds for all held-out rows."""

    def of(self, steps: int) -> float:
        """Seconds for a trial that is trained to its end."""
        return steps * self.step + len(RUNGS) * self.measuring


def run_trial(
    session: Session, settings: TrainSettings, folder: Path, reached: Reached, seconds: float
) -> Outcome:
    """Train with these settings in at most so many seconds; files are made in `folder` and removed again."""
    started, done = time.monotonic(), 0
    found: list[Measured] = []
    rungs: dict[int, int] = {}

    def watch(trainer: Trainer, steering: Steering) -> None:
        nonlocal done
        done = trainer.step
        rungs.update({} if rungs else rung_steps(trainer.steps))
        rung = rungs.get(done)
        if rung is not None:
            found[:] = [_measured(session, trainer, steering)]
            if not math.isfinite(found[0].loss):
                raise ReftEdgeError(f"the held-out loss is {found[0].loss} after step {done}")
            if rung < RUNGS[-1] and reached(rung, found[0]):
                raise StoppedError("worse")
        if done < trainer.steps and time.monotonic() - started > seconds:
            raise StoppedError("time")

    with scratch_folder(folder) as scratch:
        path = scratch / "trial.safetensors"
        try:
            result = _train(session, settings, path, watch)
        except StoppedError as stopped:
            return Outcome(steps=done, seconds=time.monotonic() - started, stopped=str(stopped))
        except ReftEdgeError as error:
            return Outcome(steps=done, seconds=time.monotonic() - started, error=_reason(error))
        spent = time.monotonic() - started
        return Outcome(found[0], path.read_bytes(), result.parameters, result.steps, spent)


def _train(session: Session, settings: TrainSettings, path: Path, watch: Any) -> Any:
    return train(
        session.model,
        session.folder.name,
        session.data,
        path,
        settings,
        save_every=1 << 40,
        execution=session.wanted.execution,
        base_weights=session.wanted.base_weights,
        after_step=watch,
    )


def _reason(error: ReftEdgeError) -> str:
    """Without what is said of the checkpoint, which is gone."""
    return str(error).partition(". saved a checkpoint")[0]


def _measured(session: Session, trainer: Trainer, steering: Steering) -> Measured:
    assert session.evaluation is not None
    return measure(
        session.model,
        steering,
        session.evaluation,
        trainer.settings,
        trainer.device,
        trainer.autocast,
        trainer.logits,
    )


def rung_steps(steps: int) -> dict[int, int]:
    """Rungs by the step after which they are reached; a short training has fewer."""
    return {math.ceil(steps * rung / RUNGS[-1]): rung for rung in RUNGS}


def pace_of(session: Session, settings: TrainSettings, folder: Path) -> Pace:
    """Measured on a few steps. Raises ReftEdgeError where they cannot be done."""
    times: list[float] = []

    def watch(trainer: Trainer, steering: Steering) -> None:
        times.append(time.monotonic())
        if trainer.step == _PROBED:
            _measured(session, trainer, steering)
            times.append(time.monotonic())
            raise StoppedError("time")

    with scratch_folder(folder) as scratch, contextlib.suppress(StoppedError):
        _train(session, settings, scratch / "pace.safetensors", watch)
    if len(times) <= _PROBED:
        return Pace(0.0, 0.0)
    return Pace((times[_PROBED - 1] - times[0]) / (_PROBED - 1), times[-1] - times[-2])


def measure_file(session: Session, path: Path) -> Measured:
    """The held-out rows with the adapter in a file, in plain passes. Raises ReftEdgeError for a file that is no adapter."""
    assert session.evaluation is not None
    place = session.wanted.execution.place()
    interventions = Interventions.from_adapter(load_adapter(path)).to(place)
    autocast = interventions.config.training.get("dtype") == "bf16"
    with frozen(session.model, autocast), steered(session.model, (interventions, 1.0)) as steering:
        return measure(session.model, steering, session.evaluation, session.settings, place, autocast)
