"""Trainings of a list, one after the other or on a Ray cluster: the base is loaded once, and a failure stops only its task."""

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reft_edge.adapter_files import push
from reft_edge.cluster import check_workers, connected
from reft_edge.errors import ReftEdgeError
from reft_edge.files import make_folder, sha256_of, write_atomically
from reft_edge.locks import held
from reft_edge.many.finished import Finished, Record
from reft_edge.many.tasks import Task, TaskList
from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.training.checkpoint import OtherTrainingError
from reft_edge.training.output import checkpoint_of
from reft_edge.training.session import Report, Session, read_session
from reft_edge.training.settings import TrainResult

_POLL = 1.0
"""Seconds between looks at what the processes of a cluster have done."""


@dataclass(frozen=True)
class TaskResult:
    """What became of a task."""

    name: str
    status: str
    """`trained`, `finished` (by an earlier run) or `failed`."""
    path: Path
    error: str = ""
    pushed: str = ""
    """The repository that has it."""
    size: int | None = None
    """Bytes."""
    parameters: int | None = None
    loss: float | None = None
    """Mean training loss of the last tenth of the steps, in nats a token."""
    evaluation: float | None = None
    """Loss on held-out rows, the same."""
    accuracy: float | None = None
    seconds: float | None = None


OnTask = Callable[[TaskResult], None]


@dataclass
class _Run:
    """A list under way."""

    given: TaskList
    record: Record
    plain_http: bool
    report: Report
    on_task: OnTask
    folder: ModelFolder
    results: dict[str, TaskResult]

    def end(self, result: TaskResult) -> None:
        self.results[result.name] = result
        self.on_task(result)

    def fail(self, task: Task, error: object) -> None:
        self.end(TaskResult(task.name, "failed", task.output, str(error)))

    def still_to_train(self, task: Task) -> bool:
        """Whether a task is not finished; what is left to do of one that is, is done."""
        try:
            digest = task.digest(self.given.base)
            finished = self.record.of(task.name, digest, task.output)
            if finished is None:
                make_folder(task.output.parent)
                return True
        except (ReftEdgeError, OSError) as error:
            self.fail(task, error)
            return False
        self._push(task, TaskResult(task.name, "finished", task.output), finished)
        return False

    def session(self, task: Task, resume: bool) -> Session:
        base = self.given.base
        said = partial(_prefixed, self.report, task.name)
        return read_session(self.folder, task.wanted(base, resume), {**task.settings, **base.settings}, said)

    def trained(self, task: Task, result: TrainResult) -> None:
        """Keep that a task was trained, and push it."""
        finished = Finished(task.digest(self.given.base), sha256_of(task.output))
        self.record.keep(task.name, finished)
        told = {
            name: getattr(result, name)
            for name in ("size", "parameters", "loss", "evaluation", "accuracy", "seconds")
        }
        self._push(task, TaskResult(task.name, "trained", task.output, **told), finished)

    def _push(self, task: Task, result: TaskResult, finished: Finished) -> None:
        if task.push is not None and finished.pushed != task.push:
            try:
                push(task.output, task.push, name=task.name, plain_http=self.plain_http)
            except (ReftEdgeError, OSError) as error:
                said = f"{task.output} is trained, but not pushed: {error}"
                self.end(dataclasses.replace(result, status="failed", error=said))
                return
            finished = dataclasses.replace(finished, pushed=task.push)
            self.record.keep(task.name, finished)
        self.end(dataclasses.replace(result, pushed=finished.pushed if task.push else ""))


def run_tasks(
    given: TaskList,
    state: Path | None,
    ray: str | None = None,
    workers: int | None = None,
    plain_http: bool = False,
    report: Report = lambda message: None,
    on_task: OnTask = lambda result: None,
) -> list[TaskResult]:
    """Train the tasks that `state`, a file, does not name as finished; what became of each, in their order.

    Raises ReftEdgeError where no task could be trained: a base that cannot be loaded, or another run of the same list.
    """
    check_workers(workers, ray)
    with ExitStack() as stack:
        if state is not None:
            busy = f"another run of these tasks is under way ({state}); wait for its end, or stop it"
            stack.enter_context(held(state.with_name(f".{state.name}.lock"), busy))
        folder = resolve_model(given.base.model, report)
        run = _Run(given, Record(state), plain_http, report, on_task, folder, {})
        left = [task for task in given.tasks if run.still_to_train(task)]
        if left and ray is not None:
            _on_ray(run, left, ray, workers)
        elif left:
            _here(run, left)
        return [run.results[task.name] for task in given.tasks]


def _here(run: _Run, tasks: list[Task]) -> None:
    model: Any = None
    for task in tasks:
        run.report(f"{task.name}: training")
        try:
            session = run.session(task, checkpoint_of(task.output).exists())
        except (ReftEdgeError, OSError) as error:
            run.fail(task, error)
            continue
        if model is None:
            model = session.with_model().model
        try:
            result = _train(
                dataclasses.replace(session, model=model), partial(_prefixed, run.report, task.name)
            )
            run.trained(task, result)
        except (ReftEdgeError, OSError) as error:
            run.fail(task, error)


def _train(session: Session, report: Report) -> TrainResult:
    """From the checkpoint of an interrupted run, if it is of this task."""
    try:
        return session.run(report)
    except OtherTrainingError:
        fresh = dataclasses.replace(session.wanted, resume=False)
        return dataclasses.replace(session, wanted=fresh).run(report)


def _on_ray(run: _Run, tasks: list[Task], address: str, workers: int | None) -> None:
    """The rows are read here, and the files written here."""
    waiting = iter(tasks)
    session = _next_session(run, waiting)
    if session is None:
        return
    with connected(address, partial(_load, session[1]), workers) as pool:
        running: dict[int, Task] = {}
        while session is not None or running:
            while session is not None and pool.free:
                running[pool.begin(_work, session[1])] = session[0]
                session = _next_session(run, waiting)
            for name, result in pool.ended(_POLL):
                task = running.pop(name)
                if isinstance(result, Exception):
                    run.fail(task, result)
                    continue
                content, trained = result
                try:
                    write_atomically(task.output, content)
                    run.trained(task, trained)
                except (ReftEdgeError, OSError) as error:
                    run.fail(task, error)


def _next_session(run: _Run, tasks: Any) -> tuple[Task, Session] | None:
    """The next task whose rows can be read."""
    for task in tasks:
        try:
            return task, run.session(task, resume=False)
        except (ReftEdgeError, OSError) as error:
            run.fail(task, error)
    return None


def _load(session: Session) -> Any:
    return session.with_model().model


def _work(model: Any, session: Session) -> tuple[bytes, TrainResult]:
    """A training in a process of the cluster: the file's bytes, and what is told of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / session.wanted.output.name
        wanted = dataclasses.replace(session.wanted, output=path)
        result = dataclasses.replace(session, wanted=wanted, model=model).run()
        return path.read_bytes(), dataclasses.replace(result, path=session.wanted.output)


def _prefixed(report: Report, name: str, message: str) -> None:
    report(f"{name}: {message}")
