"""A training's state on disk, so that one that was interrupted goes on."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically

State = dict[str, Tensor]
_DTYPES = {"torch.float32": "F32", "torch.float64": "F64"}


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors, with what the training belongs to in the header."""

    path: Path
    belongs_to: dict[str, Any]

    def save(self, tensors: State, step: int) -> None:
        """Write the state as it is after `step` steps. Raises ReftEdgeError if it cannot be written; the old one is then kept."""
        self.save_to(self.path, tensors, step)

    def save_to(self, path: Path, tensors: State, step: int) -> None:
        """The same under another name."""
        metadata = {"step": str(step), "belongs_to": json.dumps(self.belongs_to)}
        write_atomically(path, save_tensors(tensors, metadata))

    def load(self, expected: Callable[[int], State]) -> tuple[State, int] | None:
        """The saved state and its step; None if there is no checkpoint.

        `expected` gives tensors of the names, shapes and types that a state has after so many steps; it raises
        ReftEdgeError for a count that the training cannot have. Nothing is read before all of them agree. Raises
        ReftEdgeError if the file is unreadable, of another form, or of other settings, data or base.
        """
        if not self.path.exists():
            return None
        with self._usable(), safe_open(self.path, "pt") as file:
            step, other = _header(file.metadata())
            if differing := sorted(_flatten(self.belongs_to).items() ^ other.items()):
                names = sorted({name for name, _ in differing})
                raise OtherTrainingError(
                    f"{self.path} is of another training; these differ: {', '.join(names)}. "
                    "Use the same settings and data, or delete it to start again"
                )
            wanted = expected(step)
            found = set(file.keys())
            if unlike := sorted(found ^ wanted.keys()):
                raise ReftEdgeError(
                    f"{len(unlike)} tensors are missing or not known, {unlike[0]!r} among them"
                )
            for name, tensor in wanted.items():
                view = file.get_slice(name)
                shape, kind = list(view.get_shape()), view.get_dtype()
                if (shape, kind) != (list(tensor.shape), _DTYPES[str(tensor.dtype)]):
                    raise ReftEdgeError(
                        f"{name} is {kind} of shape {shape}; expected {_DTYPES[str(tensor.dtype)]} of {list(tensor.shape)}"
                    )
            return {name: file.get_tensor(name) for name in wanted}, step

    def unusable(self, reason: object) -> ReftEdgeError:
        """The error for a checkpoint that is not sound."""
        return ReftEdgeError(f"{self.path} is not a usable checkpoint ({reason}); delete it to start again")

    def is_mine(self) -> bool:
        """Whether the file is there and of this training."""
        try:
            with safe_open(self.path, "pt") as file:
                return _header(file.metadata())[1] == _flatten(self.belongs_to)
        except (OSError, ReftEdgeError, SafetensorError):
            return False

    def remove(self) -> bool:
        """Delete the file if it is of this training; says whether it was."""
        mine = self.is_mine()
        if mine:
            self.path.unlink(missing_ok=True)
        return mine

    def move_aside(self) -> Path | None:
        """Give what stands here and is of another training a name of its own; None if there is nothing such.

        Raises ReftEdgeError if it cannot be moved.
        """
        if not self.path.exists() or self.is_mine():
            return None
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in range(1, 1000))
        free = next((name for name in names if not name.exists()), None)
        if free is None:
            raise ReftEdgeError(f"there are too many old checkpoints beside {self.path}; delete some")
        try:
            self.path.rename(free)
        except OSError as error:
            raise ReftEdgeError(f"cannot move {self.path} aside: {error.strerror}") from error
        return free

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OtherTrainingError:
            raise
        except (SafetensorError, OSError, ReftEdgeError) as error:
            raise self.unusable(error) from error


class OtherTrainingError(ReftEdgeError):
    """A checkpoint of other settings, data or base."""


def _header(metadata: dict[str, str] | None) -> tuple[int, dict[str, str]]:
    """Step and flattened description. Raises ReftEdgeError for a header of another form."""
    given = metadata or {}
    step = given.get("step", "")
    if not re.fullmatch("[1-9][0-9]{0,14}", step, re.ASCII):
        raise ReftEdgeError(f"its step is {step!r:.40}; expected a number")
    try:
        belongs_to = json.loads(given.get("belongs_to", ""))
        if isinstance(belongs_to, dict) and isinstance(belongs_to.get("settings"), dict):
            return int(step), _flatten(belongs_to)
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError("its description is not valid JSON") from error
    raise ReftEdgeError("its description has no settings")


def _flatten(belongs_to: dict[str, Any]) -> dict[str, str]:
    flat = {key: json.dumps(value) for key, value in belongs_to.items() if key != "settings"}
    return flat | {key: json.dumps(value) for key, value in belongs_to["settings"].items()}
