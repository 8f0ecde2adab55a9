"""A batch's rows as one row without padding, where the tokens with which all begin, such as a system prompt, stand once.

What a model does with each token by itself it so does with all of them at once. Attention alone takes the rows apart again:
it gives the keys and values of what they share to all of them, and gradients of all rows add up there.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reft_edge.adapter.positions import Span, active
from reft_edge.steering.likelihood import Batch, Ids
from reft_edge.training.frozen_base import quicker_attention

_LEAST = 0.1
"""Share of a batch's tokens that must be saved, since what is shared has an attention of its own."""


class PackedRows:
    """A right-padded batch as one row, in the order of its rows. The first `shared` tokens are run for the first row only."""

    def __init__(self, padded: Batch, shared: int) -> None:
        real = padded.mask.bool()
        run = real.clone()
        run[1:, :shared] = False
        rows, columns = run.nonzero(as_tuple=True)
        ids = padded.ids[run][None]
        self.batch = Batch(
            ids,
            torch.ones_like(ids),
            padded.counts[run][None],
            padded.prompts,
            padded.tokens,
            (rows, columns),
        )
        numbers = (run.flatten().cumsum(0) - 1).view_as(run)
        numbers[1:, :shared] = numbers[:1, :shared]
        self.numbers = numbers.masked_fill(~real, -1)
        """`[rows, columns]` of the padded batch: which token of the one row it is; -1 for padding."""
        self._shared = shared
        self._size = run.shape[0], run.shape[1] - shared
        self._own = (rows * self._size[1] + columns - shared)[shared:]
        self._masks: dict[Any, Tensor] = {}

    @contextmanager
    def attending(self, model: Any, kind: str) -> Iterator[None]:
        """Inside the block, each row attends to what is shared and to itself, by the model's attention of this kind."""
        config, name = model.config, f"rows of {id(self)}"
        kind = quicker_attention(kind, self._shared + self._size[1], self.batch.ids.device)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, None]:
            own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            forward = ALL_ATTENTION_FUNCTIONS.get_interface(kind, own)
            return self._attend(forward, module, (query, key, value), **options), None

        before = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[name] = attend
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS[name]

    def _attend(self, forward: Any, module: nn.Module, states: Sequence[Tensor], **options: Any) -> Tensor:
        """`[1, tokens, heads, size]` for a query, keys and values `[1, heads, tokens, size]`."""
        window = options.get("sliding_window")
        parts = [torch.split(x, [self._shared, len(self._own)], dim=2) for x in states]
        shared = [first for first, _ in parts]
        query, key, value = (self._apart(own) for _, own in parts)
        if self._shared:
            key, value = _behind(shared[1], key), _behind(shared[2], value)
        output: Tensor = forward(
            module, query, key, value, self._mask(self._shared, window, query), **options
        )[0]
        output = output.flatten(0, 1).index_select(0, self._own)[None]
        if not self._shared:
            return output
        first = forward(module, *shared, self._mask(0, window, shared[0]), **options)[0]
        return torch.cat([first, output], dim=1)

    def _apart(self, states: Tensor) -> Tensor:
        """`[rows, heads, columns, size]` of what is each row's own, `[1, heads, tokens, size]`; zeros for padding."""
        own = states[0].transpose(0, 1)
        rows, columns = self._size
        flat = own.new_zeros(rows * columns, *own.shape[1:]).index_copy(0, self._own, own)
        return flat.view(rows, columns, *own.shape[1:]).transpose(1, 2)

    def _mask(self, before: int, window: int | None, query: Tensor) -> Tensor:
        """What is added to scores of queries behind so many keys: padding is at the end, where no token looks."""
        found = self._masks.get((before, window))
        if found is None:
            keys = torch.arange(before + query.shape[2], device=query.device)
            distance = keys[before:, None] - keys
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            least = torch.finfo(query.dtype).min
            found = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            found = self._masks[before, window] = found.masked_fill(hidden, least)[None, None]
        return found


def _behind(first: Tensor, own: Tensor) -> Tensor:
    return torch.cat([first.expand(len(own), -1, -1, -1), own], dim=2)


def can_pack(model: Any) -> bool:
    """Whether tokens of a model meet in its attention only, and that can be another one."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        {"full_attention", "sliding_attention"} >= set(kinds)
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and bool(model.is_backend_compatible())
    )


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
