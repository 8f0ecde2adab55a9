"""The search: trials until the budget is spent, the best file kept, and a last look whether it was worth it."""

import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from reft_edge.cluster import check_workers
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_apart, check_place, same_file, sha256_of, write_atomically
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model_prompts
from reft_edge.rows.source import file_of
from reft_edge.search.page import render
from reft_edge.search.result import Asked, Check, SearchInterrupted, Tuned
from reft_edge.search.scores import Measured, check_score, default_score, difference
from reft_edge.search.space import SEARCHED, Space, space_for
from reft_edge.search.study import Candidate, Study, Tried, open_study
from reft_edge.search.trial import RUNGS, Outcome, Pace, measure_file, pace_of, run_trial
from reft_edge.training.classification import LabelledTexts
from reft_edge.training.session import Report, Session
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import steps_of
from reft_edge.training.triggers import tokenised

_PART = 4
"""A whole training takes at most one such part of the budget, unless the user says how long it is."""
_PARTS = {1: "a quarter", 2: "half"}
"""What rungs before the last one are called."""
_GIVEN_UP = 5
"""Trials after which a search of which none could be trained ends."""

OnTrial = Callable[[Tried], None]


@dataclasses.dataclass
class Search:
    """A search under way."""

    session: Session
    asked: Asked
    study: Study
    score: str
    report: Report
    on_trial: OnTrial
    deadline: float
    """By `time.monotonic`."""

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def more(self, running: int = 0) -> bool:
        """Whether there is another trial to begin while so many run. Raises ReftEdgeError if none can be trained."""
        tried = self.study.tried
        if len(tried) >= _GIVEN_UP and all(one.state == "failed" for one in tried):
            raise ReftEdgeError(
                f"none of the first {len(tried)} trials could be trained; the last one said: {tried[-1].error}"
            )
        return self.left > self._shortest(tried) and not self._enough(tried, running)

    def _enough(self, tried: list[Tried], running: int = 0) -> bool:
        """Whether there are as many trials as were asked for."""
        counted = sum(one.state != "time" for one in tried)
        return self.asked.trials is not None and counted + running >= self.asked.trials

    def _shortest(self, tried: list[Tried]) -> float:
        """Seconds of the quickest trial that came to its end; 0 where none did."""
        return min((one.seconds for one in tried if one.state == "done"), default=0.0)

    def tell_rest(self) -> None:
        """Say it where no further trial was begun because it would not have come to its end."""
        tried = self.study.tried
        if 0 < self.left <= (shortest := self._shortest(tried)) and not self._enough(tried):
            self.report(
                f"{self.left:,.0f} s of the budget are left, too little for one more trial: the quickest so far took "
                f"{shortest:,.0f} s"
            )

    def reached(self, candidate: Candidate, rung: int, measured: Measured) -> bool:
        """Say how a trial does, and whether it is to stop."""
        self.report(
            f"trial {candidate.number} after {_PARTS[rung]} of its steps: held-out loss {measured.loss:.4f}, "
            f"accuracy {measured.accuracy:.3f}"
        )
        return self.study.reached(candidate, rung, measured)

    def take(self, candidate: Candidate, outcome: Outcome) -> None:
        """Keep what became of a trial, and its file if there is no better one."""
        sha256 = hashlib.sha256(outcome.adapter).hexdigest() if outcome.adapter else ""
        if (measured := outcome.measured) is not None:
            best = self.study.best
            if (
                best is None
                or best.measured is None
                or measured.key(self.score) > best.measured.key(self.score)
            ):
                write_atomically(self.asked.output, outcome.adapter)
        self.study.ended(candidate, outcome, sha256)
        self.on_trial(next(one for one in reversed(self.study.tried) if one.number == candidate.number))

    def run_here(self) -> None:
        """All trials, one after the other, in this process."""
        while self.more():
            candidate = self.study.next()
            self.report(
                f"trial {candidate.number} of {candidate.settings.max_steps:,} steps begins; {self.left:,.0f} s of the budget "
                "are left"
            )
            reached = partial(self.reached, candidate)
            folder = self.asked.output.parent
            try:
                outcome = run_trial(self.session, candidate.settings, folder, reached, self.left)
            except BaseException:
                self.study.ended(candidate, Outcome(stopped="time"))
                raise
            self.take(candidate, outcome)


