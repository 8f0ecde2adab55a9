"""From a repository into a store: choose, download, check, install."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from reft_edge.adapter.file import StoredAdapter
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.shipping import locking
from reft_edge.shipping.parts import Part, Parts
from reft_edge.shipping.release import Release, newest
from reft_edge.shipping.repository import BrokenOffError, Repository
from reft_edge.shipping.store import DeviceStore, Kept, State
from reft_edge.signing.keys import TrustedKeys
from reft_edge.signing.signatures import verify

ATTEMPTS = 5
PAUSE = 1.0
"""Seconds before the second attempt; before every further one twice as long."""
PATIENCE = 900.0
"""Seconds after which no further attempt begins."""
LONGEST = 4 * 3600.0
"""Seconds after which a pull begins no further download."""
MAX_BYTES = 2 * 10**9
"""That one pull downloads, if nothing else is said."""

_POLL = 0.2

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
    max_bytes: int = MAX_BYTES,
) -> list[Pulled]:
    """Install the newest release of each name, or of all adapters, or a certain version of one.

    With `base`, an exported folder's manifest, adapters for other models are left out, or fail if named; with `trusted`,
    those that are not signed with one of its keys fail. One that fails leaves its installed version, and the others,
    as they are. A newest release that is older than what is installed, or was rolled back here, is not installed.

    All downloads together, broken ones too, are announced to have at most `max_bytes`; those that would be more fail. Of
    each, the store keeps a second copy to roll back to. Other processes can use the store meanwhile.

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
    if not wanted:
        return []
    parts = Parts(store, repository.address)
    with store.changing():
        parts.sweep(wanted, max_bytes)
    one = _Puller(repository, store, parts, version is not None, base, trusted, report, max_bytes)
    return [one.pull(release) for release in wanted]


class _Puller:
    """What is the same for all adapters of one pull."""

    def __init__(
        self,
        repository: Repository,
        store: DeviceStore,
        parts: Parts,
        asked: bool,
        base: Manifest | None,
        trusted: TrustedKeys | None,
        report: Report,
        max_bytes: int,
    ) -> None:
        """`asked`: whether the user named the version, whatever is installed."""
        self._repository, self._store, self._parts = repository, store, parts
        self._asked, self._base, self._trusted, self._report = asked, base, trusted, report
        self._max_bytes = self._left = max_bytes
        self._end = time.monotonic() + LONGEST

    def pull(self, release: Release) -> Pulled:
        try:
            return self._pull(release)
        except (ReftEdgeError, OSError) as error:
            return _outcome(release, "failed", _before(self._store, release), str(error))

    def _pull(self, release: Release) -> Pulled:
        """The store's lock is held to look and to install, not while the server is asked."""
        found = self._begin(release)
        if isinstance(found, Pulled):
            return found
        part = found
        try:
            try:
                self._reserve(release, part)
            except ReftEdgeError:
                part.cut(0)  # or what is kept for later would grow with every pull
                raise
            download(self._repository, release, part, self._report)
            try:
                content, stored = _readable(lambda: part.read(str(release)))
                _check(stored, release, self._base, self._trusted)
            except ReftEdgeError:
                part.cut(0)
                raise
            with self._store.changing():
                state = self._store.state(release.name)
                reason = self._reason_to_keep(release, state)
                if not reason:
                    self._store.install(release, content)
            part.cut(0)
            return _outcome(release, "kept" if reason else "installed", _installed(state), reason)
        finally:
            try:
                with self._store.changing():
                    part.put_away()
            finally:
                part.release()

    def _begin(self, release: Release) -> Part | Pulled:
        """The file to download to, once no other process has it, or what became of the release without one."""
        end = time.monotonic() + locking.PATIENCE
        while True:
            with self._store.changing():
                state = self._store.state(release.name)
                before = _installed(state)
                if state.digest == release.digest:
                    content, stored = _readable(lambda: self._store.read(release.name, str(release)))
                    _check(stored, release, self._base, self._trusted)
                    self._store.install(release, content)
                    self._parts.drop(release)
                    return _outcome(release, "current", before)
                if reason := self._reason_to_keep(release, state):
                    self._store.tidy(release.name)
                    self._parts.drop(release)
                    return _outcome(release, "kept", before, reason)
                part = self._parts.take(release)
            if part is not None:
                return part
            if time.monotonic() > end:
                raise ReftEdgeError(
                    f"another process has been downloading {release} for {locking.PATIENCE:,.0f} s; try again when it is done"
                )
            time.sleep(_POLL)

    def _reserve(self, release: Release, part: Part) -> None:
        """Raise ReftEdgeError if the release is too much for this pull or the disk, or comes too late."""
        if time.monotonic() > self._end:
            raise ReftEdgeError(
                f"this pull has taken longer than {LONGEST / 3600:g} hours; pull again for {release}"
            )
        if release.size > self._left:
            raise ReftEdgeError(
                f"{release} has {release.size:,} bytes, and {self._left:,} are left of the {self._max_bytes:,} that one pull "
                "downloads; name adapters to pull fewer at once, or allow more with --max-bytes"
            )
        needed = 3 * release.size - part.size  # the rest of the part, the file, and its copy to roll back to
        free = shutil.disk_usage(self._store.folder).free
        if needed > free:
            raise ReftEdgeError(
                f"cannot write to {self._store.folder}: No space left on device: {release} needs {needed:,} bytes, and "
                f"{free:,} are free"
            )
        self._left -= release.size

    def _reason_to_keep(self, release: Release, state: State) -> str:
        return "" if self._asked else _reason_to_keep(release, state.undone, _installed(state))


