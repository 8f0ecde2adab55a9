"""Text from files, models and servers, made safe to print: a terminal obeys control characters."""

import unicodedata

_TURNS_ORDER = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the direction of the text after them, so that it reads as something it is not."""
_UNSAFE = ("Cc", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """The text with every control character but newline and tab written as an escape, such as `\\x1b`.

    Also escaped are direction marks, line and paragraph separators and lone surrogates. It works on each character alone,
    so a stream can be cleaned piece by piece.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(mark)[1:-1] if _unsafe(mark) else mark for mark in text)


def _unsafe(mark: str) -> bool:
    return mark not in "\n\t" and (mark in _TURNS_ORDER or unicodedata.category(mark) in _UNSAFE)
