"""What counts as a finding.

A reader may refuse its input with ReftEdgeError, in words that a terminal can show, and do nothing else: no other exception,
no hang, no more than 64 MB of memory beyond the input's size.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reft_edge.errors import ReftEdgeError

MEMORY = 64 << 20
SECONDS = 10


@dataclass(frozen=True)
class Target:
    """A reader and inputs to begin with."""

    read: Callable[[bytes], None]
    seeds: list[bytes]
    accepted: int
    """How many of the seeds are well-formed; the first ones."""


def attempt(read: Callable[[bytes], None], content: bytes) -> bool:
    """Whether the reader accepts the bytes. Raises AssertionError, or what the reader lets through, for a finding."""
    resident, peak = _resident(), _peak()
    accepted = True
    try:
        read(content)
    except ReftEdgeError as error:
        accepted = False
        shown = str(error)
        assert all(part.isprintable() for part in shown.split("\n")), f"a terminal cannot show {shown!r}"
        assert len(shown) < 5000, f"an error of {len(shown)} characters"
    grown = _peak()
    assert grown <= max(peak, resident + MEMORY + len(content)), f"took {grown - resident:,} bytes of memory"
    return accepted


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
