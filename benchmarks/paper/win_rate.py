"""How often a model's answers beat the base model's, with and without the effect of their length.

Of two answers to a question the one that is more like the reference wins (likeness.py); equal ones share the win. The length
control is AlpacaEval 2's (Dubois et al., "Length-Controlled AlpacaEval", arXiv 2404.04475) without its term for an
instruction's difficulty, which needs many models to fit. A logistic regression is fitted for each method,

    P(win) = sigmoid(a + b x),    x = tanh(d / std(d)),

where d is the answer's length in characters less the base answer's. The controlled win rate is the prediction for two
answers of one length: sigmoid(a).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Values = np.ndarray[Any, np.dtype[np.float64]]
RIDGE = 0.1
"""Times half a² + b², so that a and b stay finite where all answers win, or the longer one always does."""
STEPS = 40
LARGEST_STEP = 2.0


@dataclass(frozen=True)
class Compared:
    """Answers of one training against the base model's, `[questions]` each."""

    wins: Values
    """1, 0, or a half for equal ones."""
    lengths: Values
    """x of the formula above, -1 to 1."""


def compared(one: dict[str, Any], base: dict[str, Any]) -> Compared:
    """Of two scores of a cell: `likeness` and `lengths` of each answer."""
    better = np.sign(np.subtract(one["likeness"], base["likeness"]))
    longer = np.subtract(one["lengths"], base["lengths"]).astype(np.float64)
    spread = longer.std()
    return Compared((better + 1) / 2, np.tanh(longer / spread) if spread else np.zeros_like(longer))


def sigmoid(values: Values) -> Values:
    return 1 / (1 + np.exp(-values))


def controlled(found: Compared, weights: Values) -> Values:
    """The length-controlled win rate, `[draws]`, of questions that count `weights` times each, `[draws, questions]`."""
    x, a, b = found.lengths, np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(STEPS):  # Newton's method, for all draws at once
        rate = sigmoid(a[:, None] + b[:, None] * x)
        miss, curve = weights * (found.wins - rate), weights * rate * (1 - rate)
        down_a, down_b = miss.sum(1) - RIDGE * a, miss @ x - RIDGE * b
        aa, ab, bb = curve.sum(1) + RIDGE, curve @ x, curve @ (x * x) + RIDGE
        area = aa * bb - ab * ab
        a += np.clip((bb * down_a - ab * down_b) / area, -LARGEST_STEP, LARGEST_STEP)
        b += np.clip((aa * down_b - ab * down_a) / area, -LARGEST_STEP, LARGEST_STEP)
    return sigmoid(a)


def plain(found: Compared, weights: Values) -> Values:
    """The share of wins, as `controlled` but with nothing taken out."""
    return weights @ found.wins / weights.sum(1)
