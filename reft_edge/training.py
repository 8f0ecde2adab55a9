"""Training an adapter: the base stays frozen, the loss is taken on completions only."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_edge.adapter import Adapter, AdapterConfig, save_adapter
from reft_edge.arithmetic import checkpointed, compiled, quick_attention, rounded_once
from reft_edge.checkpoint import Checkpoint
from reft_edge.classification import LabelledTexts
from reft_edge.data import Dataset, Example, check_positions
from reft_edge.distributed import ALONE, Processes
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place, write_atomically
from reft_edge.fingerprint import fingerprint
from reft_edge.graph_weights import use_exported_weights
from reft_edge.interrupts import Interrupts, interrupts
from reft_edge.interventions import Interventions
from reft_edge.layers import parse_layers
from reft_edge.likelihood import check_tokens
from reft_edge.locks import held
from reft_edge.objectives import Data, evaluate, label_accuracy, objective_of
from reft_edge.objectives import batch_loss as batch_loss
from reft_edge.preference import PreferenceObjective, Preferences, preferred
from reft_edge.profile import Profile, watched
from reft_edge.rescue import is_full, written_elsewhere
from reft_edge.steering import Steering, decoder_layers, steered

SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("auto", "fp32", "bf16")
LOAD_IN = ("", "4bit", "8bit")
CURVE_POINTS = 64
"""Most points of the loss curve that an adapter file keeps."""
GROUPED = 50
"""Most batches among whose rows those of like length are brought together."""
CHECK_EVERY = 10
"""Steps between checks that the parameters are sound."""
_SETTLE = 2.0
"""Seconds within which a launcher passes on a signal that its processes have got already."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults suit models of 100M to 1B parameters."""

    intervention: str = "loreft"
    layers: str = "all"
    rank: int = 4
    positions: str = "f7+l7"
    tied: bool = False
    act_fn: str = "linear"
    add_bias: bool = False
    prompt_format: str = "chat"
    lr: float = 2e-3
    epochs: float = 3.0
    max_steps: int | None = None
    """Optimiser steps; takes the place of `epochs`."""
    batch_size: int = 16
    """Rows a forward pass."""
    accumulate: int = 1
    """Forward passes an optimiser step."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    schedule: str = "linear"
    weight_decay: float = 0.0
    """AdamW's; never applied to the rotation R."""
    component: str = "block"
    """What of each layer is edited: the output of its `block`, its `attention` or its `mlp`."""
    dropout: float = 0.0
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    dtype: str = "auto"
    """Of the base model's arithmetic: fp32, bf16 (autocast), or auto for bf16 where the hardware has it."""
    pooling: str = ""
    """What a classifier's head reads: `cls` or `mean`; empty where there is no head."""
    beta: float = 0.1
    """Of preference training: how firmly it holds on to the base's own preferences."""
    load_in: str = ""
    """`4bit` or `8bit` where the frozen base was quantised as it was loaded."""
    group_by_length: bool = False
    """Rows of like length share a forward pass, so that less is padding."""

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0 and math.isfinite(self.lr), "a positive number"),
            "epochs": (self.epochs > 0 and math.isfinite(self.epochs), "a positive number"),
            "max_steps": (self.max_steps is None or self.max_steps >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "warmup": (0 <= self.warmup < 1, "at least 0, less than 1"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip": (self.clip > 0, "a positive number"),
            "beta": (self.beta > 0 and math.isfinite(self.beta), "a positive number"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "load_in": (self.load_in in LOAD_IN, "4bit or 8bit"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                raise ReftEdgeError(f"{name} is {getattr(self, name)!r}; expected {expected}")


@dataclass(frozen=True)
class StepReport:
    """One optimiser step."""

    step: int
    """Steps done, counting this one."""
    steps: int
    loss: float
    """Mean over the step's completion tokens, in nats."""
    lr: float
    tokens_per_second: float
    """Prompt and completion tokens, padding left out."""
    evaluation: float | None = None
    """Loss on the held-out rows after this step, where they were evaluated; it may not be finite."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training wrote."""

    path: Path
    size: int
    """Bytes."""
    parameters: int
    base_parameters: int
    steps: int
    loss: float
    """Mean training loss of the last tenth of the steps, in nats a token."""
    evaluation: float | None
    """Loss on the held-out file, in nats a token; None also where it is not finite."""
    seconds: float
    accuracy: float | None = None
    """Share of the held-out rows whose label is right, or of held-out pairs in which the chosen answer gained more."""
    profile: dict[str, float] | None = None
    """Mean seconds of a step by section, where asked for."""


@dataclass(frozen=True)
class Execution:
    """How a training is carried out; nothing of it changes what is learnt, but for rounding."""

    device: str | None = None
    """A torch device; by default CUDA where there is one. Several processes choose their own."""
    processes: Processes = ALONE
    profile: bool = False
    """Measure where the time of a step goes."""
    checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile: faster steps after half a minute or so."""

    def place(self) -> torch.device:
        """The device of this process. Raises ReftEdgeError if it cannot be used."""
        if self.processes.accelerator is None:
            return torch_device(self.device)
        found: torch.device = self.processes.accelerator.device
        return found


_PLAIN = Execution()


@dataclass
class Trainer:
    """A training under way; everything that a checkpoint must bring back is `state()`."""

    model: Any
    interventions: Interventions
    settings: TrainSettings
    data: Data
    device: torch.device
    processes: Processes = ALONE
    profile: Profile | None = None
    step: int = 0
    between_steps: bool = True
    """Whether parameters, moments, losses and `step` belong together: not while the optimiser moves them."""

    def __post_init__(self) -> None:
        self.objective = objective_of(self.data, self.settings.beta)
        self.interventions.to(self.device)
        rotation = self.interventions.rotation
        groups: list[dict[str, Any]] = [
            {"params": list(self.interventions.trained.values()), "weight_decay": self.settings.weight_decay}
        ]
        if rotation is not None:
            groups.append({"params": [rotation.vectors], "weight_decay": 0.0})
        if self.interventions.head:
            head = list(self.interventions.head.values())
            groups.append({"params": head, "weight_decay": self.settings.weight_decay})
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr)
        self.autocast = chosen_dtype(self.settings.dtype, self.device) == torch.bfloat16
        self.losses: list[float] = []
        self.held_out: list[float] = []
        """By step; NaN where held-out rows were not evaluated, infinite where their loss was not finite."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        return max(1, math.ceil(self.settings.epochs * self._steps_an_epoch()))

    def run(
        self, steering: Steering, on_step: Callable[[StepReport], None], interrupts: Interrupts | None = None
    ) -> None:
        """Train to the end. Raises ReftEdgeError if the loss, a gradient or a parameter stops being finite.

        KeyboardInterrupt comes after a whole step if `interrupts` noted a signal, in all processes after the same one.
        """
        while self.step < self.steps:
            started = time.perf_counter()
            rows = self.rows(self.step)
            if self.settings.dropout:
                torch.manual_seed(self.settings.seed + 1_000_003 * (self.step + 1) + self.processes.rank)
            lr = self.settings.lr * rate(self.settings, self.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = self._gradients(steering, rows)
            if not math.isfinite(loss):
                raise ReftEdgeError(
                    f"the loss is {loss} at step {self.step + 1}; lower the learning rate (--lr)"
                )
            self._enter("optimiser")
            norm = nn.utils.clip_grad_norm_(self.interventions.parameters(), self.settings.clip)
            if not math.isfinite(norm):
                raise ReftEdgeError(
                    f"the gradient is not finite at step {self.step + 1}; lower the learning rate (--lr)"
                )
            self.between_steps = False
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._enter("other")
            self.step += 1
            self.losses.append(loss)
            self.held_out.append(math.nan)
            self.between_steps = True
            if self.step % CHECK_EVERY == 0 or self.step == self.steps:
                self.interventions.check_sound()
            tokens = self.objective.tokens(rows)
            if self.profile is not None:
                self.profile.end_step()
            on_step(StepReport(self.step, self.steps, loss, lr, tokens / (time.perf_counter() - started)))
            if interrupts is not None and self.processes.any(interrupts.count > 0):
                raise interrupts.as_error()

    def _gradients(self, steering: Steering, rows: list[Any]) -> float:
        """Compute the gradient of the rows' mean loss, over all processes; returns that loss."""
        count = self.objective.count(rows)
        loss = 0.0
        for start in range(0, len(rows), self.settings.batch_size):
            mine, weight = self.processes.share(rows[start : start + self.settings.batch_size])
            total = self.objective.loss(self.model, steering, mine, self.device, self.autocast)
            part = total * (weight / count)
            if part.requires_grad:  # not where no row of the batch is long enough for any position
                part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        for parameter in self.interventions.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self.processes.add_up(loss, list(self.interventions.parameters()))

    def _enter(self, section: str) -> None:
        if self.profile is not None:
            self.profile.switch(section)

    def state(self) -> dict[str, Tensor]:
        """Parameters, optimiser moments and losses so far, by name."""
        tensors = {
            f"module.{name}": tensor.detach() for name, tensor in self.interventions.state_dict().items()
        }
        for name, parameter in self.interventions.named_parameters():
            for key, moment in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = moment
        for name, values in (("losses", self.losses), ("held_out", self.held_out)):
            tensors[name] = torch.tensor(values, dtype=torch.float64)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def expected_state(self, step: int) -> dict[str, Tensor]:
        """Tensors of the names, shapes and types of `state()` after `step` steps, without values.

        Raises ReftEdgeError for a step that this training does not have.
        """
        if not 1 <= step <= self.steps:
            raise ReftEdgeError(f"it is of step {step}; this training has {self.steps}")
        tensors = {f"module.{name}": tensor for name, tensor in self.interventions.state_dict().items()}
        for name, parameter in self.interventions.named_parameters():
            moments = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
        for name in ("losses", "held_out"):
            tensors[name] = torch.empty(step, dtype=torch.float64, device="meta")
        return {name: tensor.detach().to("meta") for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `state()` as it was after `step` steps, its tensors being as `expected_state` says.

        Raises ReftEdgeError, before anything is taken, for values that no training leaves.
        """
        for name, tensor in tensors.items():
            if name != "held_out" and not bool(torch.isfinite(tensor).all()):
                raise ReftEdgeError(f"{name} is not finite")
            if name.endswith(".exp_avg_sq") and bool((tensor < 0).any()):
                raise ReftEdgeError(f"{name} is negative")
            if name.startswith("optimizer.") and name.endswith(".step") and float(tensor) != step:
                raise ReftEdgeError(f"{name} is {float(tensor):g} after {step} steps")
        prefix = "module."
        self.interventions.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
        self.interventions.check_sound()
        for name, parameter in self.interventions.named_parameters():
            moments = f"optimizer.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(moments): tensor.to(parameter.device) if tensor.ndim else tensor
                for key, tensor in tensors.items()
                if key.startswith(moments)
            }
        self.losses, self.held_out = tensors["losses"].tolist(), tensors["held_out"].tolist()
        self.step = step

    @property
    def learnt(self) -> bool:
        """Whether a gradient other than 0 ever came to the interventions, a classification head left aside."""
        edits = [
            parameter
            for name, parameter in self.interventions.named_parameters()
            if not name.startswith("head.")
        ]
        return any(bool(self.optimizer.state[parameter]["exp_avg"].any()) for parameter in edits)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.array([self.objective.tokens([row]) for row in self.data.examples], dtype=np.int64)

    def _steps_an_epoch(self) -> int:
        return math.ceil(len(self.data.examples) / (self.settings.batch_size * self.settings.accumulate))

    def rows(self, step: int) -> list[Any]:
        """The rows of a step: every epoch has its own order, drawn from the seed, so that a resumed run sees the same."""
        epoch, index = divmod(step, self._steps_an_epoch())
        random = np.random.default_rng([self.settings.seed, epoch])
        order = random.permutation(len(self.data.examples))
        if self.settings.group_by_length:
            order = grouped(order, self._lengths, self.settings.batch_size, random)
        size = self.settings.batch_size * self.settings.accumulate
        return [self.data.examples[i] for i in order[index * size : (index + 1) * size]]


def train(
    model: Any,
    base_name: str,
    data: Data,
    output: Path,
    settings: TrainSettings,
    evaluation: Data | None = None,
    resume: bool = False,
    save_every: int = 50,
    execution: Execution = _PLAIN,
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
        output.with_name(output.name + ".checkpoint"),
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


@contextmanager
def frozen(model: Any, autocast: bool = False) -> Iterator[None]:
    """Inside the block, no parameter of the model takes a gradient and the model is in evaluation mode.

    With `autocast` its linear layers hold bfloat16 weights.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        with rounded_once(model) if autocast else nullcontext(), quick_attention(model):
            yield
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)


def rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Share of the learning rate at a step, counted from 0: warm-up, then the schedule's way down to 0."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done


def grouped(
    order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """The same rows in an order in which every `batch_size` of them are of like `lengths` (by row).

    Rows are sorted within parts of the given order, two parts or more and at most GROUPED batches each, so that every epoch
    has batches of its own; these are then shuffled. A last batch that is not full stays last.
    """
    size = batch_size * max(1, min(GROUPED, len(order) // (2 * batch_size)))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    by_length = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    full = len(order) - len(order) % batch_size
    batches = random.permutation(by_length[:full].reshape(-1, batch_size))
    return np.concatenate([batches.ravel(), by_length[full:]])


def torch_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU. Raises ReftEdgeError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ReftEdgeError(
            f"cannot compute on device {name!r}: {reason}; leave --device out to choose"
        ) from error
    return device


def chosen_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` is bfloat16 where the device has instructions for it. Raises ReftEdgeError for others."""
    if dtype not in DTYPES:
        raise ReftEdgeError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


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
