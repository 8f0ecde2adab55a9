"""From a repository into a store: choose, download, check, install."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reft_edge.adapter import StoredAdapter, parse_stored
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.manifest import Manifest
from reft_edge.shipping.release import Release, newest
from reft_edge.shipping.repository import BrokenOffError, Repository
from reft_edge.shipping.store import DeviceStore, Kept
from reft_edge.signing import TrustedKeys, verify

ATTEMPTS = 5
PAUSE = 1.0
"""Seconds before the second attempt; before every further one twice as long."""

Report = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pulled:
    """What became of one adapter."""

    name: str
    status: str
    """installed, current (it was installed already), kept (what is installed goes before), or failed."""
    version: int
    """That the repository offers."""
    installed: int | None
    """The version that is installed now; 0 for a file put there by hand, None for no file."""
    previous: int | None
    """The version that was installed before."""
    digest: str
    reason: str = ""
    """Why it was kept or failed."""


def pull(
    repository: Repository,
    store: DeviceStore,
    names: Sequence[str] = (),
    version: int | None = None,
    base: Manifest | None = None,
    trusted: TrustedKeys | None = None,
    report: Report = lambda message: None,
) -> list[Pulled]:
    """Install the newest release of each name, or of all adapters, or a certain version of one.

    With `base`, an exported folder's manifest, adapters for other models are left out, or fail if named; with `trusted`,
    those that are not signed with one of its keys fail. One that fails leaves its installed version, and the others,
    as they are. A newest release that is older than what is installed, or was rolled back here, is not installed.

    Raises ReftEdgeError if the repository cannot be read or has no such adapter.
    """
    offered = _patiently(lambda: repository.releases(version), report)
    wanted = newest(offered, names, version)
    if version is not None and len(wanted) != 1:
        found = (
            f"{len(wanted)} adapters have a version {version}; name one"
            if wanted
            else f"no adapter has a version {version}"
        )
        raise ReftEdgeError(f"in {repository.address}, {found}")
    if base is not None and not names:
        wanted = [release for release in wanted if release.base_fingerprint in ("", base.base_fingerprint)]
    return [
        _pull_one(repository, store, release, version is not None, base, trusted, report)
        for release in wanted
    ]


def _pull_one(
    repository: Repository,
    store: DeviceStore,
    release: Release,
    asked: bool,
    base: Manifest | None,
    trusted: TrustedKeys | None,
    report: Report,
) -> Pulled:
    def outcome(status: str, installed: int | None, reason: str = "") -> Pulled:
        return Pulled(release.name, status, release.version, installed, before, release.digest, reason)

    before: int | None = None
    try:
        with store.changing():
            state = store.state(release.name)
            before = state.version if state.installed or state.digest is None else 0
            if state.digest == release.digest:
                content = store.path(release.name).read_bytes()
                _check(content, release, base, trusted)
                store.install(release, content)
                return outcome("current", release.version)
            if not asked and (reason := _reason_to_keep(release, state.undone, before)):
                store.tidy(release.name)
                return outcome("kept", before, reason)
            part = store.part(release)
            download(repository, release, part, report)
            content = part.read_bytes()
            try:
                _check(content, release, base, trusted)
            except ReftEdgeError:
                part.unlink()
                raise
            store.install(release, content)
    except (ReftEdgeError, OSError) as error:
        return outcome("failed", before, str(error))
    return outcome("installed", release.version)


def download(
    repository: Repository, release: Release, part: Path, report: Report = lambda message: None
) -> None:
    """Complete the file `part`, from where an earlier attempt ended, and check its size and digest.

    After a connection that broke, what has arrived is kept and the rest asked for, at most ATTEMPTS times. Raises
    ReftEdgeError if that was in vain (`part` remains for the next time) or the content is not the release's (it does not).
    """
    _patiently(lambda: _continue(repository, release, part), report)


def _continue(repository: Repository, release: Release, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have > release.size:
        part.unlink()
        have = 0
    begun = have
    if have < release.size:
        with repository.open(release, have) as (start, pieces), part.open("ab") as file:
            if start != have:
                file.truncate(start)
                begun = have = start
            for piece in pieces:
                have += len(piece)
                if have > release.size:
                    raise ReftEdgeError(
                        f"{release} is longer than the {release.size:,} bytes that were announced"
                    )
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    if have < release.size:
        raise BrokenOffError(f"{release} ended after {have:,} of {release.size:,} bytes")
    if f"sha256:{sha256_of(part)}" != release.digest:
        part.unlink()
        # What was there before may be at fault: a file half written when the power went, or of another time.
        kind = BrokenOffError if begun else ReftEdgeError
        raise kind(f"{release} has another content than the repository's digest says; nothing was installed")


def _check(content: bytes, release: Release, base: Manifest | None, trusted: TrustedKeys | None) -> None:
    try:
        stored = parse_stored(content, str(release))
        stored.adapter()
        _check_base(stored, release, base)
    except AdapterFileError as error:
        raise ReftEdgeError(f"the repository offers something unusable: {error}") from error
    if trusted is not None:
        verify(stored, trusted)


def _check_base(stored: StoredAdapter, release: Release, base: Manifest | None) -> None:
    config = stored.config
    if release.base_fingerprint not in ("", config.base_fingerprint):
        raise ReftEdgeError(
            f"{release} is for the base {config.base_fingerprint}, while the repository says {release.base_fingerprint}"
        )
    if base is not None:
        base.check_base(config.base_fingerprint, str(release), config.base_name)


def _reason_to_keep(release: Release, undone: Sequence[Kept], installed: int | None) -> str:
    install = f"`--version {release.version}` installs it all the same"
    if any(kept.digest == release.digest for kept in undone):
        return f"version {release.version} was rolled back here; {install}"
    if (latest := max((kept.version for kept in undone), default=0)) >= release.version:
        return f"the repository's newest is version {release.version}, and version {latest} was rolled back here; {install}"
    if installed is not None and installed == release.version:
        return f"the repository has other content as version {release.version}; {install}"
    if installed is not None and installed > release.version:
        return f"the repository's newest is version {release.version}; {install}"
    return ""


def _patiently(step: Callable[[], Result], report: Report) -> Result:
    for attempt in range(ATTEMPTS):
        try:
            return step()
        except BrokenOffError as error:
            if attempt == ATTEMPTS - 1:
                raise
            report(f"{error}; trying again")
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
