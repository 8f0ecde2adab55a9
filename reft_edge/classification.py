"""Training a classifier: labelled texts, and the loss of a head on an encoder's pooled hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_edge.encoders import TextTokens, Tokens, has_token_types, parse_row
from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.interventions import Interventions
from reft_edge.jsonl import read_rows
from reft_edge.likelihood import check_tokens, readable


@dataclass(frozen=True)
class LabelledText:
    """One row as tokens, and the index of its label."""

    tokens: Tokens
    label: int


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of one file."""

    examples: list[LabelledText]
    labels: tuple[str, ...]
    digest: str
    """SHA-256 of the file."""


def load_labelled(path: Path, tokens: TextTokens, labels: Sequence[str] | None = None) -> LabelledTexts:
    """Read JSONL rows `{"text", "label"}`, with `text2` for pairs; a label is text or a whole number.

    `labels` are the ones allowed, by default all that the file holds, in alphabetical order. Raises ReftEdgeError
    that names the file and line for anything that is not such a row.
    """

    def parse(row: Any) -> tuple[Tokens, str]:
        text, label = parse_row(row)
        if labels is not None and label not in labels:
            raise ReftEdgeError(f"no training row has its label {label!r}")
        return tokens(text), label

    rows = [row for _, row in read_rows(path, parse)]
    found = tuple(labels) if labels is not None else tuple(sorted({label for _, label in rows}))
    if not rows or len(found) < 2:
        raise ReftEdgeError(
            f"{path} has {len(rows)} rows and the labels {list(found)}; a classifier needs two labels or more"
        )
    index = {label: i for i, label in enumerate(found)}
    return LabelledTexts([LabelledText(row, index[label]) for row, label in rows], found, sha256_of(path))


def class_scores(
    encoder: Any,
    interventions: Interventions,
    rows: Sequence[Tokens],
    device: torch.device,
    autocast: bool = False,
) -> Tensor:
    """The head's logits, `[rows, labels]` in float32, from one batch; hooks edit the encoder."""
    pooled = pooled_states(encoder, rows, interventions.config.pooling, device, autocast)
    return nn.functional.linear(pooled, interventions.head["weight"], interventions.head["bias"])


def pooled_states(
    encoder: Any, rows: Sequence[Tokens], pooling: str, device: torch.device, autocast: bool = False
) -> Tensor:
    """The vector that a head reads, `[rows, d]` in float32, from one right-padded batch."""
    check_tokens(encoder, [row.ids for row in rows])
    length = max(len(row.ids) for row in rows)
    ids, types, mask = torch.zeros(3, len(rows), length, dtype=torch.long).unbind()
    for i, row in enumerate(rows):
        count = len(row.ids)
        ids[i, :count], types[i, :count] = torch.tensor(row.ids), torch.tensor(row.types)
        mask[i, :count] = 1
    mask = mask.to(device)
    second = {"token_type_ids": types.to(device)} if has_token_types(encoder) else {}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast), readable(encoder, length):
        hidden = encoder(input_ids=ids.to(device), attention_mask=mask, **second).last_hidden_state
    return pool(hidden.float(), mask, pooling)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector a row, `[rows, d]`, of hidden states `[rows, tokens, d]`: the first token's, or the tokens' mean."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
