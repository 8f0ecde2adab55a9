"""Continuous batching: requests join and leave a running batch between decode steps, each with its own adapters.

Every step of a `Batch` runs at most one chunk of one waiting prompt, then one token of every decoding row, so that
running rows keep flowing while prompts are prefilled. Where it is faster, each decoding row runs by itself instead, with
tokens that are guessed to come next. Row i of the KV cache is the i-th decoding row; the prompt being
prefilled is in the row after them.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.logprobs import TokenScore
from reft_edge.runtime.next_piece import next_piece
from reft_edge.runtime.prefix import Prefix, PrefixCache, Ran
from reft_edge.runtime.request import Piece, Row, as_reason
from reft_edge.runtime.room import SPARE, tokens_in
from reft_edge.runtime.rows import (
    ALIGNMENT,
    BoundRows,
    JoinedRows,
    RowInTurn,
    RowsInTurn,
    RowsTogether,
    SeparateRows,
    part_end,
)
from reft_edge.runtime.session import PREFILL_CHUNK, GraphSession, Logits
from reft_edge.runtime.speculation import Speculation, StepCosts, take_guessed

_CHUNK_BESIDE_OTHERS = 128
"""Tokens of a prompt that run between two decode steps of others."""
_WORTH_A_RUN = 4
"""Known tokens of a row that run by themselves; fewer run one by one beside other rows. The number is the same whether there
are others or not, so that an answer is, too."""


class Batch:
    """The rows that run together. Not thread-safe: `Engine` gives it a thread of its own."""

    def __init__(
        self,
        graph: GraphSession,
        eos_token_ids: Sequence[int],
        slots: int,
        prefix_budget: int,
        cache_budget: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`slots`: rows at most; `prefix_budget`: bytes of prompts to remember; `cache_budget`: bytes of keys and values of
        all rows, none for as many as they need. `speculation`: guesses tokens, which takes a graph that `steps_back`. Raises
        ReftEdgeError for fewer than 1 slot, a graph without a KV cache, or a budget that holds next to nothing."""
        if slots < 1:
            raise ReftEdgeError(f"slots is {slots}; expected 1 or more")
        self._graph, self._eos = graph, eos_token_ids
        graph.check_cache()
        joined = graph.shares_cache and graph.device == "cpu"
        self._cache = JoinedRows(graph, slots) if joined else SeparateRows(graph, slots)
        self.prefixes = PrefixCache(prefix_budget if graph.cuts_cache else 0)
        self.room = None if cache_budget is None else tokens_in(graph, cache_budget)
        """Tokens that all rows may have together; none: as many as they need."""
        self.speculation = speculation
        self._started = 0
        self.waiting: deque[Row] = deque()
        self.decoding: list[Row] = []
        self.prefilling: Row | None = None
        self._left: tuple[Ran, int] | None = None
        """The prompt of the row that left last, and how many of its tokens are still in the first row of the cache."""
        self._bound_decode: tuple[list[tuple[Row, int]], RowsTogether | RowsInTurn] | None = None
        self._bound_prefill: tuple[int, BoundRows | RowInTurn] | None = None
        self._bound_alone: dict[tuple[int, bool], tuple[Row, int, BoundRows | RowInTurn]] = {}

    @property
    def running(self) -> int:
        """Rows that have a slot."""
        return len(self.decoding) + (self.prefilling is not None)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.decoding or self.prefilling)

    def add(self, row: Row) -> None:
        """Queue a row; it starts when a slot is free."""
        self.waiting.append(row)

    def step(self) -> None:
        """Drop what was cancelled, run one chunk of a prompt, and one token of every row that was decoding before.

        Whatever a row raises ends that row, and no other.
        """
        decoding = bool(self.decoding)
        self._drop_cancelled()
        if self.prefilling is None and self._can_start():
            self._started += 1
            self.prefilling = self.waiting.popleft()
            self.prefilling.started = self._started
        if self.prefilling is not None:
            self._prefill(self.prefilling)
        if decoding and self.decoding:
            self._decode()
        if not self.running:
            self._unbind()
            if self._left is None:
                self._cache.clear()

    def _can_start(self) -> bool:
        """Whether the first that waits can have a slot, and room for a while beside those that run."""
        if not self.waiting or len(self.decoding) >= self._cache.rows:
            return False
        if self.room is None or not self.decoding:
            return True
        rows, first = [*self.decoding, self.waiting[0]], self.waiting[0]
        return sum(self._needs(rows)) + min(SPARE, first.most - first.need) <= self.room

    def _needs(self, rows: Sequence[Row]) -> list[int]:
        return [row.need if self._cache.grows else row.most for row in rows]

    def abort(self, reason: str, error: ReftEdgeError | None = None) -> None:
        """End every row with this finish_reason."""
        rows = [*self._running(), *self.waiting]
        self.decoding, self.prefilling = [], None
        self.waiting.clear()
        self._unbind()
        self._left = None
        self._cache.clear()
        for row in rows:
            _end(row, reason, error=error)

    def _unbind(self) -> None:
        self._bound_decode = self._bound_prefill = None
        self._bound_alone = {}

    def _drop_cancelled(self) -> None:
        for row in [row for row in self.waiting if row.cancelled]:
            self.waiting.remove(row)
            _end(row, "cancelled")
        if self.prefilling is not None and self.prefilling.cancelled:
            self._end_prefilling(self.prefilling, "cancelled")
        for row in [row for row in self.decoding if row.cancelled]:
            self._leave(row)
            _end(row, "cancelled")

    def _prefill(self, row: Row) -> None:
        try:
            logits = self._run_part(row)
        except Exception as error:
            self._end_prefilling(row, "error", as_reason(error))
            return
        if logits is None:
            return
        self.prefilling = self._bound_prefill = None
        self.decoding.append(row)
        goes_on = bool(row.tokens) or self._take(row, logits)
        self._remember(row)
        if not goes_on:
            self._leave(row)

    def _run_part(self, row: Row) -> Logits | None:
        """Run one chunk of a row's prompt; the logits `[vocabulary]` behind its last one, else None."""
        slot, ids = len(self.decoding), row.request.ids
        if row.length == 0:
            self._begin(slot, row)
        if self._bound_prefill is None or self._bound_prefill[0] != slot:
            ports = {**row.bound.prompt, **self._graph.to_device(row.bound.of_prompt(len(ids)))}
            self._bound_prefill = slot, self._cache.bind_prompt(slot, ports)
        chunk = _CHUNK_BESIDE_OTHERS if self.decoding else PREFILL_CHUNK
        end = part_end(row.length, len(ids), chunk)
        logits = self._bound_prefill[1].step(np.array([ids[row.length : end]], np.int64), [row.length])
        row.length = end
        return logits[0] if end == len(ids) else None

    def _begin(self, slot: int, row: Row) -> None:
        """Make room for a row, and take over what is known of its prompt."""
        ids, edit = row.request.ids, row.bound.edit
        (left, tokens), self._left = self._left or (None, 0), None
        held = 0 if left is None else min(left.usable(ids, edit), tokens // ALIGNMENT * ALIGNMENT)
        count, content = self.prefixes.find(ids, edit, held)
        if content is None:
            row.length = count
            self._reserve()
            self._cache.cut(slot, count)
        else:
            self._reserve()
            self._cache.write(slot, content, count)
            row.length = count

    def _end_prefilling(self, row: Row, reason: str, error: ReftEdgeError | None = None) -> None:
        self.prefilling = self._bound_prefill = None
        self._cache.forget(len(self.decoding))
        _end(row, reason, error=error)

    def _remember(self, row: Row) -> None:
        """Keep a prompt for those that begin alike, where there is memory for it."""
        ids = row.request.ids
        if self.prefixes.wants(ids, row.bound.edit, len(ids) * self._graph.token_bytes):
            with suppress(MemoryError):
                content = self._cache.read(len(self.decoding) - 1, len(ids))
                self.prefixes.add(Prefix(ids, row.bound.edit, content))

    def _decode(self) -> None:
        self._step_back()
        self._make_room()
        if known := [row for row in self.decoding if row.behind == row.together >= _WORTH_A_RUN]:
            for row in known:
                self._run_known(row)
            self._step_back()
            self._make_room()
        if not self.decoding:
            return
        rows = list(self.decoding)
        if self.speculation is not None and self._guesses(self.speculation):
            for row in rows:
                self._run_ahead(row, self.speculation.costs)
            return
        ids = np.array([[row.tokens[-row.behind]] for row in rows], np.int64)
        beside = self.prefilling.length if self.prefilling is not None else 0
        phases = [(row, row.phase) for row in rows]
        if self._bound_decode is None or self._bound_decode[0] != phases:
            self._bound_decode = phases, self._cache.bind_decode([row.edit for row in rows])
        started = time.perf_counter()
        outcomes = self._bound_decode[1].step(ids, [*(row.length for row in rows), beside])
        if self.speculation is not None:
            self.speculation.costs.ran_together(len(rows), time.perf_counter() - started)
        for row, outcome in zip(rows, outcomes, strict=True):
            row.length += not isinstance(outcome, Exception)
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _end(row, "error", error=as_reason(outcome))
                self._leave(row)
            elif not row.behind and not self._take(row, outcome):
                self._leave(row)

    def _step_back(self) -> None:
        """Where the rows have no room together, those that started last wait, and then run their tokens again."""
        while self.room is not None and self.running > 1 and sum(self._needs(self._running())) > self.room:
            last = max(self._running(), key=lambda row: row.started)
            if last is self.prefilling:
                self.prefilling = self._bound_prefill = None
                self._cache.forget(len(self.decoding))
            else:
                self._leave(last)
            last.length = 0
            self.waiting.appendleft(last)

    def _running(self) -> list[Row]:
        return [*self.decoding, *([self.prefilling] if self.prefilling else [])]

    def _run_known(self, row: Row) -> None:
        """Run all tokens of a row that are known, and choose the next."""
        try:
            slot = self.decoding.index(row)
            while row.behind:
                ids = row.tokens[-row.behind :][: row.alike]
                logits = self._cache.bind_tokens(slot, row.edit).step(np.array([ids], np.int64), [row.length])
                row.length += len(ids)
        except Exception as error:
            _end(row, "error", error=as_reason(error))
            self._leave(row)
            return
        if not self._take(row, logits[0]):
            self._leave(row)

    def _guesses(self, speculation: Speculation) -> bool:
        """Guess what the rows' next tokens are; whether they are to run with them, for which there is room then."""
        room = None if self.room is None else self.room - sum(self._needs(self._running()))
        if not speculation.guess(self.decoding, room):
            return False
        try:
            self._reserve()
        except Exception:
            for row in self.decoding:
                row.guesses = []
            return False
        return True

    def _run_ahead(self, row: Row, costs: StepCosts) -> None:
        """Run a row's last token and the guesses behind it, and choose as many tokens as were guessed rightly, and the next."""
        guesses, row.guesses = row.guesses, []
        slot = self.decoding.index(row)
        behind = [*self._running(), None][slot + 1]
        try:
            started = time.perf_counter()
            bound = self._bind_alone(slot, row, bool(guesses))
            ids = np.array([[row.tokens[-1], *guesses]], np.int64)
            logits = bound.step_all(ids, [row.length, behind.length if behind else 0])[0]
            costs.ran_alone(ids.shape[1], time.perf_counter() - started)
        except Exception as error:
            _end(row, "error", error=as_reason(error))
            self._leave(row)
            return
        if take_guessed(row, guesses, logits, self._take):
            self._cache.cut(slot, row.length)
        else:
            self._leave(row)

    def _bind_alone(self, slot: int, row: Row, several: bool) -> BoundRows | RowInTurn:
        """A decoding row by itself, for one token a step or for several."""
        held = self._bound_alone.get((slot, several))
        if held is not None and held[0] is row and held[1] == row.phase:
            return held[2]
        bind = self._cache.bind_tokens if several else self._cache.bind_alone
        bound = bind(slot, row.edit)
        self._bound_alone[slot, several] = row, row.phase, bound
        return bound

    def _make_room(self) -> None:
        """Room for one more token of every decoding row; where there is none, the longest rows end."""
        while self.decoding:
            try:
                self._reserve()
            except Exception as error:
                longest = max(self.decoding, key=lambda row: row.length)
                self._leave(longest)
                _end(longest, "error", error=as_reason(error))
            else:
                return

    def _reserve(self) -> None:
        """Room for what the rows need now. Raises ReftEdgeError if there is no memory; then nothing changed."""
        rows = self._running()
        needs = self._needs(rows)
        if not self._cache.fits(needs):
            self._unbind()
            self._cache.reserve(needs, [row.length for row in rows])

    def _take(self, row: Row, logits: Logits) -> bool:
        """Choose a row's next token and deliver what it brings; whether the row goes on."""
        try:
            piece = next_piece(row, logits, self._eos)
        except Exception as error:
            _end(row, "error", error=as_reason(error))
            return False
        if piece.finish_reason is not None:
            _end(row, piece.finish_reason, piece.text, piece.tokens)
            return False
        if piece.text or piece.tokens:
            _deliver(row, piece)
        return True

    def _leave(self, row: Row) -> None:
        """Free a row's slot: the last decoding row takes its place, and the row after that moves up."""
        index, last = self.decoding.index(row), len(self.decoding) - 1
        if index != last:
            self.decoding[index] = self.decoding[last]
            self._cache.move(last, index, self.decoding[last].length)
        self.decoding.pop()
        if self.prefilling is not None:
            self._cache.move(last + 1, last, self.prefilling.length)
            last += 1
        if last or not self._stays(row):
            self._cache.forget(last)

    def _stays(self, row: Row) -> bool:
        """Whether the prompt of the last row that ran stays in the cache, where the next may begin alike."""
        if not self.prefixes.budget:
            return False
        tokens = self._cache.keep(len(row.request.ids))
        self._left = (Ran(row.request.ids, row.bound.edit), tokens) if tokens >= ALIGNMENT else None
        return self._left is not None


def _end(
    row: Row,
    reason: str,
    text: str = "",
    tokens: Sequence[TokenScore] = (),
    error: ReftEdgeError | None = None,
) -> None:
    row.finish_reason = reason
    _deliver(row, Piece(text, tuple(tokens), reason, error))


def _deliver(row: Row, piece: Piece) -> None:
    """A reader that fails loses its own request only."""
    try:
        row.deliver(piece)
    except Exception:
        row.cancelled = True
