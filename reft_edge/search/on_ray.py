"""The trials of a search on a Ray cluster: the study stays here, and processes elsewhere train and ask it when to stop."""

import asyncio
import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.cluster import Pool, connected
from reft_edge.search.scores import Measured
from reft_edge.search.study import Candidate
from reft_edge.search.trial import Outcome, run_trial
from reft_edge.training.session import Session
from reft_edge.training.settings import TrainSettings

if TYPE_CHECKING:
    from reft_edge.search.run import Search

_POLL = 0.1
"""Seconds between looks at what the processes say."""


class _Board:
    """Where processes say what they reached, and wait for the answer; an actor of the cluster."""

    def __init__(self) -> None:
        self._said: list[tuple[int, int, Measured]] = []
        self._answers: dict[int, asyncio.Future[bool]] = {}

    async def reached(self, number: int, rung: int, measured: Measured) -> bool:
        """Whether the trial is to stop. One that begins again takes the place of the one that was lost."""
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._said.append((number, rung, measured))
        stop: bool = await answer
        return stop

    async def news(self) -> list[tuple[int, int, Measured]]:
        """What was said since the last call."""
        said, self._said = self._said, []
        return said

    async def answer(self, number: int, stop: bool) -> None:
        if (waiting := self._answers.pop(number, None)) is not None:
            waiting.set_result(stop)


def run_on_ray(search: "Search") -> None:
    """All trials, in the processes of the cluster; see `Search.run_here`."""
    session, asked = search.session, search.asked
    assert asked.ray is not None
    bare = dataclasses.replace(session, model=None)
    with connected(asked.ray, partial(_load, bare), asked.workers) as pool:
        board = pool.beside(_Board)
        shared = pool.ray.put(bare)
        running: dict[int, Candidate] = {}
        try:
            while running or search.more():
                while pool.free and search.more(len(running)):
                    candidate = search.study.next()
                    name = pool.begin(_run, shared, candidate.settings, candidate.number, board, search.left)
                    running[name] = candidate
                _look(search, pool, board, running)
        except BaseException:
            for candidate in running.values():
                search.study.ended(candidate, Outcome(stopped="time"))
            raise


def _look(search: "Search", pool: Pool, board: Any, running: dict[int, Candidate]) -> None:
    """Take what ended, and answer what was asked."""
    for name, outcome in pool.ended(_POLL):
        if isinstance(outcome, Exception):
            raise outcome
        search.take(running.pop(name), outcome)
    by_number = {candidate.number: candidate for candidate in running.values()}
    for number, rung, measured in pool.ray.get(board.news.remote()):
        if number in by_number:
            stop = search.reached(by_number[number], rung, measured)
            board.answer.remote(number, stop)


def _load(session: Session) -> Any:
    return session.with_model().model


def _run(
    model: Any, session: Session, settings: TrainSettings, number: int, board: Any, seconds: float
) -> Outcome:
    """A trial, in a process of the cluster."""
    import ray

    def reached(rung: int, measured: Measured) -> bool:
        return bool(ray.get(board.reached.remote(number, rung, measured)))

    with tempfile.TemporaryDirectory() as folder:
        return run_trial(dataclasses.replace(session, model=model), settings, Path(folder), reached, seconds)
