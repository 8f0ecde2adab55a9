"""Training an adapter: the base stays frozen, the loss is taken on completions only."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.adapter.file import save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place, write_atomically
from reft_edge.locks import held
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.exported_weights import use_exported_weights
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.places import parse_layers
from reft_edge.steering.hooks import Steering, steered
from reft_edge.steering.interventions import Interventions
from reft_edge.steering.likelihood import check_tokens
from reft_edge.training.checkpoint import Checkpoint
from reft_edge.training.classification import LabelledTexts
from reft_edge.training.data import Dataset, Example, check_positions
from reft_edge.training.frozen_base import checkpointed, compiled, frozen
from reft_edge.training.interrupts import Interrupts, interrupts
from reft_edge.training.objectives import Data, evaluate, label_accuracy
from reft_edge.training.preference import PreferenceObjective, Preferences, preferred
from reft_edge.training.profile import Profile, watched
from reft_edge.training.rescue import is_full, written_elsewhere
from reft_edge.training.settings import PLAIN, Execution, StepReport, TrainResult, TrainSettings
from reft_edge.training.trainer import Trainer

CURVE_POINTS = 64
"""Most points of the loss curve that an adapter file keeps."""


_SETTLE = 2.0
"""Seconds within which a launcher passes on a signal that its processes have got already."""


def train(
    model: Any,
    base_name: str,
    data: Data,
    output: Path,
    settings: TrainSettings,
    evaluation: Data | None = None,
    resume: bool = False,
    save_every: int = 50,
    execution: Execution = PLAIN,
    base_weights: Path | None = None,
    report: Callable[[str], None] = lambda message: None,
    on_step: Callable[[StepReport], None] = lambda step: None,
    eval_every: int | None = None,
) -> TrainResult:
    """Train an adapter for a frozen model and write it to `output`.

    The kind of `data` says which: a causal language model learns completions, or to prefer one answer to another, an
    encoder and a new head learn labels.

    With `base_weights`, a folder that this model was exported to, the model is given that folder's 16-bit or quantised
    weights first, so that the adapter is trained on what it will meet on the device.

    The loss on the rows of `evaluation` is measured at the end, and every `eval_every` steps.

    A checkpoint beside `output` is written every `save_every` steps, after the last one and when interrupted, and removed
    once `output` is written; `resume` continues from it. One that cannot be written is reported and the training goes on.
    If `output` cannot be written at the end, the adapter goes to another folder, which the error names. One process at
    a time trains to an output. Raises ReftEdgeError for settings the model cannot follow, a place that cannot be written
    or that another training writes to, a checkpoint of another training, a loss that is not finite, or rows too short
    for any of the positions.
    """
    started = time.perf_counter()
    for name, every in (("save_every", save_every), ("eval_every", eval_every)):
        if every is not None and every < 1:
            raise ReftEdgeError(f"{name} is {every}; expected 1 or more")
    if eval_every is not None and evaluation is None:
        raise ReftEdgeError("eval_every needs held-out rows; give a file with --eval")
    processes = execution.processes
    processes.from_main(lambda: check_place(output))
    place = execution.place()
    labels = data.labels if isinstance(data, LabelledTexts) else ()
    config = adapter_config(model, base_name, settings, labels)
    for notice in _checked_rows(model, data, evaluation, settings):
        report(notice)
    base_parameters = model.num_parameters()
    if settings.load_in and (base_weights is not None or not hasattr(model, "base_fingerprint")):
        raise ReftEdgeError("load_in is for a model that load_quantised gave, without an export's weights")
    weights: dict[str, Any] = {}
    if base_weights is not None:
        manifest = use_exported_weights(model, base_weights, config.base_fingerprint)
        weights = {"precision": manifest.precision, **manifest.quantisation}
    trainer = Trainer(
        processes.place(model, place),
        Interventions(config, settings.dropout, settings.seed),
        settings,
        data,
        place,
        processes,
        Profile(place) if execution.profile else None,
    )
    checkpoint = Checkpoint(
        checkpoint_of(output),
        {
            "settings": dataclasses.asdict(settings),
            "data": data.digest,
            "base": config.base_fingerprint,
            "rows": _digest(data.examples),
            "weights": weights,
        },
    )
    run = _Run(model, trainer, checkpoint, evaluation, save_every, eval_every, report, on_step)
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(training_to(output, report)) and None)
        processes.from_main(lambda: _check_room(output, checkpoint.path, trainer.interventions))
        run.begin(resume)
        caught = stack.enter_context(interrupts(settle=_SETTLE if processes.count > 1 else 0.0))
        stack.enter_context(frozen(model, trainer.autocast and not processes.sharded))
        stack.enter_context(checkpointed(model) if execution.checkpointing else nullcontext())
        stack.enter_context(compiled(model) if execution.compile else nullcontext())
        steering = stack.enter_context(steered(model, (trainer.interventions, 1.0)))
        run.steps(steering, caught)

        def write(found: HeldOut) -> tuple[Adapter, int]:
            adapter = trainer.interventions.to_adapter(
                dataclasses.replace(config, training=_provenance(settings, data, trainer, found, weights))
            )
            return adapter, processes.from_main(lambda: _write(adapter, output, checkpoint))

        found = HeldOut()
        if evaluation is not None:
            report("evaluating on the held-out file")
            try:
                found = run.measure(steering)
            except BaseException as error:
                write(found)
                said = f"{output} is written, without the held-out rows' loss"
                if isinstance(error, Exception):
                    raise ReftEdgeError(
                        f"the held-out rows could not be evaluated: {error}. {said}"
                    ) from error
                report(said)
                raise
        adapter, size = write(found)
        processes.from_main(lambda: checkpoint.remove() and None)
    return TrainResult(
        output,
        size,
        adapter.num_parameters,
        base_parameters,
        trainer.steps,
        _last_tenth(trainer.losses),
        found.loss,
        time.perf_counter() - started,
        found.accuracy,
        trainer.profile.a_step() if trainer.profile else None,
    )


def checkpoint_of(output: Path) -> Path:
    """Where the checkpoint of a training to `output` is."""
    return output.with_name(output.name + ".checkpoint")


@contextmanager
def training_to(output: Path, report: Callable[[str], None] = lambda message: None) -> Iterator[None]:
    """Be the one training that writes to `output`. Raises ReftEdgeError at once if another one is under way."""
    busy = f"another training writes to {output}; wait for its end, stop it, or give another output with -o"
    with held(output.with_name(f".{output.name}.lock"), busy) as locks:
        if not locks:
            report(f"this disk has no locks; let no other training write to {output}")
        yield


@dataclass(frozen=True)
class HeldOut:
    """What was measured on held-out rows; None where it was not, or is not finite."""

    loss: float | None = None
    accuracy: float | None = None


@dataclass
class _Run:
    """A training's steps with what is done between them: checkpoints, held-out rows, interrupts."""

    model: Any
    trainer: Trainer
    checkpoint: Checkpoint
    evaluation: Data | None
    save_every: int
    eval_every: int | None
    report: Callable[[str], None]
    on_step: Callable[[StepReport], None]
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

    def steps(self, steering: Steering, interrupts: Interrupts) -> None:
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
            objective = PreferenceObjective(settings.beta)
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


