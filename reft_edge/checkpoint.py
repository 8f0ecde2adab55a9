"""A training's state on disk, so that one that was interrupted goes on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors, with what the training belongs to in the header."""

    path: Path
    belongs_to: dict[str, Any]

    def save(self, tensors: dict[str, Tensor], step: int) -> None:
        """Write the state as it is after `step` steps."""
        metadata = {"step": str(step), "belongs_to": json.dumps(self.belongs_to)}
        write_atomically(self.path, save_tensors(tensors, metadata))

    def load(self) -> tuple[dict[str, Tensor], int] | None:
        """The saved state and its step; None if there is no checkpoint.

        Raises ReftEdgeError if it is unreadable or of other settings, data or base.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, other = int(metadata["step"]), _flatten(json.loads(metadata["belongs_to"]))
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ReftEdgeError(
                f"{self.path} is not a usable checkpoint ({error}); delete it to start again"
            ) from error
        if differing := sorted(_flatten(self.belongs_to).items() ^ other.items()):
            names = sorted({name for name, _ in differing})
            raise ReftEdgeError(
                f"{self.path} is of another training; these differ: {', '.join(names)}. "
                "Use the same settings and data, or delete it to start again"
            )
        return tensors, step


def _flatten(belongs_to: dict[str, Any]) -> dict[str, str]:
    flat = {key: json.dumps(value) for key, value in belongs_to.items() if key != "settings"}
    return flat | {key: json.dumps(value) for key, value in belongs_to["settings"].items()}
