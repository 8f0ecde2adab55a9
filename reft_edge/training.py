"""Training an adapter: the base stays frozen, the loss is taken on completions only."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_edge.adapter import AdapterConfig, save_adapter
from reft_edge.arithmetic import checkpointed, compiled, quick_attention, rounded_once
from reft_edge.checkpoint import Checkpoint
from reft_edge.classification import LabelledText, LabelledTexts, class_scores
from reft_edge.data import Dataset, Example
from reft_edge.distributed import ALONE, Processes
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place
from reft_edge.fingerprint import fingerprint
from reft_edge.graph_weights import use_exported_weights
from reft_edge.interventions import Interventions, dropout_off
from reft_edge.layers import parse_layers
from reft_edge.likelihood import joined_logits
from reft_edge.preference import PreferenceObjective, Preferences, preferred
from reft_edge.profile import Profile, watched
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

Data = Dataset | LabelledTexts | Preferences


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
    """Loss on the held-out file, in nats a token."""
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

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        return max(1, math.ceil(self.settings.epochs * self._steps_an_epoch()))

    def run(self, steering: Steering, on_step: Callable[[StepReport], None]) -> None:
        """Train to the end. Raises ReftEdgeError if the loss or a parameter stops being finite."""
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
            self.between_steps = False
            nn.utils.clip_grad_norm_(self.interventions.parameters(), self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._enter("other")
            self.step += 1
            self.losses.append(loss)
            self.between_steps = True
            if self.step % CHECK_EVERY == 0 or self.step == self.steps:
                self.interventions.check_sound()
            tokens = self.objective.tokens(rows)
            if self.profile is not None:
                self.profile.end_step()
            on_step(StepReport(self.step, self.steps, loss, lr, tokens / (time.perf_counter() - started)))

    def _gradients(self, steering: Steering, rows: list[Any]) -> float:
        """Compute the gradient of the rows' mean loss, over all processes; returns that loss."""
        count = self.objective.count(rows)
        loss = 0.0
        for start in range(0, len(rows), self.settings.batch_size):
            mine, weight = self.processes.share(rows[start : start + self.settings.batch_size])
            total = self.objective.loss(self.model, steering, mine, self.device, self.autocast)
            part = total * (weight / count)
            if part.requires_grad:  # not where a prompt is too short for any position
                part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
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
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `state()` as it was after `step` steps."""
        prefix = "module."
        self.interventions.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
        for name, parameter in self.interventions.named_parameters():
            moments = f"optimizer.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(moments): tensor.to(parameter.device) if tensor.ndim else tensor
                for key, tensor in tensors.items()
                if key.startswith(moments)
            }
        self.losses = tensors["losses"].tolist()
        self.step = step

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
) -> TrainResult:
    """Train an adapter for a frozen model and write it to `output`.

    The kind of `data` says which: a causal language model learns completions, or to prefer one answer to another, an
    encoder and a new head learn labels.

    With `base_weights`, a folder that this model was exported to, the model is given that folder's 16-bit or quantised
    weights first, so that the adapter is trained on what it will meet on the device.

    A checkpoint beside `output` is written every `save_every` steps, after the last one and when interrupted, and removed
    once `output` is written; `resume` continues from it. Raises ReftEdgeError for settings the model cannot follow, a checkpoint of another
    training, or a loss that is not finite.
    """
    started = time.perf_counter()
    if save_every < 1:
        raise ReftEdgeError(f"save_every is {save_every}; expected 1 or more")
    processes = execution.processes
    processes.from_main(lambda: check_place(output))
    place = execution.place()
    labels = data.labels if isinstance(data, LabelledTexts) else ()
    config = adapter_config(model, base_name, settings, labels)
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
    if resume:
        found = processes.from_main(checkpoint.load)
        if found:
            trainer.restore(*found)
        report(
            f"continuing after step {trainer.step}"
            if found
            else "there is no checkpoint; starting from the beginning"
        )
    elif processes.main and checkpoint.path.exists():
        report(
            f"starting from the beginning; {checkpoint.path}, which --resume would continue, will be replaced"
        )

    def after_step(step: StepReport) -> None:
        if step.step % save_every == 0 or step.step == step.steps:
            trainer.interventions.check_sound()
            if processes.main:
                checkpoint.save(trainer.state(), trainer.step)
        on_step(step)

    with (
        frozen(model, trainer.autocast and not processes.sharded),
        checkpointed(model) if execution.checkpointing else nullcontext(),
        compiled(model) if execution.compile else nullcontext(),
        steered(model, (trainer.interventions, 1.0)) as steering,
    ):
        try:
            with watched(model, steering, trainer.profile) if trainer.profile else nullcontext():
                trainer.run(steering, after_step)
        except KeyboardInterrupt:
            if trainer.step and trainer.between_steps and processes.main:
                checkpoint.save(trainer.state(), trainer.step)
                report(f"saved a checkpoint after step {trainer.step}; --resume continues from it")
            raise
        held_out = accuracy = None
        if evaluation is not None:
            report("evaluating on the held-out file")
            held_out = evaluate(
                model,
                steering,
                evaluation.examples,
                settings.batch_size,
                place,
                trainer.autocast,
                trainer.objective,
            )
            if isinstance(evaluation, LabelledTexts):
                accuracy = label_accuracy(
                    model, trainer.interventions, evaluation, settings.batch_size, place, trainer.autocast
                )
            elif isinstance(evaluation, Preferences):
                accuracy = preferred(
                    model,
                    steering,
                    evaluation,
                    PreferenceObjective(settings.beta),
                    settings.batch_size,
                    place,
                    trainer.autocast,
                )
    loss = float(np.mean(trainer.losses[-max(1, len(trainer.losses) // 10) :]))
    provenance = _provenance(settings, data, trainer, loss, held_out)
    if accuracy is not None:
        provenance["evaluation_accuracy"] = round(accuracy, 6)
    if weights:
        provenance["base_weights"] = weights
    adapter = trainer.interventions.to_adapter(dataclasses.replace(config, training=provenance))

    def save() -> int:
        save_adapter(adapter, output)
        checkpoint.path.unlink(missing_ok=True)
        return output.stat().st_size

    return TrainResult(
        output,
        processes.from_main(save),
        adapter.num_parameters,
        base_parameters,
        trainer.steps,
        loss,
        held_out,
        time.perf_counter() - started,
        accuracy,
        trainer.profile.a_step() if trainer.profile else None,
    )


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


class Objective(Protocol):
    """What a training minimises, over rows of its own kind."""

    def count(self, rows: Sequence[Any]) -> int:
        """What a sum of losses is divided by."""

    def tokens(self, rows: Sequence[Any]) -> int:
        """Tokens that the model reads."""

    def loss(
        self, model: Any, steering: Steering, rows: Sequence[Any], device: torch.device, autocast: bool
    ) -> Tensor:
        """Summed negative log-likelihood, in nats."""


class Completions:
    """Every token of the completions, given the prompts."""

    def count(self, rows: Sequence[Example]) -> int:
        return sum(len(row.completion) for row in rows)

    def tokens(self, rows: Sequence[Example]) -> int:
        return sum(len(row.prompt) + len(row.completion) for row in rows)

    def loss(
        self, model: Any, steering: Steering, rows: Sequence[Example], device: torch.device, autocast: bool
    ) -> Tensor:
        return batch_loss(model, steering, rows, device, autocast)


_COMPLETIONS = Completions()


class Labels:
    """The label of every text."""

    def count(self, rows: Sequence[LabelledText]) -> int:
        return len(rows)

    def tokens(self, rows: Sequence[LabelledText]) -> int:
        return sum(len(row.tokens.ids) for row in rows)

    def loss(
        self,
        model: Any,
        steering: Steering,
        rows: Sequence[LabelledText],
        device: torch.device,
        autocast: bool,
    ) -> Tensor:
        ((interventions, _),) = steering.adapters
        scores = class_scores(model, interventions, [row.tokens for row in rows], device, autocast)
        targets = torch.tensor([row.label for row in rows], device=device)
        return nn.functional.cross_entropy(scores, targets, reduction="sum")


def objective_of(data: Data, beta: float) -> Objective:
    """What such data trains; `beta` is for preferences."""
    if isinstance(data, Preferences):
        return PreferenceObjective(beta)
    return Labels() if isinstance(data, LabelledTexts) else _COMPLETIONS


def batch_loss(
    model: Any, steering: Steering, rows: Sequence[Example], device: torch.device, autocast: bool
) -> Tensor:
    """Summed negative log-likelihood, in nats, of the rows' completions; logits are only computed where they count."""
    inputs = [(row.prompt, row.completion[:-1]) for row in rows]
    logits = joined_logits(model, steering, inputs, device, autocast)
    targets = torch.tensor([token for row in rows for token in row.completion], device=device)
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


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


