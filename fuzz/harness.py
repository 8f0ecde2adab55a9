"""What counts as a finding.

A reader may refuse its input with ReftEdgeError, in words that a terminal can show, and do nothing else: no other exception,
no hang, no more than 64 MB of memory beyond the input's size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.terminal import printable

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
    before = _start_of_peak()
    accepted = True
    try:
        read(content)
    except ReftEdgeError as error:
        accepted = False
        shown = str(error)
        assert printable(shown) == shown, f"a terminal would obey {shown!r}"
        assert len(shown) < 5000, f"an error of {len(shown)} characters"
    grown = _peak() - before
    assert grown <= MEMORY + len(content), f"took {grown:,} bytes of memory"
    return accepted


def _start_of_peak() -> int:
    """Bytes of memory that are resident now; from here on the kernel notes their peak anew (proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:", 1)[1].split(None, 1)[0])
