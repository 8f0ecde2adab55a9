"""A repository of adapters, whatever it is: what all kinds of it can do, and which kind an address means."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.release import Goods, Release


class BrokenOffError(ReftEdgeError):
    """A connection that failed or a server that could not answer just then: the same again may succeed."""


class Repository(Protocol):
    """Where releases are pushed to and pulled from. Everything it says is a stranger's: it is checked by the reader.

    All methods raise ReftEdgeError for what cannot be reached, read or written.
    """

    @property
    def address(self) -> str:
        """What the user calls it."""
        ...

    def releases(self, version: int | None = None) -> list[Release]:
        """What is on offer; with `version`, at least every release of that number."""
        ...

    def open(self, release: Release, start: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """A release's file from byte `start` on, in pieces, and the byte that they really start from: `start` or 0."""
        ...

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        """Add them, each as the next version of its name, unless its newest version has the same content."""
        ...
