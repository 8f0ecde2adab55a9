"""Connections for `http` that end in time, carry no more than was said, and lead nowhere that a stranger must not send us."""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore

from reft_edge.errors import ReftEdgeError

LOOPBACK, PRIVATE, PUBLIC, OTHER = "this machine", "a private network", "the internet", "a special network"
"""Where an address is. OTHER: link-local ones, clouds' metadata services among them, and those of no single host."""

_PIECE = 1 << 14
_PRIVATE = [
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        # clouds' metadata services and platforms, at addresses that look public or private
        *("100.100.100.200/32", "168.63.129.16/32", "fd00:ec2::254/128", "fd20:ce::254/128"),
        # set aside, which some versions of Python do not know
        *("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "3fff::/20", "5f00::/16"),
    )
]
_HOLDS_IPV4 = [ipaddress.IPv6Network(text) for text in ("::/96", "64:ff9b::/96")]
"""IPv6 networks whose addresses end in the IPv4 address that they stand for."""

Options = Iterable[Any] | None


class Wire(httpcore.NetworkBackend):
    """The network as one repository's servers may use it.

    `home` is the host that the user named. It may be anywhere; it stays where it was found first. Every other host must be
    on the internet or, where the user named an address of this machine or of a private network, there.
    """

    def __init__(self, home: str, network: httpcore.NetworkBackend | None = None) -> None:
        self.home = home
        self._network = network or httpcore.SyncBackend()
        self._found: str | None = None
        self._proxies: set[tuple[str, int]] = set()
        self._seconds = 0.0
        self._end: float | None = None
        self._bytes = 0

    @contextmanager
    def exchange(self, seconds: float) -> Iterator[None]:
        """All that is connected, written and read inside takes at most `seconds`; a block in a block ends with the outer."""
        outer = self._end
        if outer is None:
            self._seconds, self._end = seconds, time.monotonic() + seconds
        try:
            yield
        finally:
            self._end = outer

    def allow(self, count: int) -> None:
        """From now on at most `count` bytes are read, whatever they belong to, until this is called again."""
        self._bytes = count

    def trust(self, proxy: str, port: int) -> None:
        """A proxy of the user's own may be anywhere."""
        self._proxies.add((proxy, port))

    def check(self, host: str) -> None:
        """Raise WireError for a host that is a forbidden address, however it is written. A name is checked where it
        leads when it is connected to."""
        if host == "localhost" or host.endswith((".localhost", "localhost.")):
            return self._check_address(host, "127.0.0.1")
        try:
            found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
        except OSError:
            return None
        return self._check_address(host, str(found[0][4][0]))

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore.NetworkStream:
        own = (host, port) in self._proxies
        failure: Exception | None = None
        for address in _resolve(host, port):
            try:
                if not own:
                    self._check_address(host, address)
                with self.timed(timeout) as left:
                    stream = self._network.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout, WireError) as error:
                failure = error
                continue
            if host == self.home and self._found is None:
                self._found = zone(address)
            return _Stream(stream, self)
        raise failure or httpcore.ConnectError(f"{host} has no address")

    def sleep(self, seconds: float) -> None:
        self._network.sleep(seconds)

    def time_left(self, timeout: float | None) -> float:
        """`timeout`, or what is left of the exchange's time if that is less. Raises WireError if nothing is."""
        assert self._end is not None, "reads and writes belong to an exchange"
        left = self._end - time.monotonic()
        if left <= 0:
            raise WireError(f"it takes longer than {self._seconds:,.0f} s")
        return left if timeout is None else min(timeout, left)

    @contextmanager
    def timed(self, timeout: float | None) -> Iterator[float]:
        """The seconds that one step may take. Raises WireError when the exchange's time is up, before the step or in it."""
        try:
            yield self.time_left(timeout)
        except httpcore.TimeoutException:
            self.time_left(timeout)
            raise

    def count(self, arrived: int) -> None:
        """Raise WireError if more has arrived than was allowed."""
        self._bytes -= arrived
        if self._bytes < 0:
            raise WireError("it sends more than it should: headers or trailers without end")

    def _check_address(self, host: str, address: str) -> None:
        place = zone(address)
        if host == self.home:
            allowed = self._found in (None, place)
        else:
            allowed = (place == LOOPBACK and is_loopback(self.home)) or place == PRIVATE == self._found
        if place != PUBLIC and not allowed:
            raise WireError(
                f"{self.home} leads to {host} ({address}), on {place}, which a server elsewhere may not do; if you want to "
                "pull from there, give that address itself"
            )


class WireError(ReftEdgeError):
    """A server takes too long, says too much, or sends us to where it must not."""


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, wire: Wire) -> None:
        self._stream = stream
        self._wire = wire

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._wire.timed(timeout) as left:
            data = self._stream.read(max_bytes, left)
        self._wire.count(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            with self._wire.timed(timeout) as left:
                self._stream.write(buffer[start : start + _PIECE], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        with self._wire.timed(timeout) as left:
            return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._wire)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def zone(text: str) -> str:
    """LOOPBACK, PRIVATE, PUBLIC or OTHER, of an IP address. Raises ValueError for other text."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        ipv4 = address.ipv4_mapped or address.sixtofour
        if ipv4 is None and any(address in network for network in _HOLDS_IPV4):
            ipv4 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if ipv4 is not None:
            return zone(str(ipv4))
        if address.is_site_local or address.is_reserved:
            return OTHER
    if address.is_loopback:
        return LOOPBACK
    if any(address in network for network in _SPECIAL):
        return OTHER
    if any(address in network for network in _PRIVATE):
        return PRIVATE
    return PUBLIC if address.is_global and not address.is_multicast else OTHER


def is_loopback(host: str) -> bool:
    """Whether a name or address of a URL is this machine's own."""
    try:
        return host == "localhost" or zone(host) == LOOPBACK
    except ValueError:
        return False


def _resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, each once, in the system's order."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore.ConnectError(f"{host}: {error.strerror or error}") from error
    return list(
        dict.fromkeys(
            f"{address[0]}%{address[3]}" if len(address) == 4 and address[3] else str(address[0])
            for *_, address in found
        )
    )
