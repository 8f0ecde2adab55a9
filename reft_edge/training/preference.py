"""Direct preference optimisation: of two answers to a prompt, make the chosen one likelier than the rejected one.

The loss of Rafailov et al. 2023 (arXiv 2305.18290, equation 7), with the frozen base, adapter off, as its reference:

    -log sigmoid(beta * ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected))))

where log p is a whole answer's log-likelihood under the steered model and p0 is the base's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Prompts
from reft_edge.rows.reading import load_rows
from reft_edge.rows.shapes import PAIRS, Recognised, Recogniser, as_pair
from reft_edge.rows.source import RowSource
from reft_edge.steering.hooks import Steering
from reft_edge.steering.interventions import dropout_off
from reft_edge.steering.likelihood import Logits, apart, check_targets, joined_logits
from reft_edge.training.data import notices
from reft_edge.training.turns import Example, view_row


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, as tokens."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Preferences:
    """The rows of one file."""

    examples: list[PreferencePair]
    left_out: int
    """Rows with an answer longer than the limit, which are not trained on."""
    digest: str
    """SHA-256 of the file."""
    notices: tuple[str, ...] = ()
    """What of the rows is not trained, or not as it stands in the file."""
    read: Recognised | None = None
    """What the rows were read as."""


def load_preferences(source: RowSource, prompts: Prompts, prompt_format: str, max_length: int) -> Preferences:
    """Read rows of prompts with a chosen and a rejected answer; `max_length` in tokens of a prompt with its answer.

    Raises ReftEdgeError that names the file and line, or the row, for anything that is not such a row.
    """
    recogniser = Recogniser((PAIRS,))

    def parse(row: Any) -> tuple[PreferencePair, tuple[str, ...]]:
        recogniser(row)
        return view_pair(row, prompts, prompt_format)

    pairs, left_out, told = [], 0, Counter[str]()
    rows, digest = load_rows(source, parse)
    for pair, notes in rows:
        if max(len(side.prompt) + len(side.completion) for side in (pair.chosen, pair.rejected)) > max_length:
            left_out += 1
        else:
            pairs.append(pair)
            told.update(notes)
    if not pairs:
        longer = (
            f": all {left_out} are longer than {max_length} tokens; raise --max-length" if left_out else ""
        )
        raise ReftEdgeError(f"{source} has no pair to train on{longer}")
    return Preferences(
        pairs, left_out, digest, notices(told, prompts, prompt_format), recogniser.recognised(source)
    )


def view_pair(
    row: dict[str, Any], prompts: Prompts, prompt_format: str
) -> tuple[PreferencePair, tuple[str, ...]]:
    """One parsed row as tokens, and what is to be told of it. Raises ReftEdgeError if its columns do not hold two answers to
    one prompt.

    A pair is compared by whole answers: marks of the chat template say nothing here.
    """
    one, other = as_pair(row)
    if one == other:
        raise ReftEdgeError("the chosen and the rejected answer are the same")
    chosen, rejected = (view_row(side, prompts, prompt_format) for side in (one, other))
    return PreferencePair(chosen.example, rejected.example), (*chosen.notes, *rejected.notes)


@dataclass(frozen=True)
class PreferenceObjective:
    """The loss of pairs, by the steered model and, adapter off, the base."""

    beta: float
    logits: Logits = joined_logits

    def count(self, rows: Sequence[PreferencePair]) -> int:
        """Pairs."""
        return len(rows)

    def tokens(self, rows: Sequence[PreferencePair]) -> int:
        """Tokens that the steered model reads."""
        return sum(
            len(side.prompt) + len(side.completion) for row in rows for side in (row.chosen, row.rejected)
        )

    def loss(
        self,
        model: Any,
        steering: Steering,
        rows: Sequence[PreferencePair],
        device: torch.device,
        autocast: bool,
    ) -> Tensor:
        """Summed over pairs, in nats."""
        losses: Tensor = -nn.functional.logsigmoid(self.margins(model, steering, rows, device, autocast))
        return losses.sum()

    def margins(
        self,
        model: Any,
        steering: Steering,
        rows: Sequence[PreferencePair],
        device: torch.device,
        autocast: bool,
    ) -> Tensor:
        """`[pairs]`: beta times how much more than the base the steered model prefers the chosen answer, in nats."""
        sides = [row.chosen for row in rows] + [row.rejected for row in rows]
        with torch.no_grad(), steering.off():
            reference = answer_log_likelihoods(model, steering, sides, device, autocast, self.logits)
        steered = answer_log_likelihoods(model, steering, sides, device, autocast, self.logits)
        chosen, rejected = (steered - reference).view(2, -1)
        margins: Tensor = self.beta * (chosen - rejected)
        return margins


def answer_log_likelihoods(
    model: Any,
    steering: Steering,
    rows: Sequence[Example],
    device: torch.device,
    autocast: bool,
    logits_of: Logits = joined_logits,
) -> Tensor:
    """Each row's whole completion, `[rows]`, in nats; differentiable."""
    inputs = [(row.prompt, row.completion[:-1]) for row in rows]
    logits = apart(logits_of(model, steering, inputs, device, autocast), inputs)
    check_targets(logits[0], [row.completion for row in rows])
    return torch.stack(
        [
            -nn.functional.cross_entropy(
                part, torch.tensor(row.completion, device=part.device), reduction="sum"
            )
            for part, row in zip(logits, rows, strict=True)
        ]
    )


@torch.no_grad()
def preferred(
    model: Any,
    steering: Steering,
    data: Preferences,
    objective: PreferenceObjective,
    batch_size: int,
    device: torch.device,
    autocast: bool,
) -> float:
    """Share of pairs whose chosen answer gained more on the base than the rejected one, dropout off."""
    right = 0
    with dropout_off(*(interventions for interventions, _ in steering.adapters)):
        for start in range(0, len(data.examples), batch_size):
            pairs = data.examples[start : start + batch_size]
            margins = objective.margins(model, steering, pairs, device, autocast)
            right += int((margins > 0).sum())
    return right / len(data.examples)
