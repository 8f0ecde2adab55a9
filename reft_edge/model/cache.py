"""The folder for downloaded and converted models, which nobody else may write to: what lies in it is used as it is."""

import os
import stat
import sys
from pathlib import Path

from reft_edge.errors import ReftEdgeError


def cache_folder() -> Path:
    """`$REFT_EDGE_CACHE`, else `$XDG_CACHE_HOME/reft-edge`, else `~/.cache/reft-edge`; made if it is not there.

    Raises ReftEdgeError if it cannot be made, or belongs to somebody else or can be written by everybody.
    """
    given = os.environ.get("REFT_EDGE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-edge"
    folder = Path(given) if given else base
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReftEdgeError(
            f"cannot make the cache folder {folder}: {error.strerror}; set REFT_EDGE_CACHE to another place"
        ) from error
    check_own(folder)
    return folder


def check_own(path: Path) -> None:
    """Raise ReftEdgeError if what is at `path` could have been put there by another user: it would be used unchecked."""
    if sys.platform == "win32":
        return
    try:
        found = path.stat()
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    if found.st_uid not in (0, os.geteuid()):
        raise ReftEdgeError(
            f"{path} belongs to another user, who could put other models there; set REFT_EDGE_CACHE to a folder of your own"
        )
    if found.st_mode & stat.S_IWOTH:
        raise ReftEdgeError(
            f"every user can write to {path}, and so put other models there; run `chmod o-w {path}` after a look at what is in it, "
            "or set REFT_EDGE_CACHE to a folder of your own"
        )
