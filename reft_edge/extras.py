"""Packages that only some of the work needs, and that may not be installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from reft_edge.errors import ReftEdgeError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing package of an extra into the command that installs it, as a ReftEdgeError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ReftEdgeError(
            f"this needs the package {error.name!r}; install it with: pip install 'reft-edge[{name}]'"
        ) from error
