"""A repository of adapters, whatever it is: what all kinds of it can do, and which kind an address means."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.release import Goods, Release

KINDS = "a folder, https://HOST/PATH/, hf://OWNER/REPO or oci://HOST/REPO[:TAG]"


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


def open_repository(address: str, plain_http: bool = False) -> Repository:
    """The repository at an address: KINDS. Nothing is read or fetched yet.

    `plain_http` allows unencrypted connections to other machines. Raises ReftEdgeError for an address of no known kind.
    """
    scheme, separator, rest = address.partition("://")
    if "\0" in address or (separator and any("\ud800" <= letter <= "\udfff" for letter in address)):
        raise ReftEdgeError(f"{address} holds characters that no address has; give {KINDS}")
    if not separator:
        from reft_edge.shipping.folder import FolderRepository

        return FolderRepository(Path(address))
    if scheme in ("http", "https"):
        from reft_edge.shipping.http import HttpRepository

        return HttpRepository(address, plain_http)
    if scheme == "hf":
        from reft_edge.shipping.hub import HubRepository

        return HubRepository(rest, plain_http)
    if scheme == "oci":
        from reft_edge.shipping.oci import OciRepository

        return OciRepository(rest, plain_http)
    raise ReftEdgeError(f"{address} is not a repository's address; give {KINDS}")
