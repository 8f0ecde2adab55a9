"""Ctrl-C, SIGTERM and a terminal that closes while work runs that can be saved: the first is noted, the second ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

_NOTED = b"\nstopping after this step; once more stops at once\n"


SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's ended the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass
class Interrupts:
    """What came so far."""

    count: int = 0
    number: int = signal.SIGINT
    """The last signal."""
    settle: float = 0.0
    """Seconds after the first in which further ones are the same interrupt."""
    patient: bool = False
    """Whether the first one is only noted, since somebody looks at `count` soon."""
    _first: float = 0.0
    _ending: bool = False

    def as_error(self) -> KeyboardInterrupt:
        """The exception that stands for the last signal."""
        return KeyboardInterrupt() if self.number == signal.SIGINT else Terminated(self.number)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the block the first signal only counts."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def end(self, before: Mapping[int, Any]) -> None:
        """Put the handlers of before back, all of them; what comes meanwhile is raised after that."""
        came, self._ending = self.count, True
        with ExitStack() as stack:  # goes on where a handler that is back raises
            for number, handler in before.items():
                stack.callback(signal.signal, number, handler)
        if self.count > came:
            raise self.as_error()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.count and now - self._first < self.settle:
            return
        self._first = self._first or now
        self.count += 1
        self.number = number
        if self._ending:
            return
        if not self.patient or self.count > 1:
            raise self.as_error()
        with suppress(OSError):
            os.write(2, _NOTED)  # print could be in the middle of a line's bytes


@contextmanager
def interrupts(settle: float = 0.0) -> Iterator[Interrupts]:
    """Inside the block SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise Terminated; or they are noted.

    A signal that was ignored stays so, as for a shell's background jobs. Outside the main thread nothing changes.
    """
    found = Interrupts(settle=settle)
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            kept = signal.getsignal(number)
            if kept not in (signal.SIG_IGN, None):
                before[number] = kept
                signal.signal(number, found._handle)
        yield found
    finally:
        found.end(before)
