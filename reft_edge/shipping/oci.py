"""A repository of an OCI registry: one adapter, a tag a version, as artifact manifests that `oras` reads and writes.

A version N is the tag N, and the address's tag, `latest` if it has none, is moved to the newest. Its manifest (OCI image
spec 1.1) has the artifact type `application/vnd.reft-edge.adapter.v1`, the empty config, one layer, the file, titled
NAME.safetensors, and the version and base model as annotations. The protocol is the OCI distribution spec's, with the
registries' token authentication; credentials are what `docker login` or `oras login` left in docker's config.json.
"""

import base64
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text
from reft_edge.shipping.http import Web, parse_url
from reft_edge.shipping.release import SUFFIX, Goods, Release, digest_of, next_releases
from reft_edge.shipping.wire import is_loopback
from reft_edge.strict_json import parse_json

ARTIFACT = "application/vnd.reft-edge.adapter.v1"
LAYER = "application/vnd.reft-edge.adapter.v1.safetensors"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
TITLE = "org.opencontainers.image.title"
NUMBER = "org.opencontainers.image.version"
BASE_NAME = "org.reft-edge.base.name"
BASE_FINGERPRINT = "org.reft-edge.base.fingerprint"
LATEST = "latest"

_ADDRESS = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?P<port>:\d{1,5})?"
    r"/(?P<repository>[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
)
_VERSION = re.compile(r"[1-9]\d{0,8}", re.ASCII)
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_MAX_MANIFEST, _MAX_TOKEN, _MAX_TAGS, _MAX_PAGES = 1 << 16, 1 << 16, 1 << 20, 100
_HUB, _HUB_API, _HUB_LOGIN = "docker.io", "registry-1.docker.io", "https://index.docker.io/v1/"