@torch.no_grad()
def evaluate(
    model: Any,
    steering: Steering,
    rows: Sequence[Any],
    batch_size: int,
    device: torch.device,
    autocast: bool,
    objective: Objective = _COMPLETIONS,
) -> float:
    """Mean negative log-likelihood, in nats a completion token or label, dropout off."""
    with dropout_off(*(interventions for interventions, _ in steering.adapters)):
        total = sum(
            float(objective.loss(model, steering, rows[start : start + batch_size], device, autocast))
            for start in range(0, len(rows), batch_size)
        )
    return total / objective.count(rows)


@torch.no_grad()
def label_accuracy(
    model: Any,
    interventions: Interventions,
    data: LabelledTexts,
    batch_size: int,
    device: torch.device,
    autocast: bool = False,
) -> float:
    """Share of rows whose likeliest label is theirs, dropout off; the model is steered by `interventions`."""
    right = 0
    with dropout_off(interventions):
        for start in range(0, len(data.examples), batch_size):
            rows = data.examples[start : start + batch_size]
            scores = class_scores(model, interventions, [row.tokens for row in rows], device, autocast)
            right += sum(int(found) == row.label for found, row in zip(scores.argmax(1), rows, strict=True))
    return right / len(data.examples)


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


def _provenance(
    settings: TrainSettings,
    data: Data,
    trainer: Trainer,
    loss: float,
    evaluation: float | None,
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
        "loss": round(loss, 6),
        "evaluation_loss": None if evaluation is None else round(evaluation, 6),
        "curve": curve(trainer.losses),
        "versions": {package: version(package) for package in ("reft-edge", "torch", "transformers")},
    }
