"""A local server with OpenAI's API: one exported folder, and a model name for the base and for each adapter."""

import asyncio
import base64
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_edge.errors import ReftEdgeError, SignatureError
from reft_edge.manifest import load_manifest
from reft_edge.runtime import openai_api as api
from reft_edge.runtime.batch import Piece
from reft_edge.runtime.batch import Request as EngineRequest
from reft_edge.runtime.encoder import SteeredEncoder
from reft_edge.runtime.engine import ClosingError, Engine, QueueFullError, Ticket
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.store import BUDGET, AdapterStore, UnknownAdapterError
from reft_edge.signing import TrustedKeys

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_log = logging.getLogger(__name__)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PATIENCE = 0.25
"""Seconds between looks at whether a client that waits for a whole answer is still there."""


@dataclass(frozen=True)
class ServerSettings:
    """What `reft-edge serve` can be told."""

    name: str
    """Of the base in /v1/models; adapters are NAME:adapter."""
    slots: int = 8
    """Requests that run at once."""
    queue_limit: int = 64
    """Requests that may wait."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_inputs: int = 256
    """Texts in one request to an encoder, and prompts times choices in one to a decoder."""
    api_key: str | None = None
    """What clients must send as a bearer token."""
    hosts: tuple[str, ...] = LOOPBACK
    """Values of the Host header that are answered, against DNS rebinding; `*` for any."""
    cors_origins: tuple[str, ...] = ()
    shutdown_seconds: float = 10.0
    """How long running requests may go on after the server was told to stop."""
    adapter_budget: int = BUDGET
    """Bytes of adapter weights in memory."""
    trusted: TrustedKeys | None = None
    """Only adapters that one of these keys signed are used."""


class ApiError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "reft_edge_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("reft_edge_prompt_tokens", "Prompt tokens", registry=registry)
        self.tokens = Counter("reft_edge_generated_tokens", "Generated tokens", registry=registry)
        self.first = Histogram(
            "reft_edge_time_to_first_token_seconds",
            "From request to first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "reft_edge_request_seconds", "From request to answer", buckets=_SECONDS, registry=registry
        )
        self.running = Gauge("reft_edge_running_requests", "Requests that have a slot", registry=registry)
        self.waiting = Gauge("reft_edge_waiting_requests", "Requests that wait for a slot", registry=registry)
        self.loaded = Gauge("reft_edge_loaded_adapters", "Adapters in memory", registry=registry)


def create_app(
    folder: Path,
    adapters: Path | None,
    settings: ServerSettings,
    device: str = "auto",
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> FastAPI:
    """The server for an exported folder. `adapters`: a folder of adapter files; `provider_options`: of ONNX Runtime's CUDA
    provider, for a decoder. Raises ReftEdgeError if the model cannot be loaded."""
    manifest = load_manifest(folder)
    served: _Decoder | _Encoder
    if manifest.kind == "encoder":
        if provider_options:
            raise ReftEdgeError("provider options are for decoders; this folder holds an encoder")
        served = _Encoder(SteeredEncoder(folder, device, threads, settings.trusted), adapters, settings)
    else:
        served = _Decoder(
            SteeredModel(folder, device, threads, settings.trusted, provider_options), adapters, settings
        )
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.close, settings.shutdown_seconds)

    app = FastAPI(title="reft-edge", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_common_routes(app, served, settings, metrics)
    if isinstance(served, _Encoder):
        _add_encoder_routes(app, served)
    else:
        _add_decoder_routes(app, served, metrics)
    app.add_middleware(_Guard, settings=settings, metrics=metrics)
    if "*" not in settings.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*settings.hosts])
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


class _Served:
    """One model with its folder of adapters."""

    def __init__(
        self, model: SteeredModel | SteeredEncoder, adapters: Path | None, settings: ServerSettings
    ) -> None:
        self.settings = settings
        self.store = AdapterStore(model, adapters, settings.adapter_budget) if adapters else None

    def models(self) -> list[str]:
        names = self.store.names() if self.store else []
        return [self.settings.name, *(f"{self.settings.name}:{name}" for name in names)]

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model's name stands for; None for the base. Raises ApiError 404 for other models' names."""
        base, colon, adapter = model.partition(":")
        if base != self.settings.name or (colon and not adapter):
            raise ApiError(404, f"there is no model {model!r}; GET /v1/models lists them", "model_not_found")
        return adapter or None

    def use(self, names: Sequence[str]) -> None:
        """Load adapters. Raises ApiError 404 for one that is not there."""
        if not names:
            return
        try:
            if self.store is None:
                raise UnknownAdapterError(
                    f"there is no adapter {names[0]!r}: no folder of adapters is served"
                )
            self.store.use(names)
        except UnknownAdapterError as error:
            raise ApiError(404, str(error), "model_not_found") from error