class NothingLearntError(ReftEdgeError):
    """A training in which the interventions never received a gradient."""


def _check_room(output: Path, checkpoint: Path, interventions: Interventions) -> None:
    """Raise ReftEdgeError unless the adapter can be written, and a checkpoint could have its name."""
    parameters = sum(tensor.numel() for tensor in interventions.tensors().values())
    check_place(output, room=4 * parameters)
    check_place(checkpoint)


def _write(adapter: Adapter, output: Path, checkpoint: Checkpoint) -> int:
    """The size of the file that was written.

    Where `output` cannot be written: first another folder is tried; then, if it is for want of room, the checkpoint, which
    the adapter replaces, gives way. Raises ReftEdgeError that says where the adapter is if it is not at `output`.
    """
    try:
        save_adapter(adapter, output)
    except ReftEdgeError as error:
        elsewhere = written_elsewhere(lambda path: save_adapter(adapter, path), output.name)
        if not (is_full(error) and _without_checkpoint(adapter, output, checkpoint)):
            where = f"the trained adapter is at {elsewhere}: move it from there" if elsewhere else ""
            if elsewhere is None and checkpoint.is_mine():
                where = f"{checkpoint.path} is kept: --resume writes the adapter once that can be"
            raise ReftEdgeError(f"{error}; {where or 'no other folder takes the adapter'}") from error
        if elsewhere is not None:
            elsewhere.unlink()
            elsewhere.parent.rmdir()
    return output.stat().st_size


