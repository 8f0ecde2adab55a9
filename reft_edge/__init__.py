"""Train ReFT adapters, export the frozen model once to ONNX, swap kilobyte-sized adapters at run time.

    base = reft_edge.load("smollm2")
    run = reft_edge.train(base, rows, "pirate.safetensors", positions="f3+l3")
    with reft_edge.steered(base, run.adapter):
        print(base.generate("Who are you?"))
    reft_edge.export(base, "smol/")
    model = reft_edge.SteeredModel("smol/")

A name is imported when it is first used: `import reft_edge` needs no torch, and `SteeredModel` never does.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reft_edge.api import (
        FrozenModel,
        convert,
        evaluate,
        export,
        load,
        merge,
        pull,
        push,
        steered,
        train,
        train_many,
        tune,
    )
    from reft_edge.errors import ReftEdgeError
    from reft_edge.runtime import Engine, SteeredEncoder, SteeredModel
    from reft_edge.serving import ray_map

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "FrozenModel",
    "ReftEdgeError",
    "SteeredEncoder",
    "SteeredModel",
    "convert",
    "evaluate",
    "export",
    "load",
    "merge",
    "pull",
    "push",
    "ray_map",
    "steered",
    "train",
    "train_many",
    "tune",
]
_PLACES = {
    "Engine": "runtime",
    "ReftEdgeError": "errors",
    "SteeredEncoder": "runtime",
    "SteeredModel": "runtime",
    "ray_map": "serving",
}
"""Parts that public names are in; the others are in `api`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePart(ModuleType):
    """A part with the name of a function: `reft_edge.export(...)` is `reft_edge.api.export(...)`.

    The part's name is the folder's, where people look for it; the function's is what people call.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(import_module(f"{__package__}.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


class _Package(ModuleType):
    """This package. Python sets a part as its attribute once it is imported, in place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in __all__:
            value.__class__ = _CallablePart
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
