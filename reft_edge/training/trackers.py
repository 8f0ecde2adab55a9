"""A training's losses in TensorBoard, Weights & Biases or another tracker that Accelerate knows."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.training.settings import StepReport, TrainResult

NONE = "none"
PROJECT = "reft-edge"
"""Under which runs are kept, where a tracker has projects."""
_PACKAGES = {"comet_ml": "comet-ml"}
"""What pip calls a tracker's package, where that is not the tracker's name."""


@dataclass
class Trackers:
    """Trackers by Accelerate's names, to which every step is reported while `running`.

    TensorBoard's files are in the folder `runs` beside the adapter, or in $TENSORBOARD_LOGGING_DIR. A tracker that fails is
    reported once and left out; the training goes on.
    """

    names: tuple[str, ...]
    output: Path
    """The adapter's file, after which the run is named."""
    report: Callable[[str], None]
    _started: dict[str, Any] = field(default_factory=dict, init=False)

    @contextmanager
    def running(self, described: dict[str, Any]) -> Iterator[None]:
        """Start them, each with what describes the training, and end them behind the block.

        Raises ReftEdgeError if one cannot be started.
        """
        try:
            for name in self.names:
                self._start(name, described)
            yield
        finally:
            self._each(lambda tracker: tracker.finish())

    def __call__(self, step: StepReport) -> None:
        """Report a step."""
        values = {
            "train/loss": step.loss,
            "train/learning_rate": step.lr,
            "train/tokens_per_second": step.tokens_per_second,
        }
        if step.evaluation is not None:
            values["eval/loss"] = step.evaluation
        self._each(lambda tracker: tracker.log(values, step=step.step))

    def end(self, result: TrainResult) -> None:
        """Report what was measured on the held-out rows at the end."""
        measured = {"eval/loss": result.evaluation, "eval/accuracy": result.accuracy}
        if values := {name: value for name, value in measured.items() if value is not None}:
            self._each(lambda tracker: tracker.log(values, step=result.steps))

    def _start(self, name: str, described: dict[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # trackers look there for the process they are in
        kind = LOGGER_TYPE_TO_CLASS[name]
        run = f"{self.output.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            if kind.requires_logging_directory:
                folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or self.output.parent / "runs")
                tracker = kind(run, folder)
                self.report(f"{name} writes to {folder / run}")
            elif name == "wandb":
                tracker = kind(os.environ.get("WANDB_PROJECT") or PROJECT, name=run)
            else:
                tracker = kind(PROJECT)
            tracker.start()
            tracker.store_init_configuration(described)
        except Exception as error:
            raise ReftEdgeError(
                f"cannot start {name}: {error}; mend that, or leave it out of --report-to"
            ) from error
        self._started[name] = tracker

    def _each(self, use: Callable[[Any], None]) -> None:
        for name, tracker in list(self._started.items()):
            try:
                use(tracker)
            except Exception as error:
                del self._started[name]
                self.report(f"{name} gets no more of this training: {error}. The training goes on")


def trackers(given: Sequence[str], output: Path, report: Callable[[str], None]) -> Trackers | None:
    """Those that are named, each name one or several with commas between; None for `none` or no name.

    Raises ReftEdgeError for a name that Accelerate does not know, or whose package is not installed.
    """
    names = dict.fromkeys(name.strip() for part in given for name in part.split(","))
    names.pop(NONE, None)
    if not names:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ReftEdgeError(
                f"there is no tracker {name!r}; expected {NONE}, or some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in available:
            raise ReftEdgeError(
                f"--report-to {name} needs a package that is not installed; install it with: pip install "
                f"{_PACKAGES.get(name, name)}"
            )
    return Trackers(tuple(names), output, report)
