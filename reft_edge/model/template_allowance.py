"""What a rendering of a chat template may cost: passes of loops, calls, and the characters and elements that come of them."""

import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

from reft_edge.errors import ReftEdgeError

ALLOWED = 2_000_000
"""Passes, characters and elements that any rendering may cost."""
ALLOWED_A_CHARACTER = 64
"""The same, for every character of its conversation."""
SECONDS = 2.0
"""Of this thread's processor time that a rendering may take."""
AN_ELEMENT = 4
"""What an element of a list costs, in characters."""


class Allowance:
    """What a rendering may still cost."""

    def __init__(self, size: int) -> None:
        self.left = ALLOWED + ALLOWED_A_CHARACTER * size
        self._until = time.thread_time() + SECONDS
        self._next_look = self.left

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < self._next_look:
            self._next_look = self.left - 200
            if self.left < 0 or time.thread_time() > self._until:
                self.left = -1
                raise ReftEdgeError(
                    "the model's chat template does not end, or writes far more than its conversation; "
                    "use another template"
                )


allowance: ContextVar[Allowance] = ContextVar("allowance")


def spend(amount: int) -> None:
    allowance.get().spend(amount)


def measure(value: Any, most: int | None, characters: bool = True) -> int:
    """Characters and elements of a value, all that it holds included; stops once they are more than `most`."""
    total, todo = 0, [value]
    while todo:
        part = todo.pop()
        total += AN_ELEMENT
        if isinstance(part, str):
            total += len(part) if characters else 0
        elif isinstance(part, Mapping):
            todo.extend(part.keys())
            todo.extend(part.values())
        elif isinstance(part, Namespace):
            todo.append(part._Namespace__attrs)  # type: ignore[attr-defined]
        elif isinstance(part, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            total += len(part)
            if most is not None and total > most:
                break
            todo.extend(part)
        if most is not None and total > most:
            break
    return total


def spend_text(*values: Any) -> None:
    """Before values become text."""
    given = allowance.get()
    for value in values:
        given.spend(len(value) if isinstance(value, str) else measure(value, given.left))


def made(value: Any) -> Any:
    """What an expression made, paid for."""
    given = allowance.get()
    if isinstance(value, str):
        given.spend(1 + len(value))
    elif isinstance(value, list | tuple | dict | set | frozenset):
        given.spend(measure(value, given.left, characters=False))
    else:
        given.spend(1)
    return value


def metered(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield made(item)


def number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0
