"""The KV cache of a running batch: rows of unlike lengths in one buffer a layer, bound to the session without copies."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.session import GraphSession, Ids, Logits, present_name

_STEP = 256
KeysAndValues = dict[str, NDArray[np.generic]]
"""Of one row's first tokens, `[heads, tokens, head size]`, by the names of the graph's inputs."""


class RowCache:
    """Room for `rows` rows. Any run of neighbouring rows can be run as a batch, since a row is one piece of memory.

    Rows are right-padded: a row's tokens fill its first places, whatever its neighbours' lengths are. Raises
    ReftEdgeError if the graph's cache is not one that past and present share, in host memory.
    """

    def __init__(self, graph: GraphSession, rows: int) -> None:
        if not graph.shares_cache or graph.device != "cpu":
            raise ReftEdgeError(
                "rows of unlike lengths need a graph on the CPU whose KV caches are shared buffers"
            )
        self.graph, self.rows, self.capacity = graph, rows, 0
        self._values: KeysAndValues = {}

    def reserve(self, tokens: int) -> bool:
        """Make room for at least `tokens` tokens a row; whether memory moved, so that what was bound is stale."""
        if tokens <= self.capacity:
            return False
        capacity = -(-max(tokens, min(2 * self.capacity, tokens + 4 * _STEP)) // _STEP) * _STEP
        for name, (heads, size) in self.graph.cache_shapes.items():
            grown = np.zeros((self.rows, heads, capacity, size), self.graph.cache_dtype)
            if self.capacity:
                grown[:, :, : self.capacity] = self._values[name]
            self._values[name] = grown
        self.capacity = capacity
        return True

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row's first `tokens` tokens over another row."""
        for values in self._values.values():
            values[target, :, :tokens] = values[source, :, :tokens]

    def read(self, row: int, tokens: int) -> KeysAndValues:
        """A copy of a row's first `tokens` tokens."""
        return {name: values[row, :, :tokens].copy() for name, values in self._values.items()}

    def write(self, row: int, content: KeysAndValues, tokens: int) -> None:
        """Put the first `tokens` tokens of `content` at the start of a row."""
        for name, values in self._values.items():
            values[row, :, :tokens] = content[name][:, :tokens]

    def bind(self, first: int, count: int, ports: Mapping[str, Any]) -> "BoundRows":
        """Bind rows `first` to `first + count` with port inputs; stale once `reserve` moved memory."""
        return BoundRows(
            self.graph, {name: values[first : first + count] for name, values in self._values.items()}, ports
        )


class BoundRows:
    """Some rows of a cache and a set of port inputs, bound to the session."""

    def __init__(self, graph: GraphSession, values: KeysAndValues, ports: Mapping[str, Any]) -> None:
        self._graph, self._values = graph, values
        self.count = len(next(iter(values.values())))
        self._binding = graph.new_binding(ports)
        for name, value in values.items():
            place = ("cpu", 0, graph.cache_dtype, value.shape, value.ctypes.data)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(present_name(name), *place)
        self._logits = graph.bind_logits(self._binding, self.count)

    def step(self, ids: Ids, lengths: Sequence[int]) -> Logits:
        """Run `ids [rows, tokens]` after the `lengths` tokens that each row has; logits of the last, `[rows, vocabulary]`.

        Several tokens at a time are for one row only.
        """
        ends = np.array(lengths, np.int64)[:, None] + ids.shape[1]
        total = int(ends.max())
        mask = (np.arange(total) < ends).astype(np.int64)
        positions = ends - ids.shape[1] + np.arange(ids.shape[1])
        self._graph.run_bound(self._binding, ids, mask, positions)
        logits = self._logits or self._binding.get_outputs()[-1]
        last: Logits = logits.numpy()[:, -1].astype(np.float32, copy=False)
        return last
