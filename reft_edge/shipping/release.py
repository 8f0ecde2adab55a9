"""What a repository offers: releases of adapters, and the `index.json` that lists them.

    {"format": "reft-edge index", "version": 1, "releases": [
      {"name": "pirate", "version": 2, "digest": "sha256:...", "size": 75384,
       "base_name": "SmolLM2-135M-Instruct", "base_fingerprint": "..."}]}

The file of a release lies beside the index at `NAME/HEX.safetensors`, HEX being its SHA-256.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.adapter.file import read_whole
from reft_edge.errors import ReftEdgeError
from reft_edge.files import open_regular
from reft_edge.strict_json import parse_json

INDEX = "index.json"
FORMAT = "reft-edge index"
VERSION = 1
SUFFIX = ".safetensors"
MAX_INDEX = 3 << 19
"""Bytes; room for about 7,000 releases; a hostile one of that size takes under 64 MB to refuse."""
MAX_NAMES = 1000
"""Adapters in one index."""
MAX_FILE = (1 << 30) + (2 << 20)
"""Bytes; no adapter file that can be loaded is larger."""
MAX_VERSION = 10**9 - 1

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_TAKEN = re.compile(r"index\.json|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""The index's own name, and what Windows takes for devices."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Release:
    """One version of one adapter. Raises ReftEdgeError for fields that are not what they should be."""

    name: str
    """Letters, digits, `.`, `_` and `-`, beginning with a letter or digit and not ending in `.`: it becomes a file's name."""
    version: int
    """From 1, one more with every release of that name."""
    digest: str
    """Of the file: `sha256:` and 64 hex digits."""
    size: int
    """Of the file, in bytes."""
    base_name: str = ""
    base_fingerprint: str = ""
    """The base model that it is for; empty where the repository does not say."""

    def __post_init__(self) -> None:
        check_name(self.name)
        for name, limit in (("version", MAX_VERSION), ("size", MAX_FILE)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ReftEdgeError(f"{name} is {value!r:.50}; expected a whole number from 1 to {limit:,}")
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise ReftEdgeError(f"digest is {self.digest!r:.100}; expected sha256: and 64 hex digits")
        for name in ("base_name", "base_fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
                raise ReftEdgeError(
                    f"{name} is {value!r:.100}; expected plain text of at most 200 characters"
                )

    @property
    def hex_digest(self) -> str:
        return self.digest.removeprefix("sha256:")

    @property
    def path(self) -> str:
        """Where its file is, seen from the index."""
        return f"{self.name}/{self.hex_digest}{SUFFIX}"

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class Goods:
    """An adapter file that is to be pushed, checked."""

    name: str
    content: bytes
    base_name: str
    base_fingerprint: str

    @property
    def digest(self) -> str:
        return digest_of(self.content)

    def release(self, version: int) -> Release:
        return Release(
            self.name, version, self.digest, len(self.content), self.base_name, self.base_fingerprint
        )


def read_goods(path: Path, name: str | None = None) -> Goods:
    """The adapter in a file, under its file's name if no other is given.

    Raises ReftEdgeError if the file is not a usable adapter or the name is not one that can be pushed.
    """
    name = path.name.removesuffix(SUFFIX) if name is None else name
    check_name(name)
    try:
        with open_regular(path) as file:
            content, stored = read_whole(file, str(path))
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    config = stored.adapter().config
    return Goods(name, content, config.base_name, config.base_fingerprint)


def check_name(name: object) -> None:
    """Raise ReftEdgeError unless `name` can be an adapter's: text that is safe as a file's name everywhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        raise ReftEdgeError(
            f"{name!r:.110} cannot be an adapter's name; expected at most 100 letters, digits, `.`, `_` and `-`, "
            f"the first a letter or digit and the last no dot, and neither {INDEX} nor a device's name"
        )


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def parse_index(content: bytes) -> list[Release]:
    """The releases that an index lists. Raises ReftEdgeError for anything else than such an index."""
    if len(content) > MAX_INDEX:
        raise ReftEdgeError(f"the index has more than {MAX_INDEX:,} bytes")
    try:
        index = parse_json(content.decode("utf-8-sig"), "content")
    except UnicodeDecodeError as error:
        raise ReftEdgeError("the index is not UTF-8") from error
    if index.get("format") != FORMAT:
        raise ReftEdgeError(f"it is not an index: its format is not {FORMAT!r}")
    if index.get("version") != VERSION:
        raise ReftEdgeError(
            f"the index has version {index.get('version')!r:.50}; this reft-edge reads {VERSION}: upgrade it"
        )
    entries = index.get("releases")
    if index.keys() != {"format", "version", "releases"} or not isinstance(entries, list):
        raise ReftEdgeError("the index does not hold format, version and a list of releases, and no more")
    releases = [_parse_release(entry) for entry in entries]
    if len({(release.name, release.version) for release in releases}) < len(releases):
        raise ReftEdgeError("the index lists a release twice")
    if len({release.name for release in releases}) > MAX_NAMES:
        raise ReftEdgeError(f"the index lists more than {MAX_NAMES:,} adapters")
    return releases


def render_index(releases: Iterable[Release]) -> bytes:
    """An index as `parse_index` reads it. Raises ReftEdgeError if there are too many for one."""
    releases = list(releases)
    if len({release.name for release in releases}) > MAX_NAMES:
        raise ReftEdgeError(
            f"the index would list more than {MAX_NAMES:,} adapters, which nobody reads; begin another repository"
        )
    head = json.dumps({"format": FORMAT, "version": VERSION})[:-1]
    entries = ",\n".join(json.dumps(vars(release), separators=(",", ":")) for release in releases)
    content = f'{head}, "releases": [\n{entries}\n]}}\n'.encode()
    if len(content) > MAX_INDEX:
        raise ReftEdgeError(
            f"the index would have {len(content):,} bytes, at most {MAX_INDEX:,} are read; begin another repository"
        )
    return content


def newest(
    releases: Sequence[Release], names: Sequence[str] = (), version: int | None = None
) -> list[Release]:
    """Of each name, or of every adapter where none is given, the newest release, or that of a version.

    Raises ReftEdgeError for a name or version that is not there.
    """
    if version is not None:
        wanted = [release for release in releases if release.version == version]
    else:
        wanted = sorted(releases, key=lambda release: release.version)
    found = {release.name: release for release in wanted}
    known = {release.name for release in releases}
    for name in names:
        if name not in known:
            raise ReftEdgeError(f"there is no adapter {name!r}; there are: {_some(known)}")
        if name not in found:
            versions = {str(release.version) for release in releases if release.name == name}
            raise ReftEdgeError(f"there is no version {version} of {name}; there are: {_some(versions)}")
    return [found[name] for name in (names or sorted(found))]


def next_releases(releases: Sequence[Release], goods: Sequence[Goods]) -> list[Release]:
    """What pushing makes of each: the next version, or the newest release itself where it has the same content."""
    versions = {release.name: release for release in newest(releases)}
    made = []
    for item in goods:
        last = versions.get(item.name)
        if last is not None and last.digest == item.digest:
            made.append(last)
        else:
            made.append(item.release(1 if last is None else last.version + 1))
    return made


def _parse_release(entry: Any) -> Release:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in dataclasses.fields(Release)}:
        raise ReftEdgeError(f"the index lists {entry!r:.100}, which is not a release")
    return Release(**entry)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(listed[:10]) + (", ..." if len(listed) > 10 else "") if listed else "none"
