"""Continuous batching: requests join and leave a running batch between decode steps, each with its own adapters.

Every step of a `Batch` runs at most one chunk of one waiting prompt, then one token of every row that is decoding, so that
running rows keep flowing while prompts are prefilled. Row i of the KV cache is the i-th decoding row; the prompt being
prefilled is in the row after them.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.binding import Bound, DecodeEdit, decode_edit
from reft_edge.runtime.prefix import Prefix, PrefixCache
from reft_edge.runtime.rows import BoundRows, JoinedRows, RowsInTurn, SeparateRows
from reft_edge.runtime.sampling import Sampler, Sampling
from reft_edge.runtime.session import PREFILL_CHUNK, GraphSession, Logits
from reft_edge.runtime.text import TextStream

_CHUNK_BESIDE_OTHERS = 128
"""Tokens of a prompt that run between two decode steps of others."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    ids: tuple[int, ...]
    """The prompt's tokens."""
    adapters: Mapping[str, float] = field(default_factory=dict)
    """Loaded adapters by name, with their scales."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are left out of it."""
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """None for none; else each token's log-probability, and those of this many likeliest tokens."""


@dataclass(frozen=True)
class TokenScore:
    """A generated token's natural log-probability, before sampling changed it, and the likeliest tokens' beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What an answer gained; the last piece of an answer has a finish_reason."""

    text: str
    tokens: tuple[TokenScore, ...] = ()
    """Where log-probabilities were asked for."""
    finish_reason: str | None = None
    """`stop` (end of sequence or a stop string), `length`, `cancelled` or `error`."""
    error: str | None = None


class Row:
    """A request on its way through a batch."""

    def __init__(
        self,
        request: Request,
        bound: Bound,
        context: int,
        tokenizer: Tokenizer,
        deliver: Callable[[Piece], None],
    ) -> None:
        """`context`: the model's, in tokens. Raises ReftEdgeError for an empty prompt, or one that fills the context."""
        if not request.ids:
            raise ReftEdgeError("the prompt is empty; give at least one token")
        self.request, self.deliver = request, deliver
        self.bound = bound
        self.decode: DecodeEdit = decode_edit(bound.edit) if bound.edit is not None else {}
        self.limit = answer_limit(len(request.ids), request.max_tokens, context)
        self.sampler = Sampler(request.sampling, request.ids)
        self.text = TextStream(tokenizer, request.stop)
        self.length = 0
        """Tokens in the KV cache."""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.cancelled = False


