"""Connections: a bounded number of them, each with a bounded time for what it waits for, on sockets that are bound first."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from reft_edge.errors import ReftEdgeError

HEAD_SECONDS = 10.0
"""From a connection, or the end of an answer, to the end of the next request's head."""
WRITE_SECONDS = 60.0
"""How long a client may leave an answer unread when the buffers are full."""
IDLE_SECONDS = 5
"""How long a connection without a request is kept."""
MOST_CONNECTIONS = 512
_BACKLOG = 32
"""Connections that are accepted at one go."""
_FILES = 4 * _BACKLOG + 64
"""Open files left for accepted connections that are not counted yet, adapters, and whatever else."""
_WANTED_FILES = 4096


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol for a bounded number of connections, none of which can keep its place by saying nothing.

    A connection waits while no request of its own is being answered. When there are too many, the one that has waited longest
    is closed.
    """

    most = MOST_CONNECTIONS
    head_seconds = HEAD_SECONDS
    write_seconds = WRITE_SECONDS
    count: Callable[[str, int], None] = staticmethod(lambda _path, _status: None)
    """Told of answers that the app does not give."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waits_since = 0.0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def answering(self) -> bool:
        """Whether a whole request is here and its answer is not out."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        others = [cast(BoundedProtocol, other) for other in self.connections]
        others = [other for other in others if not other.transport.is_closing()]
        if len(others) > self.most:
            waiting = [other for other in others if not other.answering]
            min(waiting, key=lambda other: other.waits_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head_timer)
        _stop(self._write_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._head_timer)

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self.count("other", 400)
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        _stop(self._write_timer)
        super().resume_writing()

    def _wait(self) -> None:
        self.waits_since = self.loop.time()
        _stop(self._head_timer)
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of the host, all at one port. Raises ReftEdgeError if there can be none."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made = socket.socket(family, kind, protocol)
            sockets.append(made)
            if os.name == "posix":
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken = sockets[0].getsockname()[1] if port == 0 and len(sockets) > 1 else port
            made.bind((address[0], taken, *address[2:]))
            made.listen(_BACKLOG)
        return sockets
    except (OSError, UnicodeError, OverflowError) as error:
        for made in sockets:
            made.close()
        said = getattr(error, "strerror", None) or "it is not the name of a host"
        raise ReftEdgeError(
            f"cannot listen on port {port} of {host}: {said}; choose another with --port or --host"
        ) from error


def address_of(host: str, sockets: Sequence[socket.socket]) -> str:
    """`host:port` as it stands in a URL."""
    port = sockets[0].getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def most_connections() -> int:
    """As many connections as this process has files for, after its limit was raised as far as it may be."""
    if sys.platform == "win32":  # it has no such limit
        return MOST_CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _WANTED_FILES:
        soft = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(8, min(MOST_CONNECTIONS, soft - _FILES))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()


def make_server(
    app: ASGIApp,
    grace: float,
    count: Callable[[str, int], None],
    started: Callable[[], None] = lambda: None,
    **limits: float,
) -> uvicorn.Server:
    """A server of an app. `grace`: seconds for running requests at the end; `count` is told of answers that the app does not
    give, `started` when requests are answered; `limits`: attributes of BoundedProtocol."""
    fields = {"most": most_connections(), "count": staticmethod(count), **limits}
    config = uvicorn.Config(
        app,
        http=type("Protocol", (BoundedProtocol,), fields),
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    return _Server(config, started)
