"""Arguments of the API's functions, in the forms in which people give them, made what the parts take."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.signing.keys import TrustedKeys

AdapterFile = str | Path | tuple[str | Path, float]
"""An adapter file, or one with the scale of its edits."""
Report = Callable[[str], None]


def silent(message: str) -> None:
    """Tell nobody."""


def listed(given: Any) -> list[Any]:
    """One or several, as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def named_layers(given: Any) -> Any:
    """A list of numbers, or one, as the text that names them; anything else as it is."""
    numbers = list(given) if isinstance(given, list | tuple | range) else [given]
    return ";".join(map(str, numbers)) if all(type(number) is int for number in numbers) else given


def scaled(adapters: Sequence[AdapterFile]) -> list[tuple[Path, float]]:
    """Files and scales, 1 where there is none. Raises ReftEdgeError for anything else."""
    found = []
    for given in adapters:
        path, scale = (given, 1.0) if isinstance(given, str | Path) else _pair(given)
        found.append((Path(path), float(scale)))
    return found


def _pair(given: Any) -> tuple[str | Path, float]:
    match given:
        case (str() | Path() as path, int() | float() as scale) if math.isfinite(scale):
            return path, scale
    raise ReftEdgeError(
        f"an adapter is {given!r:.100}; expected a file's name, or a pair of one and a finite scale"
    )


def trusted_keys(keys: str | Path | None) -> "TrustedKeys | None":
    if keys is None:
        return None
    from reft_edge.signing.keys import load_trusted

    return load_trusted(keys)
