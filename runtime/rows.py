"""The KV caches of a running batch.

Where past and present of a layer are one buffer in host memory, `JoinedRows` keeps rows of unlike lengths in one buffer a
layer, and runs them as one batch. Where they are not (a growing cache, a GPU), `SeparateRows` gives every row a cache of its
own and runs one after another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.runtime.binding import DecodeEdit, decode_inputs
from reft_edge.runtime.session import BoundSession, GraphSession, Ids, KVCache, Logits, present_name

_STEP = 256
KeysAndValues = dict[str, NDArray[np.generic]]
"""Of one row's first tokens, `[heads, tokens, head size]`, by the names of the graph's inputs."""


class JoinedRows:
    """Room for `rows` rows, right-padded: a row's tokens fill its first places, whatever its neighbours' lengths are."""

    def __init__(self, graph: GraphSession, rows: int) -> None:
        self.graph, self.rows, self.capacity = graph, rows, 0
        self._values: KeysAndValues = {}

    def start(self, row: int, tokens: int) -> bool:
        """Make room for at least `tokens` tokens in this row; whether memory moved, so that what was bound is stale."""
        return self._reserve(tokens)

    def _reserve(self, tokens: int) -> bool:
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

    def bind_prompt(self, row: int, ports: Mapping[str, Any]) -> "BoundRows":
        """One row, to be prefilled with these port inputs; stale once `start` moved memory."""
        return self._bind(row, 1, ports)

    def bind_decode(self, edits: Sequence[DecodeEdit]) -> "BoundRows":
        """The first rows, one an edit, to be decoded; stale once `start` moved memory."""
        ports = self.graph.to_device(decode_inputs(edits, self.graph.dtype))
        return self._bind(0, len(edits), ports)

    def _bind(self, first: int, count: int, ports: Mapping[str, Any]) -> "BoundRows":
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


class SeparateRows:
    """Room for `rows` rows, each in a cache of its own."""

    def __init__(self, graph: GraphSession, rows: int) -> None:
        self.graph, self.rows = graph, rows
        self._caches: list[KVCache | None] = [None] * (rows + 1)

    def start(self, row: int, tokens: int) -> bool:
        """Make room for at least `tokens` tokens in this row; no other row's memory moves."""
        left = self._caches[row]
        if left is not None and self.graph.shares_cache and left.capacity >= tokens:
            left.length = 0
        else:
            self._caches[row] = None
            self._caches[row] = self.graph.take_cache(1, tokens)
        return False

    def move(self, source: int, target: int, tokens: int) -> None:
        """Let two rows change places."""
        caches = self._caches
        caches[source], caches[target] = caches[target], caches[source]

    def read(self, row: int, tokens: int) -> KeysAndValues:
        """A copy of a row's first `tokens` tokens."""
        return {name: value.numpy()[0, :, :tokens].copy() for name, value in self._at(row).values.items()}

    def write(self, row: int, content: KeysAndValues, tokens: int) -> None:
        """Put the first `tokens` tokens of `content` at the start of a row."""
        cache = self._at(row)
        for name, value in cache.values.items():
            if self.graph.shares_cache:
                held = value.numpy()
                held[0, :, :tokens] = content[name][:, :tokens]
                value.update_inplace(held)
            else:
                held = np.ascontiguousarray(content[name][None, :, :tokens])
                cache.values[name] = self.graph.to_device({name: held})[name]
        cache.length = tokens

    def bind_prompt(self, row: int, ports: Mapping[str, Any]) -> "RowsInTurn":
        """One row, to be prefilled with these port inputs."""
        return RowsInTurn([self._bind(row, ports)])

    def bind_decode(self, edits: Sequence[DecodeEdit]) -> "RowsInTurn":
        """The first rows, one an edit, to be decoded."""
        ports = [self.graph.to_device(decode_inputs([edit], self.graph.dtype)) for edit in edits]
        return RowsInTurn([self._bind(row, inputs) for row, inputs in enumerate(ports)])

    def _bind(self, row: int, ports: Mapping[str, Any]) -> BoundSession:
        return self.graph.bind(self._at(row), ports)

    def _at(self, row: int) -> KVCache:
        cache = self._caches[row]
        assert cache is not None
        return cache


class RowsInTurn:
    """Bound rows that run one after another."""

    def __init__(self, rows: Sequence[BoundSession]) -> None:
        self._rows = rows

    def step(self, ids: Ids, lengths: Sequence[int]) -> Logits:
        """As `BoundRows.step`; each row's cache knows its length itself."""
        return np.concatenate([row.step(ids[i : i + 1]) for i, row in enumerate(self._rows)])
