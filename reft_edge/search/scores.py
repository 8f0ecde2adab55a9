"""How well an adapter does on held-out rows, row by row, so that two can be compared on the same ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from reft_edge.errors import ReftEdgeError
from reft_edge.steering.heads import class_scores
from reft_edge.steering.hooks import Steering
from reft_edge.steering.interventions import dropout_off
from reft_edge.steering.likelihood import Logits, joined_logits
from reft_edge.training.classification import LabelledTexts
from reft_edge.training.data import Dataset
from reft_edge.training.objectives import Data
from reft_edge.training.preference import PreferenceObjective, Preferences
from reft_edge.training.settings import TrainSettings
from reft_edge.training.turns import IGNORED, Example

SCORES = ("loss", "accuracy")
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """What became of held-out rows, each by itself."""

    losses: tuple[float, ...]
    """Summed over a row, in nats."""
    counts: tuple[int, ...]
    """What each is a sum of: tokens, or 1."""
    right: tuple[bool, ...]
    """Whether the likeliest answer is the row's: word for word, the label, or the chosen one of two."""

    @property
    def loss(self) -> float:
        """The mean, in nats a token, label or pair."""
        return sum(self.losses) / sum(self.counts)

    @property
    def accuracy(self) -> float:
        """Share of the rows that are right."""
        return sum(self.right) / len(self.right)

    def value(self, score: str) -> float:
        return self.accuracy if score == "accuracy" else self.loss

    def key(self, score: str) -> tuple[float, float]:
        """What is greater is better; accuracies that are equal are told apart by the loss."""
        return (self.accuracy if score == "accuracy" else 0.0), -self.loss


@dataclass(frozen=True)
class Difference:
    """How much one adapter does better than another on the same rows; less loss and more accuracy is better."""

    mean: float
    low: float
    high: float
    """The 95 % interval: percentiles of paired bootstrap resamples of the rows."""


def default_score(data: Data) -> str:
    """Labels and preferences are right or wrong; of completions the loss tells more."""
    return "loss" if isinstance(data, Dataset) else "accuracy"


def check_score(score: str) -> None:
    if score not in SCORES:
        raise ReftEdgeError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}")


@torch.no_grad()
def measure(
    model: Any,
    steering: Steering,
    data: Data,
    settings: TrainSettings,
    device: torch.device,
    autocast: bool,
    logits: Logits = joined_logits,
) -> Measured:
    """The held-out rows by the steered model, dropout off. `logits` as in training."""
    rows = data.examples
    with dropout_off(*(interventions for interventions, _ in steering.adapters)):
        found = [
            row
            for start in range(0, len(rows), settings.batch_size)
            for row in _batch(
                model,
                steering,
                data,
                rows[start : start + settings.batch_size],
                settings,
                device,
                autocast,
                logits,
            )
        ]
    losses, counts, right = zip(*found, strict=True)
    return Measured(losses, counts, right)


def _batch(
    model: Any,
    steering: Steering,
    data: Data,
    rows: Sequence[Any],
    settings: TrainSettings,
    device: torch.device,
    autocast: bool,
    logits: Logits,
) -> Iterator[tuple[float, int, bool]]:
    if isinstance(data, LabelledTexts):
        ((interventions, _),) = steering.adapters
        scores = class_scores(model, interventions, [row.tokens for row in rows], device, autocast)
        targets = torch.tensor([row.label for row in rows], device=device)
        losses = nn.functional.cross_entropy(scores, targets, reduction="none")
        yield from zip(losses.tolist(), [1] * len(rows), (scores.argmax(1) == targets).tolist(), strict=True)
    elif isinstance(data, Preferences):
        margins = PreferenceObjective(settings.beta, logits).margins(model, steering, rows, device, autocast)
        losses = -nn.functional.logsigmoid(margins)
        yield from zip(losses.tolist(), [1] * len(rows), (margins > 0).tolist(), strict=True)
    else:
        yield from _completions(model, steering, rows, device, autocast, logits)


def _completions(
    model: Any,
    steering: Steering,
    rows: Sequence[Example],
    device: torch.device,
    autocast: bool,
    logits: Logits,
) -> Iterator[tuple[float, int, bool]]:
    inputs = [(row.prompt, row.completion[:-1]) for row in rows]
    found = logits(model, steering, inputs, device, autocast)
    targets = torch.tensor([token for row in rows for token in row.targets], device=device)
    losses = nn.functional.cross_entropy(found, targets, reduction="none", ignore_index=IGNORED)
    right = (found.argmax(-1) == targets) | (targets == IGNORED)
    lengths = [len(row.completion) for row in rows]
    for row, loss, hits in zip(rows, torch.split(losses, lengths), torch.split(right, lengths), strict=True):
        yield float(loss.sum()), row.count, bool(hits.all())


def difference(one: Measured, other: Measured, score: str, seed: int = 0) -> Difference:
    """How much better `one` is than `other`, which measured the same rows."""
    sign = 1.0 if score == "accuracy" else -1.0
    a, b, counts = _columns(one, score)[0], *_columns(other, score)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(counts), len(counts))
        drawn.append(sign * float((a[rows] - b[rows]).sum() / counts[rows].sum()))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(sign * float((a - b).sum() / counts.sum()), float(low), float(high))


def _columns(measured: Measured, score: str) -> tuple[Any, Any]:
    if score == "accuracy":
        right = np.array(measured.right, dtype=np.float64)
        return right, np.ones_like(right)
    return np.array(measured.losses), np.array(measured.counts, dtype=np.float64)