class _Decoder(_Served):
    def __init__(self, model: SteeredModel, adapters: Path | None, settings: ServerSettings) -> None:
        super().__init__(model, adapters, settings)
        self.model = model
        self.engine = Engine(model, settings.slots, settings.queue_limit)

    def close(self, timeout: float) -> None:
        self.engine.close(timeout)


class _Encoder(_Served):
    def __init__(self, model: SteeredEncoder, adapters: Path | None, settings: ServerSettings) -> None:
        super().__init__(model, adapters, settings)
        self.model = model
        self.lock = asyncio.Lock()

    def close(self, timeout: float) -> None:
        """Nothing runs in the background."""


class _Guard:
    """Refuses bodies that are too large and callers without the key, and counts what is answered."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        body = None if refusal is not None else await self._read(receive)
        if body is None:
            await _error_response(refusal or self._too_large())(scope, receive, counted_send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def read_receive() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, read_receive, counted_send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._settings.max_body:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        key = self._settings.api_key
        if key is not None and path != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._settings.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self._settings.max_body:,} bytes")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_request: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(ReftEdgeError)
    async def on_refusal(_request: Request, error: ReftEdgeError) -> Response:
        return _error_response(_as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def on_malformed(_request: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"][1:])
        message = str(found["msg"]).removeprefix("Value error, ")
        return _error_response(ApiError(400, f"{place}: {message}" if place else message))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error_response(ApiError(error.status_code, message))


def _as_api_error(error: ReftEdgeError) -> ApiError:
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "queue_full", {"Retry-After": "1"})
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), "closing")
    if isinstance(error, SignatureError):
        _log.warning("%s", error)
        return ApiError(403, str(error), "adapter_not_trusted")
    return ApiError(400, str(error))


def _error_body(error: ApiError) -> dict[str, Any]:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(_error_body(error), error.status, error.headers)


def _add_common_routes(
    app: FastAPI, served: "_Decoder | _Encoder", settings: ServerSettings, metrics: Metrics
) -> None:
    created = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "reft-edge"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        if isinstance(served, _Decoder):
            metrics.running.set(served.engine.running)
            metrics.waiting.set(served.engine.waiting)
        metrics.loaded.set(len(served.store.loaded) if served.store else 0)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in served.models()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name not in served.models():
            raise ApiError(404, f"there is no model {name!r}", "model_not_found")
        return entry(name)


def _add_decoder_routes(app: FastAPI, served: _Decoder, metrics: Metrics) -> None:
    model = served.model

    @app.post("/v1/chat/completions")
    async def chat(body: api.ChatRequest, request: Request) -> Response:
        adapters = _adapters(served, body)
        try:
            ids = model.encode([message.plain() for message in body.messages], adapters, raw=False)
        except ReftEdgeError as error:
            raise ApiError(400, str(error)) from error
        room = model.manifest.context_length - len(ids)
        wanted = body.max_completion_tokens or body.max_tokens or max(1, room)
        top = body.top_logprobs if body.logprobs else None
        return await _answer(
            served, metrics, body, request, api.Answer(True, body.model), [ids], adapters, wanted, top
        )

    @app.post("/v1/completions")
    async def complete(body: api.CompletionRequest, request: Request) -> Response:
        adapters = _adapters(served, body)
        prompts = [
            model.encode(prompt, adapters, raw=True) if isinstance(prompt, str) else _checked(prompt, model)
            for prompt in body.prompts()
        ]
        return await _answer(
            served,
            metrics,
            body,
            request,
            api.Answer(False, body.model),
            prompts,
            adapters,
            body.max_tokens,
            body.logprobs,
        )

    for path in ("/v1/embeddings", "/v1/classify"):

        @app.post(path)
        async def not_an_encoder() -> None:
            raise ApiError(
                404,
                f"{served.settings.name} continues text; embeddings and labels come from an exported encoder",
            )


def _checked(ids: Sequence[int], model: SteeredModel) -> list[int]:
    vocabulary = model.prompts.tokenizer.get_vocab_size()
    if not all(0 <= token < vocabulary for token in ids):
        raise ApiError(400, f"prompt: a token id is outside the vocabulary of {vocabulary}")
    return list(ids)


def _adapters(served: _Decoder, body: api.Generate) -> dict[str, float]:
    """The adapters a request asks for, loaded."""
    named = served.adapter_of(body.model)
    if named is not None and body.adapters is not None:
        raise ApiError(
            400,
            f"model {body.model!r} names an adapter, and `adapters` others; name the base, {served.settings.name!r}",
        )
    chosen = {named: 1.0} if named is not None else dict(body.adapters or {})
    served.use(list(chosen))
    return chosen


async def _answer(
    served: _Decoder,
    metrics: Metrics,
    body: api.Generate,
    request: Request,
    answer: api.Answer,
    prompts: Sequence[Sequence[int]],
    adapters: dict[str, float],
    max_tokens: int,
    logprobs: int | None,
) -> Response:
    """Submit every choice of every prompt, and answer with all pieces as they come or with the whole."""
    if not prompts:
        raise ApiError(400, "prompt: give at least one")
    if len(prompts) * body.n > served.settings.max_inputs:
        raise ApiError(
            400,
            f"{len(prompts) * body.n} choices were asked for; at most {served.settings.max_inputs} are allowed",
        )
    started = time.perf_counter()
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

    def deliver_to(index: int) -> Callable[[Piece], None]:
        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        return deliver

    tickets: list[Ticket] = []
    try:
        for ids in prompts:
            for choice in range(body.n):
                wanted = EngineRequest(
                    tuple(ids), adapters, max_tokens, tuple(body.stop), body.sampling(choice), logprobs
                )
                tickets.append(served.engine.submit(wanted, deliver_to(len(tickets))))
    except ReftEdgeError:
        _cancel(tickets)
        raise
    metrics.prompt_tokens.inc(sum(len(ids) for ids in prompts))

    async def events() -> AsyncIterator[tuple[int, Piece]]:
        """All choices' pieces, until every choice has ended; what is left when the reader goes is cancelled."""
        try:
            left, first = len(tickets), True
            while left:
                index, piece = await pieces.get()
                if first:
                    metrics.first.observe(time.perf_counter() - started)
                    first = False
                left -= piece.finish_reason is not None
                yield index, piece
        finally:
            _cancel(tickets)
            metrics.tokens.inc(sum(len(ticket.tokens) for ticket in tickets))
            metrics.seconds.observe(time.perf_counter() - started)

    def counts() -> dict[str, int]:
        return api.usage(sum(len(ids) for ids in prompts), sum(len(ticket.tokens) for ticket in tickets))

    tokenizer = served.model.prompts.tokenizer

    def scores(piece: Piece | list[Piece], offset: int) -> Any:
        parts = piece if isinstance(piece, list) else [piece]
        found = [score for part in parts for score in part.tokens]
        if logprobs is None:
            return None
        if answer.chat:
            return api.chat_logprobs(tokenizer, found)
        return api.completion_logprobs(tokenizer, found, offset)

    if body.stream:
        lines = _stream(events(), answer, scores, counts, body.stream_options)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    whole: list[list[Piece]] = [[] for _ in tickets]

    async def collect() -> None:
        async for index, piece in events():
            whole[index].append(piece)

    await _while_connected(collect(), request)
    choices = []
    for index, parts in enumerate(whole):
        last = parts[-1]
        if last.error is not None or last.finish_reason == "cancelled":
            raise ApiError(503 if last.error is None else 500, last.error or "the server is closing")
        text = "".join(part.text for part in parts)
        choices.append(answer.choice(index, text, last.finish_reason, scores(parts, 0)))
    return JSONResponse(answer.whole(choices, counts()))