def search(
    session: Session,
    asked: Asked,
    report: Report = lambda message: None,
    on_trial: OnTrial = lambda tried: None,
) -> Tuned:
    """Search, and write the best adapter to `asked.output`. `session` has the rows, held-out ones too, and the base.

    After Ctrl-C what was found until then is on disk: raises SearchInterrupted, or KeyboardInterrupt where that is
    nothing. Raises ReftEdgeError for what cannot be searched, and where no trial came to its end.
    """
    assert session.evaluation is not None
    started = time.monotonic()
    check_asked(session, asked)
    score = asked.score or default_score(session.data)
    space = _space(session, asked)
    of = _identity(session, asked)
    interrupted = None
    with open_study(asked.study, of, space, session.settings, score, session.settings.seed) as study:
        if known := len(study.tried):
            trials = f"{known:,} trial{'' if known == 1 else 's'}"
            report(f"continuing the study of {asked.study}, which has {trials}{_so_far(study, score)}")
        under_way = Search(session, asked, study, score, report, on_trial, started + asked.budget)
        try:
            study.baseline = dataclasses.replace(
                session.settings, max_steps=_steps(session, asked, study, report)
            )
            _run(under_way)
        except KeyboardInterrupt as error:
            interrupted = error
        best = study.best
        if best is None:
            if interrupted is not None:
                raise interrupted
            raise ReftEdgeError(_nothing(asked, study))
        _see_in_place(under_way, best, interrupted is not None)
        check = _check(under_way, best) if interrupted is None else None
        found = Tuned(
            asked.output,
            score,
            best,
            study.default,
            check,
            len(session.data.examples),
            len(session.evaluation.examples),
            time.monotonic() - started,
            asked.study,
            asked.plot,
            tuple(study.tried),
        )
    write_atomically(asked.plot, render(found).encode("utf-8"))
    if interrupted is not None:
        raise SearchInterrupted(found, getattr(interrupted, "number", signal.SIGINT)) from interrupted
    return found


def _so_far(study: Study, score: str) -> str:
    """The best trial of earlier runs, as the rest of a sentence."""
    best = study.best
    if best is None or best.measured is None:
        return ""
    return f"; the best so far is trial {best.number}, held-out {score} {best.measured.value(score):.4f}"


def _run(under_way: Search) -> None:
    if under_way.asked.ray is None:
        under_way.run_here()
    else:
        from reft_edge.search.on_ray import run_on_ray

        run_on_ray(under_way)
    under_way.tell_rest()


def check_asked(session: Session, asked: Asked) -> None:
    """Raise ReftEdgeError for what no search does."""
    wanted = session.wanted
    read = [file_of(source) for source in (wanted.rows, wanted.evaluation) if source is not None]
    written = {"the adapter": asked.output, "the study": asked.study, "the page": asked.plot}
    for (one, path), (other, same) in combinations(written.items(), 2):
        if same_file(path, same):
            raise ReftEdgeError(
                f"{one} and {other} would both be {same}; give another name with -o, --study or --plot"
            )
    for path in (asked.study, asked.plot):
        check_apart(path, *read)
        check_place(path)
    for name in ("trials", "seeds"):
        if (count := getattr(asked, name)) is not None and count < 1:
            raise ReftEdgeError(f"{name} is {count}; expected 1 or more")
    if asked.score is not None:
        check_score(asked.score)
    check_workers(asked.workers, asked.ray)
    if wanted.execution.processes.count > 1:
        raise ReftEdgeError(
            "a search runs in one process; to use several machines, give a Ray cluster with --ray"
        )


def _space(session: Session, asked: Asked) -> Space:
    layers = len(decoder_layers(session.model))
    generates = not isinstance(session.data, LabelledTexts)
    narrowed = asked.narrowed
    if generates and narrowed.positions:
        prompts = load_model_prompts(session.folder)
        specs = tuple(tokenised(spec, prompts) for spec in narrowed.positions)
        narrowed = dataclasses.replace(narrowed, positions=specs)
    return space_for(narrowed, layers, session.model.config.hidden_size, generates)


