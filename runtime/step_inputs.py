"""The inputs that are new in every step: tokens, their mask and their positions. A step of one token is short, so what Python
does between two of them counts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_FIRST_ONES = 1024


class StepInputs:
    """An I/O binding, and arrays that are bound to it."""

    def __init__(self, binding: Any, in_place: bool) -> None:
        """`in_place`: the session reads inputs where they lie when it runs, and does not copy them when they are bound."""
        self.binding, self._in_place = binding, in_place
        self._bound: dict[str, Ids] = {}

    def give(self, name: str, array: Ids) -> None:
        """Bind a copy of an array, or write it over the last one of its shape."""
        bound = self._bound.get(name)
        if self._in_place and bound is not None and bound.shape == array.shape:
            bound[...] = array
        else:
            self._bound[name] = np.array(array, np.int64, order="C")
            self.binding.bind_cpu_input(name, self._bound[name])

    def give_mask(self, mask: Ids) -> None:
        """Bind a mask `[rows, tokens]`, which is of another shape in every step. It must not change before the run."""
        self.binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask, np.int64))


class Ones:
    """Masks of one row without padding: views of one array."""

    def __init__(self) -> None:
        self._array: Ids = np.ones((1, _FIRST_ONES), np.int64)

    def __call__(self, rows: int, tokens: int) -> Ids:
        """`[rows, tokens]` ones; not to be written to."""
        if rows > 1:
            return np.ones((rows, tokens), np.int64)
        if tokens > self._array.shape[1]:
            self._array = np.ones((1, 2 * tokens), np.int64)
        return self._array[:, :tokens]
