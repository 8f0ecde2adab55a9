"""Rows of text for encoders, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import encode, encode_batch, token_limit

Text = str | tuple[str, str]
"""A text, or a pair of texts."""


@dataclass(frozen=True)
class Tokens:
    """One text, or pair of texts, as the encoder reads it, special tokens included."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """0 for the first text's tokens, 1 for the second's."""


@dataclass(frozen=True)
class TextTokens:
    """From text to tokens, cut to what the encoder can read."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, limit: int) -> "TextTokens":
        """Cut to `limit` tokens, special ones included; of a pair, the longer text is cut first."""
        tokenizer.enable_truncation(limit)
        tokenizer.no_padding()
        return cls(tokenizer)

    @cached_property
    def token_limit(self) -> int:
        """One more than the largest token id."""
        return token_limit(self.tokenizer)

    def batch(self, texts: Sequence[Text]) -> list[Tokens]:
        """Several texts at once; other threads run meanwhile. Raises ReftEdgeError if nothing is left to read of
        one, or one is not valid Unicode."""
        found = encode_batch(self.tokenizer, texts)
        if not all(encoded.ids for encoded in found):
            raise ReftEdgeError("the text is empty; an encoder needs at least one token")
        return [Tokens(tuple(encoded.ids), tuple(encoded.type_ids)) for encoded in found]

    def __call__(self, text: Text) -> Tokens:
        """Raises ReftEdgeError if nothing is left to read."""
        first, second = (text, None) if isinstance(text, str) else text
        encoded = encode(self.tokenizer, first, second)
        if not encoded.ids:
            raise ReftEdgeError("the text is empty; an encoder needs at least one token")
        return Tokens(tuple(encoded.ids), tuple(encoded.type_ids))


def parse_row(row: Any) -> tuple[Text, str]:
    """The text, or pair of texts, and label of a parsed row. Raises ReftEdgeError if it is not of the known form."""
    if not isinstance(row, dict):
        raise ReftEdgeError('expected an object like {"text": ..., "label": ...}')
    text, second, label = row.get("text"), row.get("text2"), row.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(text, str) or not isinstance(label, str) or not isinstance(second, str | None):
        raise ReftEdgeError(
            'expected text under "text" (and under "text2" for pairs) and a text or whole number under '
            f'"label"; found the fields {sorted(row)}'
        )
    return (text if second is None else (text, second)), label