def _identity(session: Session, asked: Asked) -> dict[str, Any]:
    """What a study belongs to."""
    assert session.evaluation is not None
    settings = dataclasses.asdict(session.settings)
    length = {name: settings.pop(name) for name in ("epochs", "max_steps")} if asked.whole else {}
    return {
        "model": fingerprint(session.model),
        "rows": session.data.digest,
        "held-out rows": session.evaluation.digest,
        **{name: value for name, value in settings.items() if name not in (*SEARCHED, "epochs", "max_steps")},
        **length,
        "default": {name: settings[name] for name in SEARCHED},
    }


def _steps(session: Session, asked: Asked, study: Study, report: Report) -> int:
    """Steps of each trial: all that were asked for, or what leaves time for several."""
    if (known := study.remembered("steps")) is not None:
        return int(known)
    steps = whole = steps_of(session.settings, len(session.data.examples))
    report("a few steps first, to see how long a training takes")
    pace = _pace(session, asked)
    takes = pace.of(whole)
    if asked.whole and takes > asked.budget:
        report(
            f"a training of {whole:,} steps takes about {takes:,.0f} s, more than the budget: give more time or fewer steps"
        )
    elif not asked.whole and takes > asked.budget / _PART:
        room = asked.budget / _PART - len(RUNGS) * pace.measuring
        steps = min(whole, max(2 * RUNGS[-1], math.floor(room / pace.step)))
        report(
            f"a whole training has {whole:,} steps and takes about {takes:,.0f} s: so that several fit into the budget, each "
            f"trial has {steps:,}. --epochs or --max-steps says otherwise"
        )
    study.remember("steps", steps)
    return steps


def _pace(session: Session, asked: Asked) -> Pace:
    try:
        return pace_of(session, session.settings, asked.output.parent)
    except ReftEdgeError:  # of settings that cannot be trained; others may be
        return Pace(0.0, 0.0)


def _nothing(asked: Asked, study: Study) -> str:
    failed = next((one.error for one in reversed(study.tried) if one.state == "failed"), None)
    why = f"; one that could not be trained said: {failed}" if failed else ""
    return (
        f"the budget was spent before a trial came to its end{why}. Give more time with --budget; {asked.study} is kept. Or "
        "give shorter trainings with --max-steps, and another file with --study"
    )


def _see_in_place(under_way: Search, best: Tried, interrupted: bool) -> None:
    """See that the best trial's file is at the output: an earlier run's may have been lost."""
    asked = under_way.asked
    if asked.output.is_file() and sha256_of(asked.output) == best.sha256:
        return
    lost = f"{asked.output} is not of the best trial, number {best.number}"
    if interrupted:
        under_way.report(f"{lost}; the search, continued to its end, trains it again")
        return
    under_way.report(f"{lost}: training it again")
    settings = dataclasses.replace(under_way.study.baseline, **best.settings)
    write_atomically(asked.output, _trained(under_way, settings).adapter)


def _check(under_way: Search, best: Tried) -> Check:
    """Measure the file, and compare it with the default settings."""
    session, default, score = under_way.session, under_way.study.default, under_way.score
    measured = measure_file(session, under_way.asked.output)
    found = None
    if default is not None and default.measured is not None and default.number != best.number:
        found = difference(measured, default.measured, score, session.settings.seed)
    further = range(1, under_way.asked.seeds)
    sides: list[tuple[float, ...]] = []
    for one in (best, default) if found is not None else (best,):
        assert one is not None
        settings = dataclasses.replace(under_way.study.baseline, **one.settings)
        if further:
            under_way.report(f"training trial {one.number} with {len(further)} more seeds")
        sides.append(tuple(_score_of_seed(under_way, settings, number) for number in further))
    return Check(measured.loss, measured.accuracy, found, *sides)


def _score_of_seed(under_way: Search, settings: TrainSettings, number: int) -> float:
    outcome = _trained(under_way, dataclasses.replace(settings, seed=settings.seed + number))
    assert outcome.measured is not None
    return outcome.measured.value(under_way.score)


def _trained(under_way: Search, settings: TrainSettings) -> Outcome:
    """A training to its end, however long it takes."""
    folder: Path = under_way.asked.output.parent
    outcome = run_trial(under_way.session, settings, folder, lambda rung, measured: False, math.inf)
    if outcome.error:
        raise ReftEdgeError(outcome.error)
    return outcome
