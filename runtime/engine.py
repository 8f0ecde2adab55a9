"""`Engine`: a batch that runs in a thread of its own, fed through a bounded queue by any number of threads."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.prompt_files import BUDGET, open_prompts
from reft_edge.runtime.request import Piece, Request, Row, as_reason
from reft_edge.runtime.room import PREFIX_SHARE, usual_budget


class QueueFullError(ReftEdgeError):
    """As many requests wait as the engine lets wait; try again later."""


class ClosingError(ReftEdgeError):
    """The engine takes no more requests."""


class Ticket(Iterator[Piece]):
    """A request under way. Iterate for its pieces, from any thread, unless they are delivered elsewhere."""

    def __init__(self, engine: "Engine", row: Row, pieces: "queue.SimpleQueue[Piece]") -> None:
        self._engine, self._row, self._pieces = engine, row, pieces
        self._over = False
        self.prompt_tokens = len(row.request.ids)

    @property
    def tokens(self) -> list[int]:
        """Generated token ids so far, the end-of-sequence token left out."""
        return self._row.tokens

    @property
    def finish_reason(self) -> str | None:
        """As a `Generation`'s; None while it runs."""
        return self._row.finish_reason

    def cancel(self) -> None:
        """Give up; the slot is free before the next step."""
        self._row.cancelled = True
        self._engine.wake()

    def __next__(self) -> Piece:
        if self._over:
            raise StopIteration
        piece = self._pieces.get()
        self._over = piece.finish_reason is not None
        return piece


class Engine:
    """Runs requests together, each with its own adapters, sampling and stop rules.

    >>> from reft_edge.runtime import Request
    >>> model = reft_edge.SteeredModel("smol")
    >>> name = model.load_adapter("pirate.safetensors")
    >>> engine = reft_edge.Engine(model)
    >>> tickets = [
    ...     engine.submit(Request(tuple(model.encode("Who are you?", chosen)), chosen, max_tokens=8))
    ...     for chosen in ({}, {name: 1.0})
    ... ]
    >>> answers = ["".join(piece.text for piece in ticket) for ticket in tickets]
    >>> engine.close()
    """

    def __init__(
        self,
        model: SteeredModel,
        slots: int = 8,
        queue_limit: int = 64,
        prefix_budget: int | None = None,
        cache_budget: int | None = None,
        prompt_cache: Path | str | None = None,
        prompt_cache_size: int = BUDGET,
        speculate: bool | None = None,
    ) -> None:
        """`slots`: requests that run at once; `queue_limit`: requests that may wait; `prefix_budget`: bytes of prompts
        to remember, none: a sixth of `cache_budget`; `cache_budget`: bytes of keys and values of all that run. Where
        these have no room together, some wait; none: they have as much as they need. `prompt_cache`: a folder that keeps
        long prompts for the next start, at most `prompt_cache_size` bytes. `speculate`: as for `SteeredModel.batch`. Raises
        ReftEdgeError for a folder that cannot be used."""
        if prefix_budget is None:
            prefix_budget = (cache_budget or usual_budget(model.graph)) // PREFIX_SHARE
        self.batch = model.batch(slots, prefix_budget, cache_budget, speculate)
        self._files = None
        if prompt_cache is not None:
            self._files = open_prompts(
                Path(prompt_cache), model.folder, model.manifest, model.graph, prompt_cache_size
            )
            self.batch.prefixes.files = self._files
        self._arrived: deque[Row] = deque()
        self._model, self._queue_limit = model, queue_limit
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._thread = threading.Thread(target=self._run, name="reft-edge engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self.batch.running

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self.batch.waiting) + len(self._arrived)

    def submit(self, request: Request, deliver: Callable[[Piece], None] | None = None) -> Ticket:
        """Queue a request. `deliver` is called with each piece, in the engine's thread; without it, iterate the ticket.

        Raises QueueFullError, or ReftEdgeError for a request that cannot run or an engine that is closing.
        """
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        with self._changed:
            self._check_room()  # before the work that a row is
        row = self._model.row(request, deliver or pieces.put, self.batch.room)
        if self._files is not None:
            self.batch.prefixes.fetch(request.ids, row.bound.edit)
        with self._changed:
            self._check_room()
            self._arrived.append(row)
            self._changed.notify()
        return Ticket(self, row, pieces)

    def _check_room(self) -> None:
        if self._closing is not None:
            raise ClosingError("the engine is closing and takes no more requests")
        if self.waiting >= self._queue_limit:
            raise QueueFullError(f"{self.waiting} requests are waiting already; try again later")

    def wake(self) -> None:
        """Look at cancelled requests now."""
        with self._changed:
            self._changed.notify()

    def close(self, timeout: float | None = 0) -> None:
        """Take no more requests; let those under way finish for `timeout` seconds (None: as long as they need), then
        cancel them."""
        with self._changed:
            self._closing = float("inf") if timeout is None else time.monotonic() + timeout
            self._changed.notify()
        self._thread.join()
        if self._files is not None:
            self._files.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self.batch.idle and not self._arrived and self._closing is None:
                    self._changed.wait()
                while self._arrived:
                    self.batch.add(self._arrived.popleft())
                over = self._closing is not None and (self.batch.idle or time.monotonic() >= self._closing)
                if over:
                    self.batch.abort("cancelled")
                    return
            try:
                self.batch.step()
            except BaseException as error:  # whatever it is, nobody may wait for ever
                self.batch.abort("error", as_reason(error))
