"""The files of a stranger's folder, opened once."""

import os
from pathlib import Path
from typing import BinaryIO

from reft_edge.files import open_regular


def open_inside(path: Path) -> BinaryIO:
    """Open a file of a stranger's folder for reading; a link out of the folder is refused, as is what is no regular file.

    A link may lead to another file of the same folder, and from a snapshot in the cache of the Hugging Face Hub to that
    model's `blobs`. Raises OSError.
    """
    if not path.is_symlink():
        return open_regular(path, follow=False)
    home = Path(os.path.realpath(path.parent))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = Path(os.path.realpath(path))
    return open_regular(target if target.parent in homes else path, follow=False)