def _without_checkpoint(adapter: Adapter, output: Path, checkpoint: Checkpoint) -> bool:
    """Whether the adapter could be written in place of the checkpoint, which is put back if not."""
    if not checkpoint.is_mine():
        return False
    content = checkpoint.path.read_bytes()
    checkpoint.remove()
    try:
        save_adapter(adapter, output)
    except ReftEdgeError:
        with suppress(ReftEdgeError):
            write_atomically(checkpoint.path, content)
        return False
    return True


def _last_tenth(losses: Sequence[float]) -> float:
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _checked_rows(
    model: Any, data: Data, evaluation: Data | None, settings: TrainSettings
) -> tuple[str, ...]:
    """Notices on rows that cannot be learnt from. Raises ReftEdgeError if all are such rows, or one has a token that the
    model lacks.
    """
    for part in (data, evaluation):
        if isinstance(part, LabelledTexts):
            check_tokens(model, [row.tokens.ids for row in part.examples])
        elif part is not None:
            check_tokens(model, [(*row.prompt, *row.completion) for row in _answers(part)])
    if isinstance(data, LabelledTexts):
        return ()
    return check_positions(_answers(data), settings.positions, settings.tied)


def _answers(data: Dataset | Preferences) -> list[Example]:
    """Of a pair, both."""
    if isinstance(data, Dataset):
        return data.examples
    return [side for pair in data.examples for side in (pair.chosen, pair.rejected)]


def _digest(rows: Sequence[Any]) -> str:
    """Of the rows as they are trained on: tokenised, cut or left out."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def adapter_config(
    model: Any, base_name: str, settings: TrainSettings, labels: tuple[str, ...] = ()
) -> AdapterConfig:
    """The description of an adapter for this model. Raises ReftEdgeError for layers or a rank it cannot have."""
    num_layers = len(decoder_layers(model))
    return AdapterConfig(
        intervention=settings.intervention,
        base_name=base_name,
        base_fingerprint=fingerprint(model),
        hidden_size=model.config.hidden_size,
        num_layers=num_layers,
        layers=parse_layers(settings.layers, num_layers),
        rank=settings.rank,
        positions=settings.positions,
        tied=settings.tied,
        act_fn=settings.act_fn,
        add_bias=settings.add_bias,
        prompt_format=settings.prompt_format,
        labels=labels,
        pooling=settings.pooling,
        component=settings.component,
    )


def curve(losses: Sequence[float], points: int = CURVE_POINTS) -> list[list[float]]:
    """A loss curve of at most `points` pairs: the last step of each stretch of steps, and its mean loss."""
    stretches = np.array_split(np.asarray(losses), min(points, len(losses)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return [[int(end), float(f"{stretch.mean():.5g}")] for end, stretch in zip(ends, stretches, strict=True)]


def held_out_curve(losses: Sequence[float], points: int = CURVE_POINTS) -> list[list[float | None]]:
    """Steps after which held-out rows were evaluated and their loss, None where it is not finite; the last `points`.

    `losses` are by step: NaN where they were not evaluated, infinite where the loss is not finite.
    """
    measured = [(step, loss) for step, loss in enumerate(losses, start=1) if not math.isnan(loss)]
    return [
        [step, float(f"{loss:.5g}") if math.isfinite(loss) else None] for step, loss in measured[-points:]
    ]


def _provenance(
    settings: TrainSettings, data: Data, trainer: Trainer, found: HeldOut, weights: dict[str, Any]
) -> dict[str, Any]:
    described = (
        "intervention",
        "layers",
        "rank",
        "positions",
        "tied",
        "act_fn",
        "add_bias",
        "prompt_format",
        "pooling",
    )
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in described}
    return {
        **kept,
        "dtype": "bf16" if trainer.autocast else "fp32",
        "steps": trainer.steps,
        "rows": len(data.examples),
        "data_sha256": data.digest,
        "loss": round(_last_tenth(trainer.losses), 6),
        "evaluation_loss": None if found.loss is None else round(found.loss, 6),
        "curve": curve(trainer.losses),
        "versions": {package: version(package) for package in ("reft-edge", "torch", "transformers")},
        **({} if found.accuracy is None else {"evaluation_accuracy": round(found.accuracy, 6)}),
        **({"evaluation_curve": held_out} if (held_out := held_out_curve(trainer.held_out)) else {}),
        **({"base_weights": weights} if weights else {}),
    }
