"""What a training minimises over rows of each kind, and how well it does on held-out ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reft_edge.steering.heads import class_scores
from reft_edge.steering.hooks import Steering
from reft_edge.steering.interventions import Interventions, dropout_off
from reft_edge.steering.likelihood import Logits, check_targets, joined_logits
from reft_edge.training.classification import LabelledText, LabelledTexts
from reft_edge.training.data import Dataset
from reft_edge.training.preference import PreferenceObjective, Preferences
from reft_edge.training.turns import IGNORED, Example

Data = Dataset | LabelledTexts | Preferences


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


@dataclass(frozen=True)
class Completions:
    """Every token of the completions that is trained, given the prompts."""

    logits: Logits = joined_logits

    def count(self, rows: Sequence[Example]) -> int:
        return sum(row.count for row in rows)

    def tokens(self, rows: Sequence[Example]) -> int:
        return sum(len(row.prompt) + len(row.completion) for row in rows)

    def loss(
        self, model: Any, steering: Steering, rows: Sequence[Example], device: torch.device, autocast: bool
    ) -> Tensor:
        return batch_loss(model, steering, rows, device, autocast, self.logits)


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


def objective_of(data: Data, beta: float, logits: Logits = joined_logits) -> Objective:
    """What such data trains; `beta` is for preferences. `logits` gives those of completions."""
    if isinstance(data, Preferences):
        return PreferenceObjective(beta, logits)
    return Labels() if isinstance(data, LabelledTexts) else Completions(logits)


def batch_loss(
    model: Any,
    steering: Steering,
    rows: Sequence[Example],
    device: torch.device,
    autocast: bool,
    logits_of: Logits = joined_logits,
) -> Tensor:
    """Summed negative log-likelihood, in nats, of the rows' completions; logits are only computed where they count."""
    inputs = [(row.prompt, row.completion[:-1]) for row in rows]
    logits = logits_of(model, steering, inputs, device, autocast)
    check_targets(logits, [row.completion for row in rows])
    targets = torch.tensor([token for row in rows for token in row.targets], device=device)
    return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


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
