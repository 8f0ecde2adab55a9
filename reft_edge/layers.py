"""Which layers an adapter or an export names: `all`, `3;9;18`, `0-5`, or a mix of these."""

import re

from reft_edge.errors import ReftEdgeError


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
