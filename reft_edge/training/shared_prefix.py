"""The tokens with which all rows of a batch begin, such as a system prompt, run once for all of them.

Their keys and values are given to the rows' other tokens, and gradients of all rows add up in them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from reft_edge.adapter.positions import Span, active
from reft_edge.steering.likelihood import Batch, Ids

_LEAST = 0.1
"""Share of a batch's tokens that must be saved, since two passes take longer than one of as many tokens."""
_LENGTH_MATTERS = ("longrope", "dynamic")
"""Kinds of rotary embeddings that depend on how many tokens a pass has."""


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer's prefix: the first pass leaves them, further ones put their own behind them."""

    def __init__(self, prefix: "Prefix") -> None:
        super().__init__()
        self.prefix = prefix

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.prefix.known:
            self.keys, self.values = keys, values
            return keys, values
        return _behind(self.keys, keys), _behind(self.values, values)

    def get_seq_length(self, *args: Any) -> int:
        return self.prefix.length if self.prefix.known else 0

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        count = query if isinstance(query, int) else query.shape[0]
        return self.get_seq_length() + count, 0


def _behind(first: Tensor, own: Tensor) -> Tensor:
    return torch.cat([first.expand(len(own), -1, -1, -1), own], dim=-2)


class Prefix(Cache):  # type: ignore[misc]
    """Keys and values of `length` tokens in every layer."""

    def __init__(self, layers: int, length: int) -> None:
        self.length, self.known = length, False
        super().__init__(layers=[_Layer(self) for _ in range(layers)])


def can_share(model: Any) -> bool:
    """Whether all that a model knows of earlier tokens are their keys and values."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    return kind not in _LENGTH_MATTERS and {"full_attention", "sliding_attention"} >= set(kinds)


def shared_length(rows: Sequence[tuple[Ids, Ids]], spans: Sequence[Span]) -> int:
    """Tokens with which all rows begin, edited alike in each, and before the first label of any; 0 where few are saved."""
    most = min(len(prompt) for prompt, _ in rows) - 1
    first, others = rows[0][0], [prompt for prompt, _ in rows[1:]]
    length = next((t for t in range(most) if any(prompt[t] != first[t] for prompt in others)), max(most, 0))
    t = np.arange(length)
    for span in spans:
        unlike_prompts = {(len(prompt), span.start(prompt)) for prompt, _ in rows}
        gates = np.stack([np.asarray(active(span, t, n, start), dtype=bool) for n, start in unlike_prompts])
        unlike = (gates != gates[:1]).any(axis=0).nonzero()[0]
        length = min([length, *unlike.tolist()])
        t = np.arange(length)
    whole = len(rows) * max(len(prompt) + len(behind) for prompt, behind in rows)
    return length if (len(rows) - 1) * length >= _LEAST * whole else 0


def split(batch: Batch, length: int) -> tuple[Batch, Batch]:
    """One row of the first `length` tokens, without labels, and all rows' other tokens."""
    first = Batch(
        batch.ids[:1, :length],
        batch.mask[:1, :length],
        torch.zeros_like(batch.counts[:1, :length]),
        batch.prompts[:1],
        batch.tokens[:1],
    )
    rest = batch.ids[:, length:], batch.mask, batch.counts[:, length:], batch.prompts, batch.tokens
    return first, Batch(*rest)
