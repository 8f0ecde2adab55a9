"""Which tasks of a list are finished already, in a file beside it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of, write_atomically
from reft_edge.json_files import read_object


@dataclass(frozen=True)
class Finished:
    """A task that was trained."""

    task: str
    """Digest of what it was."""
    sha256: str
    """Of its adapter file."""
    pushed: str = ""
    """The repository that has it."""


class Record:
    """What is finished; `path` None keeps it nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tasks: dict[str, Finished] = {}
        if path is not None and path.exists():
            try:
                self._tasks = {name: Finished(**_texts(one)) for name, one in read_object(path).items()}
            except (TypeError, ReftEdgeError) as error:
                raise ReftEdgeError(
                    f"{path} is not a record of finished tasks ({error}); delete it to train them all again"
                ) from error

    def of(self, name: str, task: str, output: Path) -> Finished | None:
        """What is known of a task, if it is still this one and its file is there as it was written."""
        found = self._tasks.get(name)
        if found is None or found.task != task or not output.is_file():
            return None
        return found if sha256_of(output) == found.sha256 else None

    def keep(self, name: str, finished: Finished) -> None:
        """Raises ReftEdgeError if the file cannot be written."""
        self._tasks[name] = finished
        if self._path is not None:
            content = {name: asdict(one) for name, one in self._tasks.items()}
            write_atomically(self._path, json.dumps(content, indent=1).encode())


def _texts(given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise ReftEdgeError("a task is described by something else than texts")
    return given