class OciRepository:
    """oci://HOST/REPOSITORY[:TAG]. This machine is spoken to without encryption, others only with `plain_http`."""

    def __init__(self, place: str, plain_http: bool = False) -> None:
        self.address = f"oci://{place}"
        parts = _ADDRESS.fullmatch(place)
        if parts is None:
            raise ReftEdgeError(
                f"{self.address} is not a repository's address; give oci://HOST/REPOSITORY or oci://HOST/REPOSITORY:TAG, "
                "in lower case"
            )
        host, port = parts["host"], parts["port"] or ""
        scheme = "http" if plain_http or is_loopback(host.strip("[]")) else "https"
        self._tag = parts["tag"] or LATEST
        self._repository = parts["repository"]
        self._host = host + port
        api = _HUB_API if self._host == _HUB else self._host
        self._root = f"{scheme}://{api}/v2/{self._repository}"
        self._plain_http = plain_http
        self._web = Web(self._root, plain_http, challenged=self._answer)

    def releases(self, version: int | None = None) -> list[Release]:
        """The one that the address's tag means, or that of the version."""
        tag = self._tag if version is None else str(version)
        try:
            found = self._manifest(tag)
        except ReftEdgeError as error:
            raise ReftEdgeError(f"cannot use {self.address} at tag {tag}: {error}") from error
        if found is None:
            raise ReftEdgeError(f"{self.address} has no tag {tag}")
        if version is not None and found.version != version:
            raise ReftEdgeError(f"{self.address} has version {found.version} at tag {tag}")
        return [found]

    @contextmanager
    def open(self, release: Release, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._web.open(self._at("blobs", release.digest), start, release.size) as opened:
            yield opened

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        """Blobs, then the version's tag, then the address's: a push that is broken off can be made again."""
        if len(goods) != 1:
            raise ReftEdgeError(f"{self.address} holds one adapter; push each to a repository of its own")
        if _VERSION.fullmatch(self._tag):
            raise ReftEdgeError(
                f"{self.address}: tags that are numbers are versions, which push counts itself; give another"
            )
        item = goods[0]
        numbers = self._versions()
        last = self._manifest(str(max(numbers))) if numbers else None
        if last is not None and last.name != item.name:
            raise ReftEdgeError(
                f"{self.address} holds the adapter {last.name}; push {item.name} to a repository of its own, or give "
                f"--name {last.name}"
            )
        made = next_releases([last] if last else [], goods)[0]
        manifest = render_manifest(made)
        if made != last:
            for content in (EMPTY, item.content):
                self._upload(content)
            self._tag_manifest(str(made.version), manifest)
        self._tag_manifest(self._tag, manifest)
        return [made]

    def _manifest(self, tag: str) -> Release | None:
        url = self._at("manifests", tag)
        with self._web.send("GET", url, accept=(200, 404), headers={"accept": MANIFEST}) as answer:
            return None if answer.status == 404 else parse_manifest(answer.whole(_MAX_MANIFEST), tag)

    def _tag_manifest(self, tag: str, manifest: bytes) -> None:
        url = self._at("manifests", tag)
        with self._web.send("PUT", url, accept=(201,), headers={"content-type": MANIFEST}, content=manifest):
            pass

    def _versions(self) -> list[int]:
        """The tags that are versions; none where the repository does not exist yet."""
        url: httpx.URL | None = self._at("tags", "list")
        found: list[int] = []
        for _ in range(_MAX_PAGES):
            if url is None:
                return found
            with self._web.send("GET", url, accept=(200, 404)) as answer:
                if answer.status == 404:
                    return found
                tags = _parse(answer.whole(_MAX_TAGS)).get("tags") or []
                url = answer.following
            if not isinstance(tags, list):
                raise ReftEdgeError(f"{self.address} has tags that are not a list")
            found += [int(tag) for tag in tags if isinstance(tag, str) and _VERSION.fullmatch(tag)]
        raise ReftEdgeError(f"{self.address} has more tags than can be listed")

    def _upload(self, content: bytes) -> None:
        digest = digest_of(content)
        with self._web.send("HEAD", self._at("blobs", digest), accept=(200, 404)) as answer:
            if answer.status == 200:
                return
        with self._web.send("POST", self._at("blobs", "uploads/"), accept=(202,)) as answer:
            if "location" not in answer.headers:
                raise ReftEdgeError(f"{answer.url} does not say where to upload to")
            place = answer.place("location")
        octets = {"content-type": "application/octet-stream"}
        url = place.copy_merge_params({"digest": digest})
        with self._web.send("PUT", url, accept=(201,), headers=octets, content=content):
            pass

    def _answer(self, challenge: str) -> str | None:
        """The Authorization that a registry's challenge asks for."""
        login = self._login()
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            return login
        asked = dict(_PARAMETER.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in asked:
            return None
        realm = parse_url(asked.pop("realm")).copy_merge_params(
            {name: value for name, value in asked.items() if name in ("service", "scope")}
        )
        credentials = {"authorization": login} if login else {}
        web = Web(str(realm), self._plain_http, credentials, wire=self._web.wire)
        answer = _parse(web.get(realm, _MAX_TOKEN))
        token = answer.get("token") or answer.get("access_token")
        return (
            f"Bearer {token}" if isinstance(token, str) and token.isascii() and token.isprintable() else None
        )

    def _at(self, kind: str, name: str) -> httpx.URL:
        return parse_url(f"{self._root}/{kind}/{name}")

    def _login(self) -> str | None:
        """Basic credentials for this host in docker's config.json; None if there are none."""
        folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
        try:
            known = json.loads(read_text(folder / "config.json"))["auths"]
            secret = known[_HUB_LOGIN if self._host == _HUB else self._host]["auth"]
            return "Basic " + base64.b64encode(base64.b64decode(secret, validate=True)).decode()
        except (ReftEdgeError, ValueError, KeyError, TypeError):
            return None


def parse_manifest(content: bytes, tag: str) -> Release:
    """The release that an artifact manifest describes. Without a version annotation, a tag that is a number says it.

    Raises ReftEdgeError for a manifest of anything else.
    """
    manifest = _parse(content)
    layers = manifest.get("layers")
    annotations = _texts(manifest.get("annotations"))
    if manifest.get("schemaVersion") != 2 or not isinstance(layers, list) or len(layers) != 1:
        raise ReftEdgeError("it is not the manifest of an adapter: expected schema version 2 and one layer")
    layer = layers[0]
    kind = layer.get("mediaType") if isinstance(layer, dict) else None
    if kind != LAYER:
        raise ReftEdgeError(f"its layer is of type {kind!r:.100}; expected {LAYER}")
    title = _texts(layer.get("annotations")).get(TITLE, "")
    number = annotations.get(NUMBER, tag)
    if not title.endswith(SUFFIX):
        raise ReftEdgeError(f"its layer is titled {title!r:.150}; expected NAME{SUFFIX} in {TITLE}")
    if not _VERSION.fullmatch(number):
        raise ReftEdgeError(
            f"its version is {number!r:.50}; expected a whole number in {NUMBER}, or as the tag"
        )
    return Release(
        name=title.removesuffix(SUFFIX),
        version=int(number),
        digest=layer.get("digest"),
        size=layer.get("size"),
        base_name=annotations.get(BASE_NAME, ""),
        base_fingerprint=annotations.get(BASE_FINGERPRINT, ""),
    )


def render_manifest(release: Release) -> bytes:
    """An artifact manifest as `parse_manifest` reads it."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": {"mediaType": EMPTY_TYPE, "digest": digest_of(EMPTY), "size": len(EMPTY)},
        "layers": [
            {
                "mediaType": LAYER,
                "digest": release.digest,
                "size": release.size,
                "annotations": {TITLE: release.name + SUFFIX},
            }
        ],
        "annotations": {
            NUMBER: str(release.version),
            BASE_NAME: release.base_name,
            BASE_FINGERPRINT: release.base_fingerprint,
        },
    }
    return json.dumps(manifest, separators=(",", ":")).encode()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return parse_json(content.decode(), "answer")
    except UnicodeDecodeError as error:
        raise ReftEdgeError("its answer is not UTF-8") from error


def _texts(annotations: Any) -> dict[str, str]:
    if annotations is None:
        return {}
    if not isinstance(annotations, dict) or not all(isinstance(text, str) for text in annotations.values()):
        raise ReftEdgeError("its annotations are not texts by name")
    return annotations
