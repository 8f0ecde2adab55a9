"""Classification heads on an encoder's hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft_edge.model.encoders import has_token_types
from reft_edge.model.texts import Tokens
from reft_edge.steering.interventions import Interventions
from reft_edge.steering.likelihood import check_tokens, readable


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
