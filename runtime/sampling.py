"""Choosing the next token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy. Filters apply in the order top-k, top-p, min-p."""

    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before (Keskar et al. 2019, arXiv 1909.05858)."""
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (ok, expected) in limits.items():
            if not ok:
                raise ReftEdgeError(f"{name} is {getattr(self, name)}; expected {expected}")


class Sampler:
    """Draws tokens for one request; the same seed draws the same tokens."""

    def __init__(self, sampling: Sampling, seen: Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(seen)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token from `logits [vocabulary]`."""
        s = self._sampling
        if s.repetition_penalty != 1:
            logits = _penalise(logits, np.fromiter(self._seen, np.int64), s.repetition_penalty)
        token = int(logits.argmax()) if s.temperature == 0 else self._draw(logits)
        self._seen.add(token)
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        p = probabilities(logits, self._sampling)
        return int(self._random.choice(len(p), p=p))


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """What tokens are drawn from at a temperature above 0: `[vocabulary]`, sums to 1."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if 0 < sampling.top_k < len(p):
        p[np.argpartition(p, -sampling.top_k)[: -sampling.top_k]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        p[p < sampling.min_p * p.max()] = 0
    kept: NDArray[np.float64] = p / p.sum()
    return kept


def _penalise(logits: NDArray[np.float32], seen: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    logits = logits.copy()
    chosen = logits[seen]
    logits[seen] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits
