"""Choosing the next token."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy. Filters apply in the order top-k, top-p, min-p."""

    temperature: float = 0.0
    """0, or what is 0 in float32, takes the likeliest token; above, logits are divided by it."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before (Keskar et al. 2019, arXiv 1909.05858)."""
    seed: int | None = None
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that the answer has."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Tokens and what is added to their logits, before the penalties."""

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature >= 0 and isfinite(self.temperature), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                self.repetition_penalty > 0 and isfinite(self.repetition_penalty),
                "above 0",
            ),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "frequency_penalty": (isfinite(self.frequency_penalty), "a finite number"),
            "presence_penalty": (isfinite(self.presence_penalty), "a finite number"),
            "logit_bias": (
                all(token >= 0 and isfinite(added) for token, added in self.logit_bias.items()),
                "tokens, 0 or more, each with a finite number",
            ),
        }
        for name, (ok, expected) in limits.items():
            if not ok:
                raise ReftEdgeError(f"{name} is {getattr(self, name)}; expected {expected}")


_LARGEST = float(np.finfo(np.float32).max)


class Sampler:
    """Draws tokens for one request; the same seed draws the same tokens."""

    def __init__(self, sampling: Sampling, seen: Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(seen)
        self._said: Counter[int] = Counter()
        self._changes = sampling.repetition_penalty != 1 or bool(
            sampling.frequency_penalty or sampling.presence_penalty or sampling.logit_bias
        )

    def choose(self, logits: NDArray[np.float32], allowed: NDArray[np.int64] | None = None) -> int:
        """The next token from `logits [vocabulary]`; of the tokens in `allowed`, where it is given. Raises ReftEdgeError if
        the logits are not finite; a token may be impossible (minus infinity), but not all of them."""
        s = self._sampling
        if self._changes:
            logits = self._changed(logits)
        token = int(logits.argmax())
        if not isfinite(logits[token]):
            raise ReftEdgeError(
                "the model's logits are not finite with these adapters and scales; choose smaller scales"
            )
        if allowed is not None:
            token = self._choose_of(logits[allowed], allowed)
        elif np.float32(min(s.temperature, _LARGEST)) > 0:
            token = self._draw(logits)
        self._note(token)
        return token

    def skip(self, token: int) -> None:
        """A token that was not chosen, since no other could come; what follows is drawn as if it had been."""
        if np.float32(min(self._sampling.temperature, _LARGEST)) > 0:
            self._random.random()
        self._note(token)

    def _note(self, token: int) -> None:
        if self._changes:
            self._seen.add(token)
            self._said[token] += 1

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """With the bias and the penalties."""
        s = self._sampling
        if s.logit_bias:
            tokens = np.fromiter(s.logit_bias, np.int64)
            if tokens.max() >= len(logits):
                raise ReftEdgeError(
                    f"logit_bias names token {tokens.max()}; this model's tokens are from 0 to {len(logits) - 1}"
                )
            logits = _shift(logits, tokens, np.fromiter(s.logit_bias.values(), np.float64))
        if s.repetition_penalty != 1:
            logits = _penalise(logits, np.fromiter(self._seen, np.int64), s.repetition_penalty)
        if self._said and (s.frequency_penalty or s.presence_penalty):
            counts = np.fromiter(self._said.values(), np.float64)
            tokens = np.fromiter(self._said, np.int64)
            logits = _shift(logits, tokens, -(s.presence_penalty + s.frequency_penalty * counts))
        return logits

    def _choose_of(self, logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> int:
        """One of `tokens`, which have these logits."""
        place = int(logits.argmax())
        if not isfinite(logits[place]):
            raise ReftEdgeError("the model gives no chance to any token that the answer's form allows here")
        if np.float32(min(self._sampling.temperature, _LARGEST)) > 0:
            place = self._draw(logits)
        return int(tokens[place])

    def _draw(self, logits: NDArray[np.float32]) -> int:
        tokens, p = distribution(logits, self._sampling)
        return int(tokens[_place(p, self._random.random())])


def distribution(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The tokens that can be drawn from `logits [vocabulary]` at a temperature above 0, ascending, and their probabilities,
    which sum to 1."""
    tokens = np.arange(len(logits), dtype=np.int32)
    if 0 < sampling.top_k < len(logits):
        tokens = np.sort(np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]).astype(np.int32)
        logits = logits[tokens]
    with np.errstate(over="ignore", under="ignore"):
        p = np.exp((logits - logits.max()) / np.float32(min(sampling.temperature, _LARGEST)))
    total = p.sum(dtype=np.float64)
    if sampling.top_p < 1:
        # Tokens below this share have less than 1 - top_p in all, so that the likelier ones reach top_p without them.
        near = np.flatnonzero(p > 0.999 * (1 - sampling.top_p) / len(p) * total)
        order = near[np.argsort(-p[near], kind="stable")]
        before = np.cumsum(p[order], dtype=np.float64) - p[order]
        kept = np.sort(order[before < sampling.top_p * total])
        tokens, p = tokens[kept], p[kept]
    if sampling.min_p > 0:
        likely = p >= sampling.min_p * p.max()
        tokens, p = tokens[likely], p[likely]
    p /= np.float32(p.sum(dtype=np.float64))
    return tokens, p


def _place(p: NDArray[np.float32], share: float) -> int:
    """The first place up to which the sum of `p` is above `share` of the whole. Sums of runs are looked at first, since a
    running sum over a whole vocabulary takes longer than all else of a draw."""
    starts = np.arange(0, len(p), 256)
    reached = np.cumsum(np.add.reduceat(p, starts, dtype=np.float64))
    wanted = share * reached[-1]
    run = min(int(np.searchsorted(reached, wanted, side="right")), len(starts) - 1)
    before = reached[run - 1] if run else 0.0
    inside = before + np.cumsum(p[starts[run] : starts[run] + 256], dtype=np.float64)
    return int(starts[run]) + min(int(np.searchsorted(inside, wanted, side="right")), len(inside) - 1)


def _penalise(logits: NDArray[np.float32], seen: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    logits = logits.copy()
    chosen = logits[seen].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        changed = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    numbers = np.isfinite(chosen)
    logits[seen[numbers]] = changed[numbers].clip(-_LARGEST, _LARGEST)
    return logits


def _shift(
    logits: NDArray[np.float32], tokens: NDArray[np.int64], added: NDArray[np.float64]
) -> NDArray[np.float32]:
    logits = logits.copy()
    chosen = logits[tokens].astype(np.float64)
    numbers = np.isfinite(chosen)
    logits[tokens[numbers]] = (chosen + added)[numbers].clip(-_LARGEST, _LARGEST)
    return logits
