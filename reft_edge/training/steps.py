"""A training's steps with what is done between them: checkpoints, held-out rows, interrupts."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.steering.hooks import Steering
from reft_edge.training.checkpoint import Checkpoint
from reft_edge.training.classification import LabelledTexts
from reft_edge.training.interrupts import Interrupts
from reft_edge.training.objectives import Data, evaluate, label_accuracy
from reft_edge.training.preference import PreferenceObjective, Preferences, preferred
from reft_edge.training.profile import watched
from reft_edge.training.rescue import written_elsewhere
from reft_edge.training.settings import StepReport
from reft_edge.training.trainer import Trainer

AfterStep = Callable[[Trainer, Steering], None]


def nothing_more(trainer: Trainer, steering: Steering) -> None:
    """What is done after a step of a training that nobody watches."""


class NothingLearntError(ReftEdgeError):
    """A training in which the interventions never received a gradient."""


@dataclass(frozen=True)
class HeldOut:
    """What was measured on held-out rows; None where it was not, or is not finite."""

    loss: float | None = None
    accuracy: float | None = None


@dataclass
class Steps:
    """A training's steps with what is done between them: checkpoints, held-out rows, interrupts."""

    model: Any
    trainer: Trainer
    checkpoint: Checkpoint
    evaluation: Data | None
    save_every: int
    eval_every: int | None
    report: Callable[[str], None]
    on_step: Callable[[StepReport], None]
    after_step: AfterStep
    saved: int = 0
    """The step of the checkpoint on disk; 0 if there is none of this training."""

    def begin(self, resume: bool) -> None:
        """Continue from the checkpoint, or make place for a new one. Raises ReftEdgeError if it cannot be continued."""
        processes, checkpoint = self.trainer.processes, self.checkpoint
        if not resume:
            if moved := processes.from_main(checkpoint.move_aside):
                self.report(
                    f"{checkpoint.path} is of another training; it is kept as {moved}, and --resume continues it "
                    "under its old name"
                )
            elif processes.main and checkpoint.path.exists():
                self.report(
                    f"starting from the beginning; {checkpoint.path}, which --resume would continue, will be replaced"
                )
            return
        found = processes.from_main(lambda: checkpoint.load(self.trainer.expected_state))
        if found is None:
            self.report("there is no checkpoint; starting from the beginning")
            return
        try:
            self.trainer.restore(*found)
        except ReftEdgeError as error:
            raise checkpoint.unusable(error) from error
        self.saved = self.trainer.step
        self.report(f"continuing after step {self.trainer.step}")

    def run(self, steering: Steering, interrupts: Interrupts) -> None:
        """Train to the end. What was reached is saved if an interrupt or an error ends it before."""
        trainer = self.trainer
        clock = watched(self.model, steering, trainer.profile) if trainer.profile else nullcontext()
        try:
            with clock, interrupts.noted():
                trainer.run(steering, lambda step: self._after(step, steering), interrupts)
            if not trainer.learnt:
                raise NothingLearntError(
                    "no token of any row was edited, so nothing was learnt and nothing is written: the prompts are too "
                    f"short for the positions {trainer.settings.positions}; choose others, such as l1 or all"
                )
        except NothingLearntError:
            if trainer.processes.main:
                self.checkpoint.remove()
            raise
        except KeyboardInterrupt:
            kept = "stopped at once" if interrupts.count > 1 else self._rescue()
            self.report(kept or "nothing is saved: no step was done as a whole")
            raise
        except Exception as error:
            kept = self._rescue()
            if isinstance(error, ReftEdgeError):
                raise ReftEdgeError(f"{error}{kept and f'. {kept}'}") from error
            if lacks_memory(error):
                raise ReftEdgeError(
                    f"there is not enough memory for step {trainer.step + 1}; lower --batch-size (and raise --accumulate), "
                    f"or try --checkpointing{kept and f'. {kept}'}"
                ) from error
            self.report(kept)
            raise

    def _after(self, step: StepReport, steering: Steering) -> None:
        trainer = self.trainer
        if self.eval_every and step.step % self.eval_every == 0 and step.step < step.steps:
            step = dataclasses.replace(step, evaluation=self._measure_between(steering))
        if step.step % self.save_every == 0 or step.step == step.steps:
            trainer.interventions.check_sound()
            if trainer.processes.main:
                self._save_or_say()
        self.on_step(step)
        self.after_step(trainer, steering)

    def _measure_between(self, steering: Steering) -> float | None:
        """The held-out loss after a step; one that cannot be measured is reported and does not end the training."""
        step = self.trainer.step
        try:
            with self.trainer.profile.paused() if self.trainer.profile else nullcontext():
                loss = self.measure_loss(steering)
        except (ReftEdgeError, RuntimeError, MemoryError) as error:
            self.report(f"the held-out rows could not be evaluated after step {step}: {error}")
            return None
        self.trainer.held_out[-1] = loss if math.isfinite(loss) else math.inf
        return loss

    def measure_loss(self, steering: Steering) -> float:
        """On the held-out rows, in nats."""
        assert self.evaluation is not None
        trainer = self.trainer
        return evaluate(
            self.model,
            steering,
            self.evaluation.examples,
            trainer.settings.batch_size,
            trainer.device,
            trainer.autocast,
            trainer.objective,
        )

    def measure(self, steering: Steering) -> HeldOut:
        """All that is told of the held-out rows; a loss that is not finite is reported."""
        loss = self.measure_loss(steering)
        if not math.isfinite(loss):
            self.report(f"the held-out loss is {loss}; the file says null in its place")
        settings, place, autocast = self.trainer.settings, self.trainer.device, self.trainer.autocast
        accuracy = None
        if isinstance(self.evaluation, LabelledTexts):
            accuracy = label_accuracy(
                self.model,
                self.trainer.interventions,
                self.evaluation,
                settings.batch_size,
                place,
                autocast,
            )
        elif isinstance(self.evaluation, Preferences):
            objective = self.trainer.objective
            assert isinstance(objective, PreferenceObjective)
            accuracy = preferred(
                self.model, steering, self.evaluation, objective, settings.batch_size, place, autocast
            )
        return HeldOut(loss if math.isfinite(loss) else None, accuracy)

    def _save_or_say(self) -> None:
        trainer = self.trainer
        try:
            self.checkpoint.save(trainer.state(), trainer.step)
        except ReftEdgeError as error:
            old = f"; that of step {self.saved} is kept" if self.saved else ""
            self.report(f"no checkpoint after step {trainer.step}: {error}{old}. The training goes on")
        else:
            self.saved = trainer.step

    def _rescue(self) -> str:
        """Save the last whole step where an interrupt or an error ends the training; says where it is, or why nowhere."""
        trainer = self.trainer
        if not trainer.processes.main:
            return ""
        if trainer.between_steps and trainer.step > self.saved:
            try:
                trainer.interventions.check_sound()
                state = trainer.state()
                self.checkpoint.save(state, trainer.step)
                self.saved = trainer.step
            except ReftEdgeError as error:
                if not isinstance(error.__cause__, OSError):
                    return self._kept()
                elsewhere = written_elsewhere(
                    lambda path: self.checkpoint.save_to(path, state, trainer.step), self.checkpoint.path.name
                )
                if elsewhere is not None:
                    return f"{error}. The checkpoint of step {trainer.step} is at {elsewhere}: move it to {self.checkpoint.path} and continue with --resume"
                return f"no checkpoint after step {trainer.step}: {error}. {self._kept()}".rstrip()
            return f"saved a checkpoint after step {trainer.step}; --resume continues from it"
        return self._kept()

    def _kept(self) -> str:
        return (
            f"{self.checkpoint.path} keeps step {self.saved}; --resume continues from it"
            if self.saved
            else ""
        )


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, torch or a device could not have the memory that it asked for."""
    said = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )
