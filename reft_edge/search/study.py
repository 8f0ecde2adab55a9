"""A study on disk: what was tried, how it did, and what to try next. Optuna keeps it, in SQLite."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place
from reft_edge.locks import held
from reft_edge.search.scores import Measured
from reft_edge.search.space import SEARCHED, Space
from reft_edge.search.trial import RUNGS, Outcome
from reft_edge.training.settings import TrainSettings

_NAME = "reft-edge"
_STARTUP = 6
"""Trials that are drawn at random before what was found guides the search."""
_KEEP = 2
"""Of so many trainings that reach a rung, one goes on."""


@dataclass(frozen=True)
class Candidate:
    """A trial that is under way."""

    number: int
    settings: TrainSettings
    default: bool
    """Whether these are the settings that a training has without a search."""
    trial: optuna.Trial = dataclasses.field(repr=False, compare=False)


@dataclass(frozen=True)
class Tried:
    """A trial that has ended."""

    number: int
    settings: dict[str, Any]
    """Those of SEARCHED."""
    default: bool
    state: str
    """`done`, `worse` (stopped early), `time` (stopped at the end of the budget or by hand) or `failed`."""
    loss: float | None
    """On held-out rows at its end, or at the last rung that it reached; None where it reached none."""
    accuracy: float | None
    """The same."""
    parameters: int
    steps: int
    seconds: float
    error: str
    sha256: str
    """Of its adapter file; empty where there is none."""
    measured: Measured | None = dataclasses.field(repr=False)
    """Of a trial that is done."""


class Study:
    """The trials of one search."""

    def __init__(self, study: optuna.Study, space: Space, baseline: TrainSettings, score: str) -> None:
        self._study, self._space, self._score = study, space, score
        self.baseline = baseline
        """What a trial does not choose."""

    @property
    def tried(self) -> list[Tried]:
        """Trials that have ended, in their order."""
        return [
            _tried(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()
        ]

    @property
    def best(self) -> Tried | None:
        """Of the trials that came to their end."""
        done = [(tried.measured, tried) for tried in self.tried if tried.measured is not None]
        return max(done, key=lambda pair: pair[0].key(self._score), default=(None, None))[1]

    @property
    def default(self) -> Tried | None:
        """The trial of the settings that a training has without a search, once it came to its end."""
        return next((tried for tried in self.tried if tried.default and tried.state == "done"), None)

    def remembered(self, name: str) -> Any:
        """What `remember` was given; None for nothing."""
        return self._study.user_attrs.get(name)

    def remember(self, name: str, value: Any) -> None:
        """Keep a value of JSON's types in the file."""
        self._study.set_user_attr(name, value)

    def again(self, settings: TrainSettings, default: bool) -> None:
        """Try these settings next."""
        given = self._space.parameters(settings)
        about = {"default": default, "settings": _searched(settings)}
        self._study.enqueue_trial(given or {}, user_attrs={**about, "outside": given is None})

    def next(self) -> Candidate:
        """What to try now."""
        trial = self._study.ask()
        about = trial.user_attrs
        chosen = about["settings"] if about.get("outside") else self._space.suggest(trial)
        settings = dataclasses.replace(self.baseline, **chosen)
        trial.set_user_attr("settings", _searched(settings))
        return Candidate(trial.number, settings, bool(about.get("default")), trial)

    def reached(self, candidate: Candidate, rung: int, measured: Measured) -> bool:
        """Whether the trial is to stop at this rung, as one that does worse than others did there."""
        trial = candidate.trial
        trial.report(measured.value(self._score), rung)
        trial.set_user_attr("reached", {"loss": measured.loss, "accuracy": measured.accuracy})
        return not candidate.default and trial.should_prune()

    def ended(self, candidate: Candidate, outcome: Outcome, sha256: str = "") -> None:
        """Keep what became of a trial."""
        trial, measured = candidate.trial, outcome.measured
        state = "done" if measured is not None else outcome.stopped or "failed"
        about = {
            "state": state,
            "parameters": outcome.parameters,
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "error": outcome.error,
            "sha256": sha256,
            "measured": None if measured is None else dataclasses.asdict(measured),
        }
        for name, value in about.items():
            trial.set_user_attr(name, value)
        if measured is not None:
            self._study.tell(trial, measured.value(self._score))
            return
        # settings that cannot be trained count as bad ones, not as ones that nothing is known of
        self._study.tell(trial, state=TrialState.FAIL if state == "time" else TrialState.PRUNED)


@contextmanager
def open_study(
    path: Path, of: dict[str, Any], space: Space, baseline: TrainSettings, score: str, seed: int
) -> Iterator[Study]:
    """A new study, or the one that was interrupted. `of`: what it belongs to, in JSON's types.

    Raises ReftEdgeError for a file that is no study, that is of another search, or that another search writes to.
    """
    check_place(path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    busy = f"another search writes to {path}; wait for its end, stop it, or give another file with --study"
    with ExitStack() as stack:
        stack.enter_context(held(path.with_name(f".{path.name}.lock"), busy))
        stack.enter_context(_sound(path))
        url = URL.create("sqlite", database=str(path.absolute()))
        storage = optuna.storages.RDBStorage(url.render_as_string(hide_password=False))
        stack.callback(storage.remove_session)
        stack.callback(storage.engine.dispose)
        names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
        if names and _NAME not in names:
            raise ReftEdgeError(f"{path} holds studies of other programs; give another file with --study")
        count = 0 if not names else len(optuna.load_study(study_name=_NAME, storage=storage).trials)
        study = optuna.create_study(
            storage=storage,
            sampler=optuna.samplers.TPESampler(n_startup_trials=_STARTUP, seed=(seed + 7919 * count) % 2**32),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=RUNGS[0], reduction_factor=_KEEP),
            study_name=_NAME,
            direction="maximize" if score == "accuracy" else "minimize",
            load_if_exists=True,
        )
        _check_same(path, study, json.loads(json.dumps(of | {"space": space.described(), "score": score})))
        found = Study(study, space, baseline, score)
        _tidy(study)
        if not any(_is_default(trial) for trial in study.trials):
            found.again(baseline, default=True)
        yield found


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = (
            getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or type(error).__name__
        )
        raise ReftEdgeError(
            f"{path} cannot be used as a study: {reason}; give another file with --study"
        ) from error
    except RuntimeError as error:
        if "version" not in str(error):
            raise
        raise ReftEdgeError(
            f"{path} is of another version of Optuna; give another file with --study"
        ) from error


def _check_same(path: Path, study: optuna.Study, of: dict[str, Any]) -> None:
    """Raise ReftEdgeError if the study is of another search; a new one is told what it is of."""
    if (known := study.user_attrs.get("of")) is None:
        study.set_user_attr("of", of)
        return
    differing = sorted(name for name in known.keys() | of.keys() if known.get(name) != of.get(name))
    if differing:
        raise ReftEdgeError(
            f"{path} is of another search; these differ: {', '.join(differing)}. Use the same options and data, give another "
            "file with --study, or delete it to start again"
        )


def _tidy(study: optuna.Study) -> None:
    """End the trials that a killed process left."""
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)


def _is_default(trial: FrozenTrial) -> bool:
    """Whether this is the default's trial, and has ended or waits."""
    return bool(trial.user_attrs.get("default")) and trial.state != TrialState.FAIL


def _searched(settings: TrainSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in SEARCHED}


def _tried(trial: FrozenTrial) -> Tried:
    about = trial.user_attrs
    measured = about.get("measured")
    found = (
        None if measured is None else Measured(**{name: tuple(values) for name, values in measured.items()})
    )
    if found is not None:
        loss, accuracy = found.loss, found.accuracy
    else:
        reached = about.get("reached", {})
        loss, accuracy = reached.get("loss"), reached.get("accuracy")
    return Tried(
        trial.number,
        about.get("settings", {}),
        bool(about.get("default")),
        about.get("state", "time"),
        loss if loss is None or math.isfinite(loss) else None,
        accuracy,
        about.get("parameters", 0),
        about.get("steps", 0),
        about.get("seconds", 0.0),
        about.get("error", ""),
        about.get("sha256", ""),
        found,
    )
