"""What a search is asked for, and what it found."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.search.scores import Difference
from reft_edge.search.space import ANYTHING, Narrowed
from reft_edge.search.study import Tried

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Asked:
    """A search."""

    output: Path
    budget: float
    """Seconds for the trials."""
    study: Path
    plot: Path
    """The HTML page."""
    trials: int | None = None
    """Trials after which there are no more, those of earlier runs counted."""
    seeds: int = 1
    """Seeds by which the best settings and the default ones are compared."""
    score: str | None = None
    """loss or accuracy; by default what suits the task."""
    narrowed: Narrowed = ANYTHING
    whole: bool = False
    """Whether each trial is trained as long as was said, in place of what fits the budget."""
    ray: str | None = None
    """The address of a Ray cluster that runs the trials."""
    workers: int | None = None
    """Processes of the cluster, each with the base; by default one a machine."""


@dataclass(frozen=True)
class Check:
    """The best trial's file measured again, beside the default settings on the same held-out rows."""

    loss: float
    accuracy: float
    difference: Difference | None
    """How much better than the default; None where the default is the best, or could not be trained."""
    best_seeds: tuple[float, ...] = ()
    """Scores with further seeds."""
    default_seeds: tuple[float, ...] = ()

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference is above 0."""
        return self.difference is not None and self.difference.low > 0


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    path: Path
    """The best trial's adapter."""
    score: str
    best: Tried
    default: Tried | None
    """The settings that a training has without a search; None where they could not be trained to the end."""
    check: Check | None
    """None where the search was interrupted."""
    rows: int
    held_out: int
    seconds: float
    study: Path
    plot: Path
    tried: tuple[Tried, ...] = field(repr=False)

    @property
    def adapter(self) -> Path:
        """The adapter file; `path` by another name."""
        return self.path


class SearchInterrupted(KeyboardInterrupt):
    """A signal ended a search of which at least one trial came to its end."""

    def __init__(self, found: Tuned, number: int) -> None:
        super().__init__()
        self.found = found
        """What there is until now."""
        self.number = number
        """The signal."""


def parse_budget(given: str | float) -> float:
    """Seconds, from such as 90s, 20m, 1h or 1h30m, or a number of seconds. Raises ReftEdgeError for anything else."""
    text = str(given).strip()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if isinstance(given, int | float) and not isinstance(given, bool):
        seconds = float(given)
    elif parts and "".join(map("".join, parts)) == text:
        seconds = sum(float(count) * _SECONDS[unit] for count, unit in parts)
    else:
        raise ReftEdgeError(f"the budget is {text!r}; write a time such as 90s, 20m, 1h or 1h30m")
    if not 0 < seconds < 366 * 86400:
        raise ReftEdgeError(f"the budget is {text!r}; expected more than nothing and less than a year")
    return seconds
