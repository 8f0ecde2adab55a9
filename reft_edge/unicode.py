"""Which texts are text: JSON's escapes and the bytes of a terminal can leave half a character, which no tokenizer takes."""

from collections.abc import Mapping
from typing import Any

from reft_edge.errors import ReftEdgeError


def check_text(text: str) -> None:
    """Raise ReftEdgeError if a text holds half a character, as cut JSON escapes and invalid UTF-8 leave it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ReftEdgeError(
            f"character {error.start + 1} of the text is half of one (U+{ord(text[error.start]):04X}): "
            "an emoji that was cut in two, or bytes that are not UTF-8"
        ) from error


def check_texts(value: Any, where: str) -> None:
    """`check_text` of every text that a value holds, naming its place."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, str):
            try:
                check_text(part)
            except ReftEdgeError as error:
                raise ReftEdgeError(f"{where}: {error}") from error
        elif isinstance(part, Mapping):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            todo += part
