"""The routes of a model that continues text: prompts in, choices out, whole or as a stream."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, closing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import encode_batch
from reft_edge.runtime.batch import Piece
from reft_edge.runtime.batch import Request as EngineRequest
from reft_edge.runtime.engine import Ticket
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.serving import openai_api as api
from reft_edge.runtime.serving.errors import (
    CLIENT_LEFT,
    ApiError,
    as_api_error,
    error_body,
    row_error,
    too_long,
)
from reft_edge.runtime.serving.guard import Metrics
from reft_edge.runtime.serving.logprobs import ChatScores, CompletionScores, Scores
from reft_edge.runtime.serving.served import Decoder
from reft_edge.runtime.token_bytes import TokenBytes

_FIRST_LOOK = 8
"""Characters for each token of the context; a text that is longer is looked at from its beginning."""
_CUT = 64
"""Tokens that a text's beginning may have more than the whole, where it was cut."""
_PATIENCE = 0.25
"""Seconds between looks at whether a client that waits for a whole answer is still there."""


def add_decoder_routes(app: FastAPI, served: Decoder, metrics: Metrics) -> None:
    """/v1/chat/completions and /v1/completions."""
    model = served.model
    names = TokenBytes(model.prompts.tokenizer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await served.read(request, api.ChatRequest)

        def prompts() -> list[list[int]]:
            if model.prompts.template is None:
                raise ApiError(400, "this model has no chat template; use /v1/completions with a prompt")
            text = model.prompts.render([message.plain() for message in body.messages])
            return _encoded([text], model, special=False, what="messages")

        wanted = body.max_completion_tokens or body.max_tokens
        top = body.top_logprobs if body.logprobs else None
        answer = api.Answer(True, body.model)
        return await _answer(served, metrics, names, request, body, answer, prompts, wanted, top)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await served.read(request, api.CompletionRequest)
        if len(body.prompt) * body.n > served.settings.max_inputs:
            raise _too_many(len(body.prompt) * body.n, served.settings.max_inputs)

        def prompts() -> list[list[int]]:
            return _encoded(body.prompt, model, special=True, what="prompt")

        answer = api.Answer(False, body.model)
        wanted, top = body.max_tokens, body.logprobs
        return await _answer(served, metrics, names, request, body, answer, prompts, wanted, top)

    for path in ("/v1/embeddings", "/v1/classify"):

        @app.post(path)
        async def not_an_encoder() -> None:
            raise ApiError(
                404,
                f"{served.settings.name} continues text; embeddings and labels come from an exported encoder",
            )


def _encoded(
    prompts: Sequence[str | list[int]], model: SteeredModel, special: bool, what: str
) -> list[list[int]]:
    """Each prompt's tokens. Raises ApiError for one that is empty, too long, or not of this model's tokens."""
    context = model.manifest.context_length
    tokenizer = model.prompts.tokenizer
    limit = model.prompts.token_limit
    found = []
    for prompt in prompts:
        ids = _tokens(tokenizer, prompt, special, context, what) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, f"{what}: it is empty; give at least one token", param=what)
        if len(ids) >= context:
            raise too_long(context, len(ids), what)
        if not all(0 <= token < limit for token in ids):
            raise ApiError(400, f"{what}: a token id is not from 0 to {limit - 1}", param=what)
        found.append(ids)
    return found


def _tokens(tokenizer: Tokenizer, text: str, special: bool, context: int, what: str) -> list[int]:
    """As `encode` gives them. Raises ApiError as soon as a beginning of the text is too long."""

    def encoded(part: str) -> list[int]:
        return list(encode_batch(tokenizer, [part], special)[0].ids)

    size = _FIRST_LOOK * context
    while size < len(text):
        if (count := len(encoded(text[:size]))) >= context + _CUT:
            raise too_long(context, f"at least {count - _CUT}", what)
        size *= 4
    return encoded(text)


def _mix(served: Decoder, body: api.Generate) -> dict[str, float]:
    """The adapters that a request asks for, with their scales."""
    named = served.adapter_of(body.model)
    if named is not None and body.adapters is not None:
        raise ApiError(
            400,
            f"model {body.model[:200]!r} names an adapter, and `adapters` others; name the base, {served.settings.name!r}",
        )
    return {named: 1.0} if named is not None else dict(body.adapters or {})


def _check_bias(body: api.Generate, model: SteeredModel) -> None:
    limit = model.prompts.token_limit
    if body.logit_bias and max(body.logit_bias) >= limit:
        raise ApiError(400, f"logit_bias: a token id is not from 0 to {limit - 1}", param="logit_bias")


def _too_many(count: int, most: int) -> ApiError:
    return ApiError(400, f"{count} choices were asked for; at most {most} are allowed")


