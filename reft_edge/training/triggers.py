"""Triggers in training: from their texts to token ids, and whether the rows' prompts have these."""

from collections.abc import Sequence

from reft_edge.adapter.positions import parse_positions, triggers_of
from reft_edge.adapter.triggers import NEVER, Trigger, with_tokens
from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Prompts, decode
from reft_edge.training.turns import Example


def tokenised(positions: str, prompts: Prompts) -> str:
    """Positions with the token ids of their triggers, by this model's tokenizer. Raises ReftEdgeError for a trigger that is
    none."""
    return with_tokens(
        positions, prompts.encode_plain, lambda ids: decode(prompts.tokenizer, ids, special_tokens=True)
    )


def check_triggers(rows: Sequence[Example], positions: str, tied: bool, prompts: Prompts) -> None:
    """Raise ReftEdgeError for a trigger whose tokens no prompt has, saying what tokens its text has there."""
    for trigger in triggers_of(parse_positions(positions, tied)):
        if all(trigger.start(row.prompt) == NEVER for row in rows):
            raise ReftEdgeError(
                f"nothing can be learnt at {trigger}: none of the {len(rows):,} prompts has these tokens one after another"
                + _as_text(rows, trigger, prompts)
            )


def _as_text(rows: Sequence[Example], trigger: Trigger, prompts: Prompts) -> str:
    """Where prompts have the text as other tokens: how many do, and which tokens these are in the first one."""
    texts = [decode(prompts.tokenizer, row.prompt, special_tokens=True) for row in rows]
    found = [number for number, text in enumerate(texts) if trigger.text and trigger.text in text]
    if not found:
        return "; write the text into the prompts, or choose one that they have"
    ids, text = rows[found[0]].prompt, texts[found[0]]
    first = text.rindex(trigger.text)
    ends = [
        len(decode(prompts.tokenizer, ids[: count + 1], special_tokens=True)) for count in range(len(ids))
    ]
    covering = [
        token
        for token, begin, end in zip(ids, [0, *ends], ends, strict=False)
        if end > first and begin < first + len(trigger.text)
    ]
    return (
        f", and {len(found):,} have the text: there the tokenizer joins it with what stands beside it, and makes it "
        f"{covering}. Choose a text that is always the same tokens, such as a special token or one with the spaces and line "
        f"breaks around it, or give the ids, as in from:[{','.join(map(str, covering))}]"
    )
