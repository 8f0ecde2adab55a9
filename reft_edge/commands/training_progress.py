"""What `train` shows of its steps: a bar in a terminal, lines now and then anywhere else."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen
    from reft_edge.training.settings import StepReport

    OnStep = Callable[[StepReport], None]

LINES = 20
"""A line after each such part of the steps, at least."""
QUIET = 10.0
"""Seconds after which there is a line even so; longer once a training has run for long."""


@contextmanager
def training_progress(screen: "Screen", tell: Callable[[str], None]) -> Iterator["OnStep"]:
    """Gives the callback that is told of every step; `tell` prints a line."""
    if screen.is_terminal and not screen.is_dumb_terminal:
        with _bar(screen) as on_step:
            yield on_step
    else:
        yield StepLines(tell)


@dataclass
class StepLines:
    """Steps as lines of text: the first, the last, every twentieth part, and whenever nothing was said for some time."""

    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _first: int = 0
    _said: int = 0
    _since: float = 0.0
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._since = self._last = self.clock()

    def __call__(self, step: "StepReport") -> None:
        """Say this step, if it is one to say."""
        now = self.clock()
        first = not self._first
        if first:
            self._first = step.step
        due = (step.step - self._said) * LINES >= step.steps or step.evaluation is not None
        quiet = now - self._last >= max(QUIET, (now - self._since) / LINES)
        if not (first or due or quiet or step.step == step.steps):
            return
        self._said, self._last = step.step, now
        done = step.step - self._first + 1
        left = (now - self._since) / done * (step.steps - step.step)
        self.say(f"step {step.step:,} of {step.steps:,}  {figures(step)}  {duration(left)} left")


@contextmanager
def working_on(screen: "Screen", what: str) -> Iterator[None]:
    """Say what is being done where it takes more than a few seconds, and now and then that it still is."""
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        pause = QUIET / 2
        while not done.wait(pause):
            screen.say(f"{what}: {duration(time.monotonic() - started)} so far")
            pause *= 2

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def figures(step: "StepReport") -> str:
    """Loss, speed and, where it was measured, the loss on held-out rows."""
    held_out = "" if step.evaluation is None else f"  held-out loss {step.evaluation:.4f}"
    return f"loss {step.loss:.4f}{held_out}  {step.tokens_per_second:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """Such as `40 s`, `5 min` or `2 h 10 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _bar(screen: "Screen") -> Iterator["OnStep"]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task("training", total=None, figures="")
        latest: list[float] = []

        def on_step(step: "StepReport") -> None:
            if step.evaluation is not None:
                latest[:] = [step.evaluation]
            shown = replace(step, evaluation=latest[0]) if latest else step
            progress.update(task, completed=step.step, total=step.steps, figures=figures(shown))

        yield on_step
