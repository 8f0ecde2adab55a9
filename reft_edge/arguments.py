"""Arguments of the API's functions, in the forms in which people give them, made what the parts take."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args, get_origin

from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.signing.keys import TrustedKeys

AdapterFile = str | Path | tuple[str | Path, float]
"""An adapter file, or one with the scale of its edits."""
Report = Callable[[str], None]
GENAI, OPTIMUM = "genai", "optimum"
"""Exporters: onnxruntime-genai's builder, and Optimum's."""


P = ParamSpec("P")
T = TypeVar("T")
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    Path: ((PathLike,), "a path"),
    bool: ((bool,), "True or False"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    Mapping: ((Mapping,), "a dict"),
    Sequence: ((Iterable,), "a list"),
    NoneType: ((NoneType,), "None"),
}
"""What an annotation accepts, and its name in a message."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which raises ReftEdgeError for an argument of a type that its annotation does not name.

    Annotations of other types than texts, paths, numbers, lists and the like are not looked at.
    """
    signature = inspect.signature(function)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    kinds = {
        name: _kinds(parameter.annotation)
        for name, parameter in signature.parameters.items()
        if parameter.kind not in several
    }
    known = {name: found for name, found in kinds.items() if all(kind in _KINDS for kind in found)}

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in known and not any(_is(value, kind) for kind in known[name]):
                expected = " or ".join(_KINDS[kind][1] for kind in known[name])
                raise ReftEdgeError(f"{name} is {value!r:.100}; expected {expected}")
        return function(*args, **kwargs)

    return checking


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation names."""
    named = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [get_origin(kind) or kind for kind in named]


def _is(value: Any, kind: Any) -> bool:
    """`True` is no number."""
    return isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))


def silent(message: str) -> None:
    """Tell nobody."""


def listed(given: Any) -> list[Any]:
    """One or several, as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


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


def check_exporter(name: str) -> None:
    """Raise ReftEdgeError for an exporter that there is not."""
    if name not in (GENAI, OPTIMUM):
        raise ReftEdgeError(f"unknown exporter {name!r}; choose one of {GENAI}, {OPTIMUM}")
