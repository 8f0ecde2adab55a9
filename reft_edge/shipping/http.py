"""HTTP for repositories, and the static index of a web server as one.

Servers are strangers: connections are encrypted unless they stay on this machine or the user allows otherwise, redirects,
sizes and times are bounded, and credentials go to the server they are for and to no other.
"""

import functools
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from reft_edge import __version__
from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.release import INDEX, MAX_INDEX, Goods, Release, parse_index
from reft_edge.shipping.repository import BrokenOffError
from reft_edge.shipping.wire import Wire, WireError, is_loopback

MAX_REDIRECTS = 5
MAX_HEADERS = 1 << 18
"""Bytes of headers of one answer, and of what surrounds its body: answers before it (1xx), sizes of chunks, trailers."""
DEADLINE = 900.0
"""Seconds that one answer may take, from the connection to the last byte; a download goes on from there the next time."""
TOKEN = "REFT_EDGE_TOKEN"

_PASSING = {408, 425, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}
_TIMEOUT = {"connect": 10.0, "read": 30.0, "write": 30.0, "pool": 30.0}
"""Seconds without anything happening."""


class Web:
    """Requests for one repository."""

    def __init__(
        self,
        home: str,
        plain_http: bool,
        headers: Mapping[str, str] | None = None,
        challenged: Callable[[str], str | None] = lambda challenge: None,
        wire: Wire | None = None,
    ) -> None:
        """`home`: a URL of the repository's server. Headers (lower-case names) named `authorization` go to it alone; where
        it answers 401, `challenged` may make another of its WWW-Authenticate header. `wire`: the network of another of
        these, whose home the user named in place of this one.

        Raises ReftEdgeError for what is no URL.
        """
        self.home = parse_url(home)
        self.wire = wire or Wire(_host(self.home))
        self._plain_http = plain_http
        self._challenged = challenged
        sent = dict(headers or {})
        self._authorization = sent.pop("authorization", None)
        self._headers = {**sent, "accept-encoding": "identity", "user-agent": f"reft-edge/{__version__}"}
        self._pools: dict[str | None, httpcore.ConnectionPool] = {}

    @contextmanager
    def send(
        self,
        method: str,
        url: httpx.URL,
        *,
        accept: Sequence[int] = (200,),
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Iterator["Answer"]:
        """The answer, its body not yet read. Raises BrokenOffError for what may pass, ReftEdgeError for other failures;
        what is raised inside the block is left as it is."""
        with self.wire.exchange(DEADLINE):
            with _told(url):
                answer = self._follow(method, url, headers or {}, content)
                if answer.status == 401 and _origin(answer.url) == _origin(self.home):
                    authorization = self._challenged(answer.headers.get("www-authenticate", ""))
                    if authorization is not None:
                        answer.close()
                        self._authorization = authorization
                        answer = self._follow(method, url, headers or {}, content)
            try:
                if answer.status not in accept:
                    raise answer.failure()
                yield answer
            finally:
                answer.close()

    def get(self, url: httpx.URL, limit: int, headers: Mapping[str, str] | None = None) -> bytes:
        """A whole body of at most `limit` bytes."""
        with self.send("GET", url, headers=headers) as answer:
            return answer.whole(limit)

    @contextmanager
    def open(self, url: httpx.URL, start: int, size: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file of `size` bytes from `start` on, or from 0 if the server cannot begin elsewhere."""
        ranged = {"range": f"bytes={start}-"} if start else {}
        with self.send("GET", url, headers=ranged, accept=(200, 206, 416)) as answer:
            if answer.status == 200:
                yield 0, answer.pieces(size)
            elif answer.headers.get("content-range", "").startswith(f"bytes {start}-") and start:
                yield start, answer.pieces(size - start)
            elif start:
                with self.send("GET", url) as whole:
                    yield 0, whole.pieces(size)
            else:
                raise answer.failure()

    def _follow(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: bytes | None
    ) -> "Answer":
        for _ in range(MAX_REDIRECTS + 1):
            self.check(url)
            answer = self._ask(method, url, headers, content)
            location = answer.headers.get("location")
            if answer.status not in _REDIRECTS or location is None:
                return answer
            answer.close()
            url = url.join(location)
            if answer.status in (302, 303) or (answer.status == 301 and method == "POST"):
                method, content = "HEAD" if method == "HEAD" else "GET", None
        raise ReftEdgeError(f"{self.home} redirects more than {MAX_REDIRECTS} times")

    def _ask(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: bytes | None
    ) -> "Answer":
        sent = {"host": url.netloc.decode("ascii"), **self._headers, **headers}
        if self._authorization is not None and _origin(url) == _origin(self.home):
            sent["authorization"] = self._authorization
        if content is not None or method in ("POST", "PUT"):
            sent["content-length"] = str(len(content or b""))
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        request = httpcore.Request(
            method, target, headers=list(sent.items()), content=content, extensions={"timeout": _TIMEOUT}
        )
        self.wire.allow(MAX_HEADERS)
        response = self._pool(url).handle_request(request)
        return Answer(response.status, url, httpx.Headers(response.headers), response, self.wire)

    def _pool(self, url: httpx.URL) -> httpcore.ConnectionPool:
        """The connections to a URL's server: direct ones, or those through the proxy that the system names for it."""
        proxies = {} if proxy_bypass(_host(url)) else getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if proxy not in self._pools:
            self._pools[proxy] = _make_pool(self.wire, proxy)
        return self._pools[proxy]

    def check(self, url: httpx.URL) -> None:
        """Raise ReftEdgeError unless the connection would be encrypted, or may do without, and to where it may lead."""
        here = is_loopback(self.wire.home) and is_loopback(_host(url))
        if url.scheme != "https" and (url.scheme != "http" or not (here or self._plain_http)):
            raise ReftEdgeError(
                f"{url} is not encrypted, so anybody on the way could read and change it; use https, or allow it with "
                "--plain-http"
            )
        self.wire.check(_host(url))


@dataclass(frozen=True)
class Answer:
    """What a server said, its body still to come."""

    status: int
    url: httpx.URL
    """After redirects."""
    headers: httpx.Headers
    _response: httpcore.Response
    _wire: Wire

    def pieces(self, limit: int) -> Iterator[bytes]:
        """The body as it arrives. Raises ReftEdgeError if it is compressed, longer than `limit` or takes too long,
        BrokenOffError if it breaks off."""
        if self.headers.get("content-encoding", "identity") != "identity":
            raise ReftEdgeError(f"{self.url} is sent compressed, which was not asked for")
        self._wire.allow(2 * limit + MAX_HEADERS)
        arriving = self._response.iter_stream()
        count = 0
        while True:
            with _told(self.url):
                self._wire.time_left(None)
                piece = next(arriving, None)
            if piece is None:
                return
            count += len(piece)
            if count > limit:
                raise ReftEdgeError(f"{self.url} has more than the {limit:,} bytes expected")
            yield piece

    def whole(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes."""
        return b"".join(self.pieces(limit))

    def place(self, header: str) -> httpx.URL:
        """The URL in a header, absolute. Raises ReftEdgeError if it is missing or none."""
        with _told(self.url):
            return self.url.join(self.headers[header])

    @property
    def following(self) -> httpx.URL | None:
        """The next page, if the header `link` names one. Raises ReftEdgeError if it is no URL."""
        with _told(self.url):
            link = httpx.Response(self.status, headers=self.headers).links.get("next", {}).get("url")
            return self.url.join(link) if link else None

    def failure(self) -> ReftEdgeError:
        """The status as an error."""
        kind = BrokenOffError if self.status in _PASSING else ReftEdgeError
        status = f"{self.status} {httpx.codes.get_reason_phrase(self.status)}".strip()
        why = ": credentials are missing or wrong" if self.status in (401, 403) else ""
        return kind(f"{self.url} answered {status}{why}")

    def close(self) -> None:
        self._response.close()


class HttpRepository:
    """A folder repository behind any web server. A bearer token in $REFT_EDGE_TOKEN is sent to that server alone."""

    def __init__(
        self, address: str, plain_http: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        try:
            parts = urlsplit(address)
            named = bool(parts.hostname)
        except ValueError as error:
            raise ReftEdgeError(f"{address} is not an address: {error}; give https://HOST/PATH/") from error
        if not named or parts.query or parts.fragment or "@" in parts.netloc:
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
        url = parse_url(self._base + INDEX)
        content = self._web.get(url, MAX_INDEX, {"cache-control": "no-cache"})
        try:
            return parse_index(content)
        except ReftEdgeError as error:
            raise ReftEdgeError(f"cannot use {url}: {error}") from error

    @contextmanager
    def open(self, release: Release, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._web.open(parse_url(self._base + release.path), start, release.size) as opened:
            yield opened

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        raise ReftEdgeError(
            f"nothing can be pushed to {self.address}: push to a folder and put that on the web server"
        )


def parse_url(text: str) -> httpx.URL:
    """Raises ReftEdgeError for what is no URL of a server."""
    try:
        url = httpx.URL(text)
        if not url.raw_host or not 0 <= (url.port or 0) < 1 << 16:
            raise ValueError("it names no host, or a port that there is not")
        return url
    except (httpx.InvalidURL, ValueError) as error:
        raise ReftEdgeError(f"{text} is not an address: {error}; give https://HOST/PATH/") from error


@functools.cache
def _encryption() -> ssl.SSLContext:
    """With the authorities that this machine trusts; reading them takes long."""
    return httpx.create_ssl_context()


def _make_pool(wire: Wire, proxy: str | None) -> httpcore.ConnectionPool:
    context = _encryption()
    if proxy is None:
        return httpcore.ConnectionPool(context, network_backend=wire)
    known = httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
    url = httpcore.URL(str(known.url.copy_with(username="", password="")))
    wire.trust(url.host.decode("ascii"), url.origin.port)
    kind = httpcore.SOCKSProxy if url.scheme.startswith(b"socks") else httpcore.HTTPProxy
    return kind(url, proxy_auth=known.raw_auth, ssl_context=context, network_backend=wire)


@contextmanager
def _told(url: httpx.URL) -> Iterator[None]:
    """What the network and the libraries that read a stranger's bytes raise, as errors of this URL."""
    try:
        yield
    except WireError as error:
        raise ReftEdgeError(f"{url}: {error}") from error
    except ReftEdgeError:
        raise
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError) as error:
        raise BrokenOffError(f"{url}: {str(error) or type(error).__name__}") from error
    except (
        Exception
    ) as error:  # names, ports, proxies, headers: httpcore, h11, idna and the system have one each
        raise ReftEdgeError(f"{url}: {str(error) or type(error).__name__}") from error


def _host(url: httpx.URL) -> str:
    """As it goes over the wire; `URL.host` decodes it, which can fail."""
    return url.raw_host.decode("ascii")


def _origin(url: httpx.URL) -> tuple[bytes, bytes, int | None]:
    return url.raw_scheme, url.raw_host, url.port