def answer_limit(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """Most tokens that an answer can have. Raises ReftEdgeError for a prompt that fills the context, or no tokens asked for."""
    if max_tokens < 1:
        raise ReftEdgeError(f"max_tokens is {max_tokens}; expected 1 or more")
    if prompt_tokens >= context:
        raise ReftEdgeError(
            f"the prompt has {prompt_tokens} tokens; this model's context is {context}: shorten it"
        )
    return min(max_tokens, context - prompt_tokens)


class Batch:
    """The rows that run together. Not thread-safe: `Engine` gives it a thread of its own."""

    def __init__(
        self, graph: GraphSession, eos_token_ids: Sequence[int], slots: int, prefix_budget: int
    ) -> None:
        """`slots`: rows at most; `prefix_budget`: bytes of prompts to remember. Raises ReftEdgeError for fewer than 1 slot,
        or a graph without a KV cache."""
        if slots < 1:
            raise ReftEdgeError(f"slots is {slots}; expected 1 or more")
        self._graph, self._eos = graph, eos_token_ids
        graph.check_cache()
        joined = graph.shares_cache and graph.device == "cpu"
        self._cache = JoinedRows(graph, slots) if joined else SeparateRows(graph, slots)
        self.prefixes = PrefixCache(prefix_budget if graph.cache_in_numpy else 0)
        self.waiting: deque[Row] = deque()
        self.decoding: list[Row] = []
        self.prefilling: Row | None = None
        self._bound_decode: tuple[list[Row], BoundRows | RowsInTurn] | None = None
        self._bound_prefill: tuple[int, BoundRows | RowsInTurn] | None = None

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
        """Drop what was cancelled, run one chunk of a prompt, and one token of every decoding row."""
        self._drop_cancelled()
        if self.prefilling is None and self.waiting and len(self.decoding) < self._cache.rows:
            self._start(self.waiting.popleft())
        if self.prefilling is not None:
            self._prefill(self.prefilling)
        if self.decoding:
            self._decode()

    def abort(self, reason: str, error: str | None = None) -> None:
        """End every row with this finish_reason."""
        rows = [*self.decoding, *([self.prefilling] if self.prefilling else []), *self.waiting]
        self.decoding, self.prefilling = [], None
        self._bound_decode = self._bound_prefill = None
        self.waiting.clear()
        for row in rows:
            _end(row, reason, error=error)

    def _drop_cancelled(self) -> None:
        for row in [row for row in self.waiting if row.cancelled]:
            self.waiting.remove(row)
            _end(row, "cancelled")
        if self.prefilling is not None and self.prefilling.cancelled:
            _end(self.prefilling, "cancelled")
            self.prefilling = self._bound_prefill = None
        for row in [row for row in self.decoding if row.cancelled]:
            self._leave(row)
            _end(row, "cancelled")

    def _start(self, row: Row) -> None:
        self.prefilling = row
        slot = len(self.decoding)
        if self._cache.start(slot, len(row.request.ids) + row.limit):
            self._bound_decode = None
        row.length, content = self.prefixes.find(row.request.ids, row.bound.edit)
        if content is not None:
            self._cache.write(slot, content, row.length)

    def _prefill(self, row: Row) -> None:
        slot, ids = len(self.decoding), row.request.ids
        if self._bound_prefill is None or self._bound_prefill[0] != slot:
            length = self._graph.to_device({"reft.prompt_len": np.array([len(ids)], np.int64)})
            self._bound_prefill = slot, self._cache.bind_prompt(slot, {**row.bound.prompt, **length})
        chunk = _CHUNK_BESIDE_OTHERS if self.decoding else PREFILL_CHUNK
        part = ids[row.length : row.length + chunk]
        logits = self._bound_prefill[1].step(np.array([part], np.int64), [row.length])
        row.length += len(part)
        if row.length < len(ids):
            return
        self.prefilling = self._bound_prefill = None
        self.decoding.append(row)
        if self.prefixes.budget:
            self.prefixes.add(Prefix(ids, row.bound.edit, self._cache.read(slot, len(ids))))
        if not self._take(row, logits[0]):
            self._leave(row)

    def _decode(self) -> None:
        rows = list(self.decoding)
        if self._bound_decode is None or self._bound_decode[0] != rows:
            self._bound_decode = rows, self._cache.bind_decode([row.decode for row in rows])
        ids = np.array([[row.tokens[-1]] for row in rows], np.int64)
        logits = self._bound_decode[1].step(ids, [row.length for row in rows])
        for row in rows:
            row.length += 1
        for row, scores in zip(rows, logits, strict=True):
            if not self._take(row, scores):
                self._leave(row)

    def _take(self, row: Row, logits: Logits) -> bool:
        """Choose a row's next token and deliver what it brings; whether the row goes on."""
        try:
            token = row.sampler.choose(logits)
        except ValueError as error:
            _end(row, "error", error=f"cannot choose a token: {error}")
            return False
        if token in self._eos:
            _end(row, "stop", row.text.flush())
            return False
        row.tokens.append(token)
        text = row.text.push(token)
        scored = () if row.request.logprobs is None else (score(logits, token, row.request.logprobs),)
        if row.text.stopped:
            _end(row, "stop", text, scored)
            return False
        if len(row.tokens) == row.limit:
            _end(row, "length", text + row.text.flush(), scored)
            return False
        if text or scored:
            row.deliver(Piece(text, scored))
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


def score(logits: Logits, token: int, count: int) -> TokenScore:
    """Natural log-probabilities of a token and of the `count` likeliest, from `logits [vocabulary]`."""
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    top = np.argsort(-logprobs, kind="stable")[:count]
    return TokenScore(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def _end(
    row: Row, reason: str, text: str = "", tokens: Sequence[TokenScore] = (), error: str | None = None
) -> None:
    row.finish_reason = reason
    row.deliver(Piece(text, tuple(tokens), reason, error))
