"""From a row's logits to the next piece of its answer."""

from collections.abc import Sequence

from reft_edge.runtime.logprobs import score
from reft_edge.runtime.request import Piece, Row
from reft_edge.runtime.session import Logits

_MOST_FORCED = 64
"""Tokens that a constraint gives at a time."""


def next_piece(row: Row, logits: Logits, eos: Sequence[int]) -> Piece:
    """Choose the token behind `logits [vocabulary]`, add it and those that must follow it to the row, and tell what the answer
    gained. `eos`: tokens that end it."""
    allowed = None if row.progress is None else row.progress.allowed(len(logits))
    token = row.sampler.choose(logits, allowed)
    if token in eos:
        return Piece(row.text.flush(), finish_reason="stop")
    scored = () if row.request.logprobs is None else (score(logits, token, row.request.logprobs),)
    row.tokens.append(token)
    text = row.text.push(token)
    if row.text.stopped:
        return Piece(text, scored, "stop")
    left = row.limit - len(row.tokens)
    if row.progress is not None:
        forced, over = row.progress.take(token, 0 if scored else min(left, _MOST_FORCED))
        row.together = 1 + len(forced)
        for known in forced:
            row.sampler.skip(known)
            row.tokens.append(known)
            text += row.text.push(known)
            if row.text.stopped:
                return Piece(text, scored, "stop")
        if over:
            return Piece(text + row.text.flush(), scored, "stop")
    if len(row.tokens) == row.limit:
        return Piece(text + row.text.flush(), scored, "stop" if row.text.stopped else "length")
    return Piece(text, scored)
