"""Log-probabilities of generated tokens."""

from dataclasses import dataclass

import numpy as np

from reft_edge.runtime.session import Logits

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have: the log-probability of what cannot come."""


@dataclass(frozen=True)
class TokenScore:
    """A generated token's natural log-probability, before sampling changed it, and the likeliest tokens' beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score(logits: Logits, token: int, count: int) -> TokenScore:
    """Natural log-probabilities of a token and of the `count` likeliest, from `logits [vocabulary]`."""
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    logprobs = np.maximum(logprobs, LEAST_LOGPROB)
    least = np.partition(logprobs, -count)[-count] if 0 < count <= len(logprobs) else -np.inf
    likely = np.flatnonzero(logprobs >= least)
    top = likely[np.argsort(-logprobs[likely], kind="stable")][:count]
    return TokenScore(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))
