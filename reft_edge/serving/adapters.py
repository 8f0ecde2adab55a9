"""The adapters of a worker: a folder that is there, or what repositories offer, brought to the worker's own disk."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.model.manifest import load_manifest
from reft_edge.signing.keys import TrustedKeys

Adapters = str | Path | Sequence[str | Path]
"""A folder of adapter files, a repository, or several repositories."""
_SCHEMES = ("oci://", "hf://", "https://", "http://")


def is_repository(adapters: str | Path) -> bool:
    """Whether adapters come over the network."""
    return str(adapters).startswith(_SCHEMES)


def kept(place: str | Path) -> str:
    """A repository's address, or a path that means the same in another process."""
    return str(place) if is_repository(place) else str(Path(place).resolve())


def places(adapters: Adapters | None) -> tuple[str, ...]:
    """Where adapters are, in words that mean the same in another process. Raises ReftEdgeError for a folder that is not there,
    or that is not alone."""
    if adapters is None:
        return ()
    given = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    for place in given:
        if not is_repository(place) and (len(given) > 1 or not Path(place).is_dir()):
            raise ReftEdgeError(
                f"there is no folder {place}; give a folder of adapter files, or a repository"
                if len(given) == 1
                else f"{place} is no repository; give one folder of adapter files, or any number of repositories"
            )
    return tuple(map(kept, given))


def local_folder(
    places: Sequence[str], export: Path, trusted: TrustedKeys | None = None, plain_http: bool = False
) -> Path | None:
    """A folder of adapter files for the model in `export`; None for none.

    The newest versions of repositories are installed into a folder of this user's and these repositories' own, which workers
    of a machine share. Raises ReftEdgeError if a repository cannot be read, or one of its adapters cannot be had.
    """
    if not places:
        return None
    if not is_repository(places[0]):
        return Path(places[0])
    with extra("ship"):
        from reft_edge.shipping.address import open_repository
        from reft_edge.shipping.pull import MAX_BYTES, pull
        from reft_edge.shipping.store import DeviceStore

    manifest = load_manifest(export)
    key = hashlib.sha256(" ".join([*places, manifest.base_fingerprint]).encode()).hexdigest()[:16]
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    store = Path(tempfile.gettempdir()) / f"reft-edge-{owner}" / key
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and store.parent.stat().st_uid != owner:
            raise PermissionError(13, "it belongs to another user", str(store.parent))
    except OSError as error:
        raise ReftEdgeError(f"cannot make {store} for adapters: {error.strerror}") from error
    for place in places:
        repository = open_repository(place, plain_http)
        pulled = pull(repository, DeviceStore(store), (), None, manifest, trusted, _silent, MAX_BYTES)
        if failed := [f"{one.name}: {one.reason}" for one in pulled if one.status == "failed"]:
            raise ReftEdgeError(f"not every adapter of {place} could be had: {'; '.join(failed)[:1000]}")
    return store


def _silent(message: str) -> None:
    return