async def _answer(
    served: Decoder,
    metrics: Metrics,
    names: TokenBytes,
    request: Request,
    body: api.Generate,
    answer: api.Answer,
    encode: Callable[[], list[list[int]]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Response:
    """Answer every choice of every prompt, with all pieces as they come or with the whole."""
    if body.n > served.settings.max_inputs:
        raise _too_many(body.n, served.settings.max_inputs)
    async with AsyncExitStack() as stack:
        adapters = await stack.enter_async_context(served.holding(_mix(served, body)))
        prompts = await served.work(encode)
        _check_bias(body, served.model)
        context = served.model.manifest.context_length
        requests = [
            EngineRequest(
                tuple(ids),
                adapters,
                max_tokens or context - len(ids),
                tuple(body.stop),
                body.sampling(choice),
                logprobs,
                body.constraint,
            )
            for ids in prompts
            for choice in range(body.n)
        ]
        choices = stack.enter_context(closing(_Choices(served, requests, metrics)))
        metrics.prompt_tokens.inc(sum(map(len, prompts)))
        usage = _Usage(sum(map(len, prompts)), choices)
        scores: list[Scores] | None = None
        if logprobs is not None:
            scores = [(ChatScores if answer.chat else CompletionScores)(names) for _ in requests]
        await choices.feed()
        if body.stream:
            lines = _stream(choices, answer, scores, usage, body.stream_options)
            return _Stream(lines, stack.pop_all())
        whole: list[list[Piece]] = [[] for _ in requests]

        async def collect() -> None:
            async for index, piece in choices.pieces():
                whole[index].append(piece)

        await _while_connected(collect(), request)
        content = await served.work(_whole, answer, whole, scores, usage)
    return Response(content, media_type="application/json")


class _Choices:
    """One request's choices. The engine has few of them at a time, so that other requests' come between them."""

    def __init__(self, served: Decoder, requests: Sequence[EngineRequest], metrics: Metrics) -> None:
        self._served, self._metrics = served, metrics
        self._left = deque(enumerate(requests))
        self._running = 0
        self._tickets: list[Ticket] = []
        self._closed = False
        self._started = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._pieces = asyncio.Queue[tuple[int, Piece]]()

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


class _Usage:
    def __init__(self, prompt_tokens: int, choices: _Choices) -> None:
        self._prompt_tokens, self._choices = prompt_tokens, choices

    def counts(self) -> dict[str, int]:
        return api.usage(self._prompt_tokens, self._choices.tokens)


def _whole(
    answer: api.Answer, whole: Sequence[Sequence[Piece]], scores: Sequence[Scores] | None, usage: _Usage
) -> bytes:
    """The body of an answer that does not stream. Raises ReftEdgeError if a choice failed."""
    choices = []
    for index, parts in enumerate(whole):
        last = parts[-1]
        if failure := _failure(last):
            raise failure
        text = "".join(part.text for part in parts)
        logprobs = None
        if scores is not None:
            found = [score for part in parts for score in part.tokens]
            logprobs = scores[index].take(found, text, last=True) or scores[index].nothing
        choices.append(answer.choice(index, text, last.finish_reason, logprobs))
    return json.dumps(answer.whole(choices, usage.counts()), ensure_ascii=False, allow_nan=False).encode()


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


async def _stream(
    choices: _Choices,
    answer: api.Answer,
    scores: Sequence[Scores] | None,
    usage: _Usage,
    options: api.StreamOptions | None,
) -> AsyncIterator[str]:
    wants_usage = options is not None and options.include_usage
    extra: dict[str, Any] = {"usage": None} if wants_usage else {}
    begun: set[int] = set()
    try:
        async for index, piece in choices.pieces():
            if failure := _failure(piece):
                raise failure
            last = piece.finish_reason is not None
            logprobs = scores[index].take(piece.tokens, piece.text, last) if scores is not None else None
            for change in _changes(answer, index, piece, logprobs, index not in begun):
                yield _event({**answer.chunk([change]), **extra})
            begun.add(index)
    except ReftEdgeError as error:
        yield _event(error_body(as_api_error(error)))
        return
    if wants_usage:
        yield _event({**answer.chunk([]), "usage": usage.counts()})
    yield "data: [DONE]\n\n"


def _changes(
    answer: api.Answer, index: int, piece: Piece, logprobs: Any, first: bool
) -> list[dict[str, Any]]:
    """What one piece adds to a choice, each an event of its own: the end of a chat choice brings no text."""
    if not answer.chat or piece.finish_reason is None:
        return [answer.delta(index, piece.text, piece.finish_reason, logprobs, first)]
    changes = []
    if piece.text or logprobs or first:
        changes.append(answer.delta(index, piece.text, None, logprobs, first))
    return [*changes, answer.delta(index, "", piece.finish_reason, None, False)]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


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