async def _stream(
    events: AsyncIterator[tuple[int, Piece]],
    answer: api.Answer,
    scores: Callable[[Piece, int], Any],
    counts: Callable[[], dict[str, int]],
    options: api.StreamOptions | None,
) -> AsyncIterator[str]:
    lengths: dict[int, int] = {}
    wants_usage = options is not None and options.include_usage
    extra: dict[str, Any] = {"usage": None} if wants_usage else {}
    async for index, piece in events:
        if piece.error is not None or piece.finish_reason == "cancelled":
            yield _event(_error_body(ApiError(500, piece.error or "the server is closing")))
            return
        first = index not in lengths
        logprobs = scores(piece, lengths.get(index, 0)) if piece.tokens else None
        lengths[index] = lengths.get(index, 0) + len(piece.text)
        if answer.chat and piece.finish_reason is not None:
            if piece.text or logprobs or first:
                yield _event(
                    {**answer.chunk([answer.delta(index, piece.text, None, logprobs, first)]), **extra}
                )
            yield _event(
                {**answer.chunk([answer.delta(index, "", piece.finish_reason, None, False)]), **extra}
            )
        else:
            change = answer.delta(index, piece.text, piece.finish_reason, logprobs, first)
            yield _event({**answer.chunk([change]), **extra})
    if wants_usage:
        yield _event({**answer.chunk([]), "usage": counts()})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _while_connected(work: Awaitable[None], request: Request) -> None:
    """Wait for work, and give it up when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=_PATIENCE))[0]:
            if await request.is_disconnected():
                raise ApiError(499, "the client went away")
        task.result()
    finally:
        task.cancel()


def _cancel(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        if ticket.finish_reason is None:
            ticket.cancel()


def _add_encoder_routes(app: FastAPI, served: _Encoder) -> None:
    def few(count: int) -> None:
        if count > served.settings.max_inputs:
            raise ApiError(400, f"input: {count} texts; at most {served.settings.max_inputs} are allowed")

    @app.post("/v1/classify")
    async def classify(body: api.ClassifyRequest) -> dict[str, Any]:
        adapter = served.adapter_of(body.model)
        if adapter is None:
            raise ApiError(
                400, f"the base has no labels; name an adapter, as in {served.settings.name}:ADAPTER"
            )
        texts = [body.input] if isinstance(body.input, str) else list(body.input)
        few(len(texts))
        async with served.lock:
            served.use([adapter])
            found = await asyncio.to_thread(served.model.classify, texts, adapter)
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {"index": i, "label": answer.label, "probabilities": answer.probabilities}
                for i, answer in enumerate(found)
            ],
        }

    @app.post("/v1/embeddings")
    async def embeddings(body: api.EmbeddingRequest) -> dict[str, Any]:
        adapter = served.adapter_of(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        few(len(texts))
        async with served.lock:
            served.use([adapter] if adapter else [])
            vectors, tokens = await asyncio.to_thread(served.model.embed, texts, adapter)
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
                for i, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    for path in ("/v1/chat/completions", "/v1/completions"):

        @app.post(path)
        async def not_a_decoder() -> None:
            raise ApiError(
                404, f"{served.settings.name} is an encoder; it has /v1/classify and /v1/embeddings"
            )


def _encoded(vector: np.ndarray[Any, np.dtype[np.float32]], encoding: str) -> Any:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.tobytes()).decode()