def _outcome(release: Release, status: str, before: int | None, reason: str = "") -> Pulled:
    installed = release.version if status in ("installed", "current") else before
    return Pulled(release.name, status, release.version, installed, before, release.digest, reason)


def _installed(state: State) -> int | None:
    """The installed version; 0 for a file put there by hand, None for no file."""
    return state.version if state.installed or state.digest is None else 0


def _before(store: DeviceStore, release: Release) -> int | None:
    try:
        return _installed(store.state(release.name))
    except (ReftEdgeError, OSError):
        return None


def download(
    repository: Repository, release: Release, part: Part, report: Report = lambda message: None
) -> None:
    """Complete a part, from where an earlier attempt ended, and check its size and digest.

    After a connection that broke, what has arrived is kept and the rest asked for, at most ATTEMPTS times. Raises
    ReftEdgeError if that was in vain (what arrived remains for the next time) or the content is not the release's (it does
    not).
    """
    _patiently(lambda: _continue(repository, release, part), report)


def _continue(repository: Repository, release: Release, part: Part) -> None:
    if part.size > release.size:
        part.cut(0)
    begun = part.size
    if part.size < release.size:
        with repository.open(release, part.size) as (start, pieces):
            if start != part.size:
                part.cut(start)
                begun = start
            for piece in pieces:
                if part.size + len(piece) > release.size:
                    raise ReftEdgeError(
                        f"{release} is longer than the {release.size:,} bytes that were announced"
                    )
                part.add(piece)
        part.flush()
    if part.size < release.size:
        raise BrokenOffError(f"{release} ended after {part.size:,} of {release.size:,} bytes")
    if part.digest != release.digest:
        part.cut(0)
        # What was there before may be at fault: a file half written when the power went, or of another time.
        kind = BrokenOffError if begun else ReftEdgeError
        raise kind(f"{release} has another content than the repository's digest says; nothing was installed")


def _readable(read: Callable[[], Result]) -> Result:
    try:
        return read()
    except AdapterFileError as error:
        raise ReftEdgeError(f"the repository offers something unusable: {error}") from error


def _check(
    stored: StoredAdapter, release: Release, base: Manifest | None, trusted: TrustedKeys | None
) -> None:
    _readable(stored.adapter)
    _check_base(stored, release, base)
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
    end = time.monotonic() + PATIENCE
    for attempt in range(ATTEMPTS):
        try:
            return step()
        except BrokenOffError as error:
            if attempt == ATTEMPTS - 1 or time.monotonic() > end:
                raise
            report(f"{error}; trying again")
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
