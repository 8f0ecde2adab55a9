"""The parts of an answer: text, thoughts and calls of tools."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """What the answer says beside its calls."""

    text: str


@dataclass(frozen=True)
class Thought:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call of the tool of this name; its arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the last call's arguments, which are JSON text."""

    text: str


Part = Text | Thought | CallBegins | Arguments
Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the arguments of each tool, by the tool's name."""


def joined(parts: Iterator[Part]) -> list[Part]:
    """Parts with those of one kind, next to each other, as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + part.text)
        elif isinstance(part, Arguments) and isinstance(last, Arguments):
            found[-1] = Arguments(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            found[-1] = Thought(last.text + part.text)
        else:
            found.append(part)
    return found
