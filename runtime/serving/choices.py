"""One request's choices on their way through the engine, and the answer that is made of them."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.constraints import Constraint
from reft_edge.runtime.engine import Ticket
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.request import Piece
from reft_edge.runtime.request import Request as EngineRequest
from reft_edge.runtime.serving.answers import AnswerForm
from reft_edge.runtime.serving.errors import CLIENT_LEFT, ApiError, as_api_error, row_error
from reft_edge.runtime.serving.guard import Metrics
from reft_edge.runtime.serving.openai_api import Generate
from reft_edge.runtime.serving.served import Decoder

_PATIENCE = 0.25
"""Seconds between looks at whether a client that waits for a whole answer is still there."""


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts are tokens."""

    prompts: Sequence[Sequence[int]]
    answer: AnswerForm
    constraint: Constraint | None = None
    shown: tuple[str, ...] = ()
    """Special tokens whose text the answer's form needs."""
    only_prompts: bool = False
    """Whether nothing is to be generated."""


async def answer_request(
    served: Decoder,
    metrics: Metrics,
    request: Request,
    body: Generate,
    prepare: Callable[[dict[str, float]], Prepared],
    max_tokens: int | None,
    logprobs: int | None,
) -> Response:
    """Answer every choice of every prompt, with all pieces as they come or with the whole.

    `prepare`: run in a thread, with the adapters that are held.
    """
    if body.n > served.settings.max_inputs:
        raise too_many(body.n, served.settings.max_inputs)
    async with AsyncExitStack() as stack:
        adapters = await stack.enter_async_context(served.holding(_mix(served, body)))
        prepared = await served.work(_prepared, served.model, body, prepare, adapters)
        context = served.model.manifest.context_length
        requests = [
            EngineRequest(
                tuple(ids),
                adapters,
                max_tokens or context - len(ids),
                tuple(body.stop),
                body.sampling(choice),
                logprobs,
                prepared.constraint,
                prepared.shown,
            )
            for ids in prepared.prompts
            for choice in range(body.n)
        ]
        choices = stack.enter_context(closing(_Choices(served, requests, metrics, prepared.only_prompts)))
        prompt_tokens = sum(map(len, prepared.prompts))
        metrics.prompt_tokens.inc(prompt_tokens)
        await choices.feed()
        if body.stream:
            return _Stream(_stream(choices, prepared.answer, prompt_tokens), stack.pop_all())
        whole: list[list[Piece]] = [[] for _ in requests]

        async def collect() -> None:
            async for index, piece in choices.pieces():
                whole[index].append(piece)

        await _while_connected(collect(), request)

        content = await served.work(_written, prepared.answer, whole, prompt_tokens, choices.tokens)
    return Response(content, media_type="application/json")


def _mix(served: Decoder, body: Generate) -> dict[str, float]:
    """The adapters that a request asks for, with their scales."""
    named = served.adapter_of(body.model)
    if named is not None and body.adapters is not None:
        raise ApiError(
            400,
            f"model {body.model[:200]!r} names an adapter, and `adapters` others; name the base, {served.settings.name!r}",
        )
    return {named: 1.0} if named is not None else dict(body.adapters or {})


def _prepared(
    model: SteeredModel,
    body: Generate,
    prepare: Callable[[dict[str, float]], Prepared],
    adapters: dict[str, float],
) -> Prepared:
    prepared = prepare(adapters)
    if body.logit_bias and max(body.logit_bias) >= model.prompts.token_limit:
        last = model.prompts.token_limit - 1
        raise ApiError(400, f"logit_bias: a token id is not from 0 to {last}", param="logit_bias")
    return prepared


def too_many(count: int, most: int) -> ApiError:
    """The refusal of a request for more choices than are allowed."""
    return ApiError(400, f"{count} choices were asked for; at most {most} are allowed")


class _Choices:
    """One request's choices. The engine has few of them at a time, so that other requests' come between them."""

    def __init__(
        self, served: Decoder, requests: Sequence[EngineRequest], metrics: Metrics, only_prompts: bool
    ) -> None:
        self._served, self._metrics = served, metrics
        self._left = deque(enumerate(requests))
        self._running = 0
        self._tickets: list[Ticket] = []
        self._closed = False
        self._started = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._pieces = asyncio.Queue[tuple[int, Piece]]()
        if only_prompts:
            self._running = len(self._left)
            self._left.clear()
            for index in range(self._running):
                self._pieces.put_nowait((index, Piece("", finish_reason="length")))

    @property
    def tokens(self) -> int:
        """Generated so far, of all choices."""
        return sum(len(ticket.tokens) for ticket in self._tickets)

    async def feed(self) -> None:
        """Submit as many as may run now. Raises ReftEdgeError for one that cannot."""
        while self._left and self._running < self._served.together:
            index, request = self._left.popleft()
            self._running += 1
            submitted = self._served.work(self._served.engine.submit, request, self._deliver_to(index))
            submitted.add_done_callback(self._keep)
            await asyncio.shield(submitted)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """All choices' pieces, until every choice has ended."""
        first = True
        while self._running:
            index, piece = await self._pieces.get()
            if first:
                self._metrics.first.observe(time.perf_counter() - self._started)
                first = False
            if piece.finish_reason is not None:
                self._running -= 1
                await self.feed()
            yield index, piece

    def close(self) -> None:
        """Cancel what is still under way."""
        self._closed = True
        for ticket in self._tickets:
            _cancel(ticket)
        self._metrics.tokens.inc(self.tokens)
        self._metrics.seconds.observe(time.perf_counter() - self._started)

    def _deliver_to(self, index: int) -> Callable[[Piece], None]:
        def deliver(piece: Piece) -> None:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return deliver

    def _keep(self, submitted: "asyncio.Future[Ticket]") -> None:
        if submitted.cancelled() or submitted.exception() is not None:
            return
        self._tickets.append(submitted.result())
        if self._closed:
            _cancel(submitted.result())


def _cancel(ticket: Ticket) -> None:
    if ticket.finish_reason is None:
        ticket.cancel()


def _written(answer: AnswerForm, whole: Sequence[Sequence[Piece]], prompt_tokens: int, tokens: int) -> bytes:
    """The body of an answer that does not stream. Raises ReftEdgeError if a choice failed."""
    for parts in whole:
        if failure := _failure(parts[-1]):
            raise failure
    found = answer.whole(whole, prompt_tokens, tokens)
    return json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


def _failure(piece: Piece) -> ApiError | None:
    """What went wrong with a choice, by its last piece."""
    if piece.error is not None:
        return row_error(piece.error)
    if piece.finish_reason == "cancelled":
        return ApiError(503, "the server is closing", "closing")
    return None


class _Stream(StreamingResponse):
    """Events; what they come from is let go with the response, however it ends."""

    def __init__(self, lines: AsyncIterator[str], stack: AsyncExitStack) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _stream(choices: _Choices, answer: AnswerForm, prompt_tokens: int) -> AsyncIterator[str]:
    try:
        for line in answer.begin():
            yield line
        async for index, piece in choices.pieces():
            if failure := _failure(piece):
                raise failure
            for line in answer.take(index, piece):
                yield line
    except ReftEdgeError as error:
        for line in answer.failed(as_api_error(error)):
            yield line
        return
    for line in answer.end(prompt_tokens, choices.tokens):
        yield line


async def _while_connected(work: Awaitable[None], request: Request) -> None:
    """Wait for work, and give it up when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=_PATIENCE))[0]:
            if await request.is_disconnected():
                raise ApiError(CLIENT_LEFT, "the client went away")
        task.result()
    finally:
        task.cancel()
