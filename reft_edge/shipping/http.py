"""HTTP for repositories, and the static index of a web server as one.

Servers are strangers: connections are encrypted unless they stay on this machine or the user allows otherwise, redirects,
sizes and times are bounded, and credentials go to the server they are for and to no other.
"""

import ipaddress
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx

from reft_edge import __version__
from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.release import INDEX, MAX_INDEX, Goods, Release, parse_index
from reft_edge.shipping.repository import BrokenOffError

MAX_REDIRECTS = 5
DEADLINE = 900.0
"""Seconds that one answer may take; a download goes on from there the next time."""
TOKEN = "REFT_EDGE_TOKEN"

_PASSING = {408, 425, 429, 500, 502, 503, 504}


class Web:
    """Requests for one repository."""

    def __init__(
        self,
        home: str,
        plain_http: bool,
        headers: Mapping[str, str] | None = None,
        challenged: Callable[[str], str | None] = lambda challenge: None,
    ) -> None:
        """`home`: a URL of the repository's server. Headers (lower-case names) named `authorization` go to it alone; where
        it answers 401, `challenged` may make another of its WWW-Authenticate header.

        Raises ReftEdgeError for what is no URL.
        """
        try:
            self.home = httpx.URL(home)
        except httpx.InvalidURL as error:
            raise ReftEdgeError(f"{home} is not an address: {error}; give https://HOST/PATH/") from error
        self._plain_http = plain_http
        self._challenged = challenged
        sent = dict(headers or {})
        self._authorization = sent.pop("authorization", None)
        sent |= {"accept-encoding": "identity", "user-agent": f"reft-edge/{__version__}"}
        self._client = httpx.Client(headers=sent, timeout=httpx.Timeout(30.0, connect=10.0))

    @contextmanager
    def send(
        self,
        method: str,
        url: httpx.URL | str,
        *,
        accept: Sequence[int] = (200,),
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Iterator[httpx.Response]:
        """The answer, its body not yet read. Raises BrokenOffError for what may pass, ReftEdgeError for other failures,
        inside the block, too, while the body is read."""
        try:
            request = self._client.build_request(method, url, headers=dict(headers or {}), content=content)
            response = self._follow(request)
            if response.status_code == 401 and _origin(response.url) == _origin(self.home):
                response.close()
                authorization = self._challenged(response.headers.get("www-authenticate", ""))
                if authorization is not None:
                    self._authorization = authorization
                    response = self._follow(request)
            try:
                if response.status_code not in accept:
                    raise _failure(response)
                yield response
            finally:
                response.close()
        except httpx.TransportError as error:
            raise BrokenOffError(f"{url}: {str(error) or type(error).__name__}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ReftEdgeError(f"{url}: {error}") from error

    def get(self, url: httpx.URL | str, limit: int, headers: Mapping[str, str] | None = None) -> bytes:
        """A whole body of at most `limit` bytes."""
        with self.send("GET", url, headers=headers) as response:
            return b"".join(read(response, limit))

    @contextmanager
    def open(self, url: str, start: int, size: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file of `size` bytes from `start` on, or from 0 if the server cannot begin elsewhere."""
        ranged = {"range": f"bytes={start}-"} if start else {}
        with self.send("GET", url, headers=ranged, accept=(200, 206, 416)) as response:
            if response.status_code == 200:
                yield 0, read(response, size)
            elif response.headers.get("content-range", "").startswith(f"bytes {start}-") and start:
                yield start, read(response, size - start)
            elif start:
                with self.send("GET", url) as whole:
                    yield 0, read(whole, size)
            else:
                raise _failure(response)

    def _follow(self, request: httpx.Request) -> httpx.Response:
        for _ in range(MAX_REDIRECTS + 1):
            self.check(request.url)
            request.headers.pop("authorization", None)
            if self._authorization is not None and _origin(request.url) == _origin(self.home):
                request.headers["authorization"] = self._authorization
            response = self._client.send(request, auth=None, stream=True)
            if response.next_request is None:
                return response
            response.close()
            request = response.next_request
        raise ReftEdgeError(f"{self.home} redirects more than {MAX_REDIRECTS} times")

    def check(self, url: httpx.URL) -> None:
        """Raise ReftEdgeError unless the connection would be encrypted, or may do without."""
        if url.scheme == "https":
            return
        here = is_loopback(self.home.host) and is_loopback(url.host)
        if url.scheme != "http" or not (here or self._plain_http):
            raise ReftEdgeError(
                f"{url} is not encrypted, so anybody on the way could read and change it; use https, or allow it with "
                "--plain-http"
            )


class HttpRepository:
    """A folder repository behind any web server. A bearer token in $REFT_EDGE_TOKEN is sent to that server alone."""

    def __init__(
        self, address: str, plain_http: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        try:
            parts = urlsplit(address)
        except ValueError as error:
            raise ReftEdgeError(f"{address} is not an address: {error}; give https://HOST/PATH/") from error
        if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            raise ReftEdgeError(
                f"{address} is not a repository's address; give https://HOST/PATH/ without a user, ? or #, and a token, "
                f"where one is needed, in ${TOKEN}"
            )
        self.address = address
        self._base = address.removesuffix(INDEX).rstrip("/") + "/"
        if headers is None:
            token = os.environ.get(TOKEN, "").strip()
            if not token.isascii() or not token.isprintable():
                raise ReftEdgeError(
                    f"${TOKEN} is no bearer token: it has other characters than printable ASCII"
                )
            headers = {"authorization": f"Bearer {token}"} if token else {}
        self._web = Web(self._base, plain_http, headers)

    def releases(self, version: int | None = None) -> list[Release]:
        url = self._base + INDEX
        content = self._web.get(url, MAX_INDEX, {"cache-control": "no-cache"})
        try:
            return parse_index(content)
        except ReftEdgeError as error:
            raise ReftEdgeError(f"cannot use {url}: {error}") from error

    @contextmanager
    def open(self, release: Release, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._web.open(self._base + release.path, start, release.size) as opened:
            yield opened

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        raise ReftEdgeError(
            f"nothing can be pushed to {self.address}: push to a folder and put that on the web server"
        )


def read(response: httpx.Response, limit: int) -> Iterator[bytes]:
    """A body as it arrives. Raises ReftEdgeError if it is compressed, longer than `limit` or takes longer than DEADLINE."""
    end = time.monotonic() + DEADLINE
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ReftEdgeError(f"{response.url} is sent compressed, which was not asked for")
    count = 0
    for piece in response.iter_raw():
        count += len(piece)
        if count > limit:
            raise ReftEdgeError(f"{response.url} has more than the {limit:,} bytes expected")
        if time.monotonic() > end:
            raise ReftEdgeError(f"{response.url} takes longer than {DEADLINE:,.0f} s")
        yield piece


def is_loopback(host: str) -> bool:
    """Whether a name or address of a URL is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _failure(response: httpx.Response) -> ReftEdgeError:
    status = f"{response.status_code} {response.reason_phrase}".strip()
    kind = BrokenOffError if response.status_code in _PASSING else ReftEdgeError
    why = ": credentials are missing or wrong" if response.status_code in (401, 403) else ""
    return kind(f"{response.url} answered {status}{why}")
