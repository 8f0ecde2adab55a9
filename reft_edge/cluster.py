"""Work on the machines of a Ray cluster: processes that load something large once, and then do one piece of work each."""

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra

_LOADING = 600.0
"""Seconds within which one process must have loaded what it needs."""
_REACHED = 10.0
"""Seconds within which a cluster's address must answer."""
_TRIES = 3
"""How often a piece of work begins that is lost with its process."""


def check_workers(workers: int | None, address: str | None) -> None:
    """Raise ReftEdgeError for a number of processes that is none, or that has no cluster."""
    if workers is not None and workers < 1:
        raise ReftEdgeError(f"workers is {workers}; expected 1 or more")
    if workers is not None and address is None:
        raise ReftEdgeError("workers are processes of a Ray cluster; say with --ray where that is")


class _Process:
    """What runs on a machine of the cluster."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._loaded: Any = None

    def ready(self) -> None:
        """Load."""
        self._loaded = self._load()

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(self._loaded, *arguments)


@dataclass
class _Job:
    """A piece of work."""

    name: int
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    tries: int = 0


class Pool:
    """Processes of a cluster; `connected` makes one."""

    def __init__(self, ray: Any, load: Callable[[], Any], workers: int | None) -> None:
        self.ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._count = workers or len(nodes)
        cpus = int(min(node.get("CPU", 0) for node in nodes))
        each = max(1, cpus // -(-self._count // len(nodes)))
        gpus = sum(node.get("GPU", 0) for node in nodes)
        options = {"num_cpus": each, "scheduling_strategy": "SPREAD"}
        options |= {"num_gpus": min(1.0, gpus / self._count)} if gpus else {}
        self._processes = [ray.remote(**options)(_Process).remote(load) for _ in range(self._count)]
        self._loading = {process.ready.remote(): process for process in self._processes}
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, _Job]] = {}
        self._waiting: deque[_Job] = deque()
        self._names = 0

    def wait_for_one(self) -> None:
        """Wait until one process has loaded. Raises ReftEdgeError where it cannot, or none starts."""
        end = time.monotonic() + _LOADING
        while not self._idle:
            if time.monotonic() > end:
                raise ReftEdgeError(
                    f"no process of the cluster could start within {_LOADING:,.0f} s: it has no room, or loading takes long"
                )
            self._settle(1.0)

    @property
    def free(self) -> int:
        """Processes without work."""
        return max(0, len(self._idle) - len(self._waiting))

    @property
    def busy(self) -> int:
        """Pieces of work that have not ended."""
        return len(self._running) + len(self._waiting)

    def begin(self, work: Callable[..., Any], *arguments: Any) -> int:
        """Do `work(loaded, *arguments)` in a process; gives the name by which `ended` tells of it."""
        self._names += 1
        self._waiting.append(_Job(self._names, work, arguments))
        self._assign()
        return self._names

    def ended(self, seconds: float) -> Iterator[tuple[int, Any]]:
        """Names and results of the work that ended, waiting so long for some; an error that it raised in place of a result.

        Work whose process was lost begins again elsewhere. Raises ReftEdgeError if all processes are lost.
        """
        for job, result in self._settle(seconds):
            yield job.name, result
        self._assign()

    def beside(self, kind: type) -> Any:
        """An actor on the machine of this process, where no other machine's end reaches it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        return self.ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with contextlib.suppress(Exception):
                self.ray.kill(process)

    def _assign(self) -> None:
        while self._idle and self._waiting:
            process, job = self._idle.pop(), self._waiting.popleft()
            job.tries += 1
            self._running[process.run.remote(job.work, *job.arguments)] = process, job

    def _settle(self, seconds: float) -> list[tuple[_Job, Any]]:
        from ray.exceptions import RayActorError

        found = []
        pending = [*self._loading, *self._running]
        done, _ = self.ray.wait(pending, timeout=seconds) if pending else ([], [])
        for reference in done:
            job = None
            if reference in self._loading:
                process = self._loading.pop(reference)
            else:
                process, job = self._running.pop(reference)
            try:
                result = self.ray.get(reference)
            except RayActorError as error:
                self._lost(process, job, error)
                continue
            except Exception as error:
                result = getattr(error, "cause", None) or error
                if job is None:
                    raise ReftEdgeError(f"a process of the cluster cannot begin: {result}") from error
            self._idle.append(process)
            if job is not None:
                found.append((job, result))
        return found

    def _lost(self, process: Any, job: _Job | None, error: Exception) -> None:
        """Go on without a process. Raises ReftEdgeError if none is left, or its work was lost too often."""
        self._processes.remove(process)
        if not self._processes:
            raise ReftEdgeError(f"all processes of the cluster are lost: {error}") from error
        if job is not None:
            if job.tries == _TRIES:
                raise ReftEdgeError(
                    f"{_TRIES} processes of the cluster were lost at the same work: {error}"
                ) from error
            self._waiting.appendleft(job)


@contextmanager
def connected(address: str, load: Callable[[], Any], workers: int | None = None) -> Iterator[Pool]:
    """Processes of the cluster at `address`, each of which has done `load()`; by default one a machine.

    This machine is one of the cluster's, and what `load` and the work need is at the same place on all of them. Raises ReftEdgeError where Ray is not installed
    (extra `ray`), where there is no cluster, and where loading fails.
    """
    with extra("ray"):
        import ray
    ours = not ray.is_initialized()
    try:
        if ours:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise ReftEdgeError(f"there is no Ray cluster at {address}: {error}") from error
    pool = None
    try:
        pool = Pool(ray, load, workers)
        pool.wait_for_one()
        yield pool
    finally:
        if pool is not None:
            pool.close()
        if ours:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=_REACHED).close()
