"""What a PyTorch language model thinks of completions: only the logits that predict them are computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_edge.errors import ReftEdgeError
from reft_edge.steering.hooks import Steering

Ids = Sequence[int]


Logits = Callable[[Any, Steering, Sequence[tuple[Ids, Ids]], torch.device, bool], Tensor]
"""`joined_logits`, or what gives the same in another way."""


def completion_logits(
    model: Any,
    steering: Steering,
    rows: Sequence[tuple[Ids, Ids]],
    device: torch.device,
    autocast: bool = False,
) -> list[Tensor]:
    """`joined_logits`, apart by row: `[1 + tokens, vocabulary]` each."""
    return apart(joined_logits(model, steering, rows, device, autocast), rows)


def apart(logits: Tensor, rows: Sequence[tuple[Ids, Ids]]) -> list[Tensor]:
    """Joined logits apart by row."""
    return list(torch.split(logits, [1 + len(behind) for _, behind in rows]))


def joined_logits(
    model: Any,
    steering: Steering,
    rows: Sequence[tuple[Ids, Ids]],
    device: torch.device,
    autocast: bool = False,
) -> Tensor:
    """Float32 logits after every row's prompt and after every token behind it, `[all of them, vocabulary]`.

    `rows`: prompt, and the tokens behind it (a completion without its last token). They run as one right-padded batch.
    """
    batch = padded(model, rows, device)
    with readable(model, batch.ids.shape[1]):
        return batch_logits(model, steering, batch, autocast)


@dataclass(frozen=True)
class Batch:
    """Rows as one right-padded batch; or, where `places` tells of each token where it is from, all of them as one row."""

    ids: Tensor
    """`[rows, columns]`"""
    mask: Tensor
    """`[rows, columns]`, 1 for tokens."""
    counts: Tensor
    """`[rows, columns]`, bool: where logits are wanted."""
    prompts: Tensor
    """Tokens of each prompt, one number for each of the original rows."""
    tokens: tuple[Ids, ...]
    """Each prompt."""
    places: tuple[Tensor, Tensor] | None = None
    """`[columns]` each: a token's original row, and its position there."""


def padded(model: Any, rows: Sequence[tuple[Ids, Ids]], device: torch.device) -> Batch:
    """Rows as a batch that wants logits from each prompt's last token on. Raises ReftEdgeError for unknown tokens."""
    check_tokens(model, [[*prompt, *behind] for prompt, behind in rows])
    length = max(len(prompt) + len(behind) for prompt, behind in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long).unbind()
    counts = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, behind) in enumerate(rows):
        tokens = [*prompt, *behind]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        counts[i, len(prompt) - 1 : len(tokens)] = True
    prompts = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
    whole = tuple(prompt for prompt, _ in rows)
    return Batch(ids.to(device), mask.to(device), counts.to(device), prompts, whole)


def batch_logits(model: Any, steering: Steering, batch: Batch, autocast: bool) -> Tensor:
    """Float32 logits where the batch wants them, `[all of them, vocabulary]`."""
    positions = {} if batch.places is None else {"position_ids": batch.places[1][None]}
    with (
        steering.prompts(batch.prompts, batch.tokens, batch.places),
        only_logits_of(model, batch.counts),
        torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=autocast),
    ):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **positions).logits
    joined: Tensor = logits.squeeze(0).float()
    return joined


@contextmanager
def only_logits_of(model: Any, tokens: Tensor) -> Iterator[None]:
    """Inside the block, the language-model head sees only these tokens (bool, [batch, sequence]), as one row."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][tokens][None],))
    try:
        yield
    finally:
        handle.remove()


def check_tokens(model: Any, rows: Sequence[Ids]) -> None:
    """Raise ReftEdgeError for token ids that the model has no embedding for."""
    _check_below(int(model.get_input_embeddings().num_embeddings), rows, "embeddings")


def check_targets(logits: Tensor, rows: Sequence[Ids]) -> None:
    """Raise ReftEdgeError for token ids that `logits [..., vocabulary]` say nothing of."""
    _check_below(logits.shape[-1], rows, "logits")


def _check_below(count: int, rows: Sequence[Ids], of: str) -> None:
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= count:
        raise ReftEdgeError(
            f"a row has the token {largest}; the model has {count} {of}, 0 to {count - 1}: its tokenizer has tokens that "
            "were never added to it (resize_token_embeddings does that), or is another model's"
        )


@contextmanager
def readable(model: Any, length: int) -> Iterator[None]:
    """Raise ReftEdgeError where a row of `length` tokens, all with embeddings, is longer than a table of the model."""
    try:
        yield
    except IndexError as error:
        limit = getattr(model.config, "max_position_embeddings", None)
        raise ReftEdgeError(
            f"the model cannot read {length} tokens; it has positions for {limit}: give shorter rows (--max-length)"
        ) from error
