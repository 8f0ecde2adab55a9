"""The loop over batches: forward, backward, optimiser step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.device import chosen_dtype
from reft_edge.steering.hooks import Steering
from reft_edge.steering.interventions import Interventions
from reft_edge.steering.likelihood import Logits, joined_logits
from reft_edge.training.distributed import ALONE, Processes
from reft_edge.training.interrupts import Interrupts
from reft_edge.training.objectives import Data, objective_of
from reft_edge.training.profile import Profile
from reft_edge.training.settings import StepReport, TrainSettings

GROUPED = 50
"""Most batches among whose rows those of like length are brought together."""
CHECK_EVERY = 10
"""Steps between checks that the parameters are sound."""


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
    logits: Logits = joined_logits
    """How logits of completions are computed."""
    step: int = 0
    between_steps: bool = True
    """Whether parameters, moments, losses and `step` belong together: not while the optimiser moves them."""

    def __post_init__(self) -> None:
        self.objective = objective_of(self.data, self.settings.beta, self.logits)
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
        return steps_of(self.settings, len(self.data.examples))

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
        return steps_an_epoch(self.settings, len(self.data.examples))

    def rows(self, step: int) -> list[Any]:
        """The rows of a step: every epoch has its own order, drawn from the seed, so that a resumed run sees the same."""
        epoch, index = divmod(step, self._steps_an_epoch())
        random = np.random.default_rng([self.settings.seed, epoch])
        order = random.permutation(len(self.data.examples))
        if self.settings.group_by_length:
            order = grouped(order, self._lengths, self.settings.batch_size, random)
        size = self.settings.batch_size * self.settings.accumulate
        return [self.data.examples[i] for i in order[index * size : (index + 1) * size]]


def steps_an_epoch(settings: TrainSettings, rows: int) -> int:
    return math.ceil(rows / (settings.batch_size * settings.accumulate))


def steps_of(settings: TrainSettings, rows: int) -> int:
    """Optimiser steps of a whole training on so many rows."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(settings.epochs * steps_an_epoch(settings, rows)))


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
