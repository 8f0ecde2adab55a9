"""What stands before the routes: hosts, the key, bodies and the number of requests; and what counts the answers."""

import asyncio
import hmac
import ipaddress
import logging
import re
import traceback
from collections.abc import Collection, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.engine import QueueFullError
from reft_edge.runtime.memory import NoMemoryError
from reft_edge.runtime.serving.bodies import Arriving, too_large
from reft_edge.runtime.serving.errors import CLIENT_LEFT, ApiError, as_api_error, error_response
from reft_edge.runtime.serving.served import ServerSettings

_log = logging.getLogger(__name__)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


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

    def count(self, path: str, status: int) -> None:
        """One answer."""
        self.requests.labels(path, status).inc()


class Counting:
    """Counts every answer, whoever gives it, and what ends without one. The outermost of all."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """`paths`: those that are counted by name, whatever comes of a request."""
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            asked = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count(str(getattr(scope.get("route"), "path", asked)), status)


class Guard:
    """Refuses hosts that are not ours, callers without the key, bodies without end and more requests than are to wait; answers
    for what nobody foresaw."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._bodies = Arriving(settings.max_body)
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        error: ApiError
        try:
            await self._admit(scope, receive, watched)
            return
        except ReftEdgeError as refusal:
            error = as_api_error(refusal)
        except asyncio.CancelledError:
            error = ApiError(503, "the server is closing", "closing")
        except MemoryError:
            error = as_api_error(NoMemoryError("there is no memory left for this request; try again later"))
        except Exception as failure:
            _log.error("a request to %s failed: %s", _route(scope), _where(failure))
            error = ApiError(500, "the server failed; its log says where", "internal_error")
        if not started and error.status != CLIENT_LEFT:
            await error_response(error)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        check_host(headers.get(b"host", b""), self._settings.hosts)
        self._check_key(scope["path"], headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 20 or int(length) > self._settings.max_body:
            raise too_large(self._settings.max_body)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await self._bodies.read(receive)
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body

        async def read_receive() -> Message:
            return unread.pop() if unread else await receive()

        limit = self._settings.slots + self._settings.queue_limit
        if self._under_way >= limit:
            raise QueueFullError(f"{limit} requests run or wait already; try again later")
        self._under_way += 1
        try:
            await self._app(scope, read_receive, send)
        finally:
            self._under_way -= 1

    def _check_key(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        key = self._settings.api_key
        if key is None or path == "/health":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )


def check_host(header: bytes, allowed: Sequence[str]) -> None:
    """Raise ApiError unless a Host header names one of these hosts, at whatever port; `*` allows any.

    Addresses of IPv6 stand in brackets, as in `[::1]:8080`.
    """
    if "*" in allowed:
        return
    text = header.decode("latin-1").strip().lower()
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@\s]+))(?::\d{0,5})?", text)
    if match is None or _address(match[1] or match[2]) not in {_address(host) for host in allowed}:
        raise ApiError(
            400,
            f"this server does not answer for the host {text[:100]!r}; use http://localhost",
            "invalid_host",
        )


def _address(host: str) -> str:
    """One way to write a host's name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _route(scope: Scope) -> str:
    """The path without what the client put into it."""
    return str(getattr(scope.get("route"), "path", "another path"))


def _where(error: BaseException) -> str:
    """What an exception is and where it was raised, without its message, which may quote the client."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
