"""Prompts of requests as tokens, with bounds."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from reft_edge.model.prompts import encode_batch
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.serving.errors import ApiError, too_long

_FIRST_LOOK = 8
"""Characters for each token of the context; a text that is longer is looked at from its beginning."""
_CUT = 64
"""Tokens that a text's beginning may have more than the whole, where it was cut."""


def encoded(
    prompts: Sequence[str | list[int]], model: SteeredModel, special: bool, what: str
) -> list[list[int]]:
    """Each prompt's tokens. Raises ApiError for one that is empty, too long, or not of this model's tokens."""
    context = model.manifest.context_length
    tokenizer = model.prompts.tokenizer
    limit = model.prompts.token_limit
    found = []
    for prompt in prompts:
        ids = tokens_of(tokenizer, prompt, special, context, what) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, f"{what}: it is empty; give at least one token", param=what)
        if len(ids) >= context:
            raise too_long(context, len(ids), what)
        if not all(0 <= token < limit for token in ids):
            raise ApiError(400, f"{what}: a token id is not from 0 to {limit - 1}", param=what)
        found.append(ids)
    return found


def tokens_of(tokenizer: Tokenizer, text: str, special: bool, context: int, what: str) -> list[int]:
    """As `encode` gives them. Raises ApiError as soon as a beginning of the text is too long."""

    def tokens(part: str) -> list[int]:
        return list(encode_batch(tokenizer, [part], special)[0].ids)

    size = _FIRST_LOOK * context
    while size < len(text):
        if (count := len(tokens(text[:size]))) >= context + _CUT:
            raise too_long(context, f"at least {count - _CUT}", what)
        size *= 4
    return tokens(text)
