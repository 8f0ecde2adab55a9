"""Targets of what servers say over HTTP: an input is the bytes that each connection of an exchange gets, one after the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import httpcore
from harness import Target

from reft_edge.shipping.http import HttpRepository
from reft_edge.shipping.oci import OciRepository, render_manifest
from reft_edge.shipping.release import Goods, Release, digest_of, render_index
from reft_edge.shipping.wire import PUBLIC, zone

NEXT = b"\n----\n"
ADDRESS = "93.184.216.34"
CONTENT = b"hello"
RELEASE = Release("formal", 1, digest_of(CONTENT), len(CONTENT), "base", "0" * 16)


class Network(httpcore.NetworkBackend):
    """No network: every name is at ADDRESS, and each connection gets the next of the input's parts, in pieces."""

    def __init__(self, content: bytes) -> None:
        self._parts = content.split(NEXT)

    def connect_tcp(self, host: str, port: int, *rest: Any, **options: Any) -> httpcore.NetworkStream:
        assert zone(host) == PUBLIC, f"connects to {host}"
        part = self._parts.pop(0) if self._parts else b""
        return httpcore.MockStream([part[start : start + 1024] for start in range(0, len(part), 1024)])


def exchanging(use: Callable[[], None]) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        with (
            mock.patch.object(httpcore, "SyncBackend", return_value=Network(content)),
            mock.patch("reft_edge.shipping.wire._resolve", return_value=[ADDRESS]),
        ):
            use()

    return read


def said(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def web_target(folder: Path) -> Target:
    """A web server with an index and the rest of a file, behind a redirect and an early hint."""

    def use() -> None:
        repository = HttpRepository(f"https://{ADDRESS}/site", headers={"authorization": "Bearer secret"})
        for release in repository.releases()[:1]:
            with repository.open(release, 2) as (start, pieces):
                assert start in (0, 2)
                assert sum(map(len, pieces)) <= release.size - start

    index = render_index([RELEASE])
    moved = said("302 Found", "Location: https://cdn.example/x")
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n"
    rest = said("206 Partial Content", "Content-Range: bytes 2-4/5", body=CONTENT[2:])
    whole = said("200 OK", body=index)
    seeds = [
        NEXT.join([whole, rest]),
        NEXT.join([moved, early + whole, moved, chunked]),
        NEXT.join([whole, said("416 Range Not Satisfiable"), said("200 OK", body=CONTENT)]),
        said("302 Found", "Location: https://127.0.0.1/"),
        said("200 OK", "Content-Encoding: gzip", body=index),
        early * 9000,
    ]
    return Target(exchanging(use), seeds, 3)


def registry_target(folder: Path) -> Target:
    """An OCI registry that asks for a token, shows a manifest and its tags in pages, and takes an upload."""

    def use() -> None:
        repository = OciRepository(f"{ADDRESS}/fleet")
        assert len(repository.releases()) == 1
        [made] = repository.publish([Goods("formal", b"other", "base", "0" * 16)])
        assert made.version > 1

    challenge = (
        f'WWW-Authenticate: Bearer realm="https://{ADDRESS}/token",service="s",scope="repository:fleet:pull"'
    )
    manifest = said("200 OK", body=render_manifest(RELEASE))
    tags = said("200 OK", 'Link: </v2/fleet/tags/list?last=1>; rel="next"', body=b'{"tags": ["1"]}')
    upload = [
        said("404 Not Found"),
        said("202 Accepted", "Location: /v2/fleet/blobs/uploads/1?state=2"),
        said("201 Created"),
    ]
    ask = [said("401 Unauthorized", challenge), said("200 OK", body=b'{"token": "t"}'), manifest]
    rest = [
        tags,
        said("200 OK", body=b'{"tags": ["latest"]}'),
        manifest,
        *upload,
        *upload,
        said("201 Created"),
    ]
    seeds = [
        NEXT.join([*ask, *rest, said("201 Created")]),
        NEXT.join([manifest, *rest, said("201 Created")]),
        NEXT.join([said("401 Unauthorized", challenge.replace(ADDRESS, "10.0.0.1"))]),
        NEXT.join([*ask, *rest[:-1]]),
    ]
    return Target(exchanging(use), seeds, 2)
