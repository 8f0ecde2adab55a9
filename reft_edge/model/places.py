"""Places in a model where an edit can act."""

import re
from typing import Any, NamedTuple

from reft_edge.errors import ReftEdgeError

COMPONENTS = ("block", "attention", "mlp")
PORT_KINDS = ("affine", "act", "diagonal")
"""What a port can add to h: (hA + b)B, the same with an activation, and s ⊙ h."""


class Place(NamedTuple):
    """One hidden state of one layer."""

    layer: int
    component: str = "block"
    """`block`: the residual stream after the whole layer; `attention` or `mlp`: what that part gives, before it joins
    the residual stream (and before a norm or a factor that the model puts in between). pyreft's block_output,
    attention_output and mlp_output."""

    @property
    def port(self) -> str:
        """What the names of a port's inputs begin with."""
        return f"reft.layers.{self.layer}" + ("" if self.component == "block" else f".{self.component}")

    def __str__(self) -> str:
        return str(self.layer) if self.component == "block" else f"{self.layer} ({self.component})"


def named_layers(given: Any) -> Any:
    """A list of numbers, or one, as the text that names them; anything else as it is."""
    numbers = list(given) if isinstance(given, list | tuple | range) else [given]
    return ";".join(map(str, numbers)) if all(type(number) is int for number in numbers) else given


def parse_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Layers in ascending order, without repeats. Layers count from 0; a range includes both ends.

    Raises ReftEdgeError for text that is not a layer list or a layer the model does not have.
    """
    if spec.strip() == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in re.split(r"[;,]", spec):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None:
            raise ReftEdgeError(
                f"layers {spec!r}: cannot read {part!r}; write `all`, `3;9;18`, `0-5` or a mix"
            )
        start, stop = int(match[1]), int(match[2] or match[1])
        if stop < start:
            raise ReftEdgeError(
                f"layers {spec!r}: the range {part.strip()} runs backwards; write {stop}-{start}"
            )
        if stop >= num_layers:
            raise ReftEdgeError(
                f"layers {spec!r}: no layer {stop}; the model has layers 0 to {num_layers - 1}"
            )
        chosen.update(range(start, stop + 1))
    return tuple(sorted(chosen))
