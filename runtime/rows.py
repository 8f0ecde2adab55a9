"""The KV caches of a running batch. They grow with the tokens that rows have, and shrink when long rows have left.

Where past and present of a layer are one buffer in host memory, `JoinedRows` keeps rows of unlike lengths in one buffer a
layer, and runs them as one batch. Where they are not (a growing cache, a GPU), `SeparateRows` gives every row a cache of its
own and runs one after another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.runtime.binding import DecodeEdit, decode_inputs
from reft_edge.runtime.memory import CAN_GIVE_BACK, NoMemoryError, fill, give_back, sparse_zeros
from reft_edge.runtime.session import BoundSession, GraphSession, KVCache, Logits, present_name
from reft_edge.runtime.step_inputs import Ids

ALIGNMENT = 16
"""Prompts run in parts that end at a multiple of this, so that every token is at the same place in a kernel's tile of rows
whatever the parts are."""
_BLOCK = 128
"""Rows that a kernel for quantised matrices takes at a time, at most; it has another way for one row."""
_STEP = 256
_AT_REST = 64 << 20
"""Bytes of a row's first tokens that may stay when no row runs."""
KeysAndValues = dict[str, NDArray[np.generic]]
"""Of one row's first tokens, `[heads, tokens, head size]`, by the names of the graph's inputs."""


def part_end(start: int, tokens: int, most: int) -> int:
    """Where the part of a prompt of `tokens` tokens ends that starts at `start` and has about `most` tokens, both multiples
    of ALIGNMENT. In no part of several tokens is the last one alone in a kernel's block of rows, where it would be rounded
    in another way."""
    end = min(start + most, tokens)
    if tokens - end == 1:
        return end - ALIGNMENT
    return end - 1 - ALIGNMENT if end - start > 1 and leaves_one(end - start) else end


def leaves_one(rows: int) -> bool:
    """Whether kernels that share rows out in blocks have one row for the last of them."""
    return rows % _BLOCK == 1


class JoinedRows:
    """Room for `rows` rows, right-padded: a row's tokens fill its first places, whatever its neighbours' lengths are."""

    grows = True
    """Whether room can be asked for when it is needed."""

    def __init__(self, graph: GraphSession, rows: int) -> None:
        self.graph, self.rows, self.capacity = graph, rows, 0
        self._beside = 0 if graph.rounds_rows_alike else 1
        """Rows that run beside one that is alone in its block, so that its numbers are those of a batch."""
        self._values: KeysAndValues = {}

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether `reserve` would do nothing."""
        most = max(needs)
        return most <= self.capacity and (self.capacity <= _STEP or 4 * most > self.capacity)

    def reserve(self, needs: Sequence[int], used: Sequence[int]) -> None:
        """Make room for `needs[i]` tokens in row i, of which the first `used[i]` are kept, and for twice as many, which take
        no memory before they come; give back room that is far too large. What was bound is stale then, unless it `fits`. Raises NoMemoryError; then nothing changed."""
        if self.fits(needs):
            return
        most = max(needs)
        wanted = max(most, min(2 * most, self.graph.context_length))
        capacity = -(-wanted // _STEP) * _STEP
        try:
            moved = {
                name: sparse_zeros((self.rows + self._beside, heads, capacity, size), self.graph.cache_dtype)
                for name, (heads, size) in self.graph.cache_shapes.items()
            }
        except NoMemoryError:
            if most <= self.capacity:
                return
            raise
        for name, values in moved.items():
            for row, count in enumerate(used):
                if count:
                    values[row, :, :count] = self._values[name][row, :, :count]
            self._values[name] = values
        self.capacity = capacity

    def clear(self) -> None:
        """Give all memory back; there are no rows left."""
        self._values, self.capacity = {}, 0

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row's first `tokens` tokens over another row."""
        for values in self._values.values():
            give_back(values[target])
            values[target, :, :tokens] = values[source, :, :tokens]

    def forget(self, row: int) -> None:
        """The row is no longer needed; its memory is given back."""
        for values in self._values.values():
            give_back(values[row])

    def keep(self, tokens: int) -> int:
        """The last row has left, which was the first: keep its first tokens, `tokens` or as many as may stay, and give back
        other memory. Returns how many they are; 0 where the memory of others cannot be given back."""
        sizes = [values.nbytes for values in self._values.values()]
        kept = min(tokens, _AT_REST // self.graph.token_bytes)
        if sum(sizes) <= _AT_REST:
            return kept
        if not CAN_GIVE_BACK:
            return 0
        for values in self._values.values():
            for head in values[0]:
                give_back(head[kept:])
        return kept

    def cut(self, row: int, tokens: int) -> None:
        """Only a row's first `tokens` tokens hold: others are written over, and nothing looks at them."""

    def read(self, row: int, tokens: int) -> KeysAndValues:
        """A copy of a row's first `tokens` tokens."""
        return {name: values[row, :, :tokens].copy() for name, values in self._values.items()}

    def write(self, row: int, content: KeysAndValues, tokens: int) -> None:
        """Put the first `tokens` tokens of `content` at the start of a row."""
        targets = [values[row] for values in self._values.values()]
        fill(targets, [content[name][:, :tokens] for name in self._values])

    def bind_prompt(self, row: int, ports: Mapping[str, Any]) -> "BoundRows":
        """One row, to be prefilled with these port inputs."""
        return self._bind(row, 1, 0, ports)

    def bind_decode(self, edits: Sequence[DecodeEdit]) -> "RowsTogether":
        """The first rows, one an edit, to be decoded."""
        return RowsTogether(self, edits)

    def bind_edits(self, first: int, edits: Sequence[DecodeEdit]) -> "BoundRows":
        """Rows from `first` on, one an edit, to be decoded."""
        beside = self._beside if leaves_one(len(edits)) else 0
        ports = self.graph.to_device(decode_inputs([*edits, *[{}] * beside], self.graph.dtype))
        return self._bind(first, len(edits), beside, ports)

    def bind_alone(self, row: int, edit: DecodeEdit) -> "BoundRows":
        """One row, to be decoded by itself."""
        return self.bind_edits(row, [edit])

    def bind_tokens(self, row: int, edit: DecodeEdit) -> "BoundRows":
        """One row, of which several generated tokens are to be run at a time."""
        return self._bind(row, 1, 0, self.graph.to_device(decode_inputs([edit], self.graph.dtype)))

    def _bind(self, first: int, count: int, beside: int, ports: Mapping[str, Any]) -> "BoundRows":
        last = first + count + beside
        values = {name: values[first:last] for name, values in self._values.items()}
        return BoundRows(self.graph, values, count, ports)


class BoundRows:
    """Some rows of a cache and a set of port inputs, bound to the session."""

    def __init__(
        self, graph: GraphSession, values: KeysAndValues, count: int, ports: Mapping[str, Any]
    ) -> None:
        """`count`: rows whose logits are wanted, the first of those in `values`."""
        self._graph, self._values, self._count, self._ports = graph, values, count, ports
        self._bound = len(next(iter(values.values())))
        self._binding = graph.new_binding(ports)
        self._inputs = graph.step_inputs(self._binding)
        for name, value in values.items():
            place = ("cpu", 0, graph.cache_dtype, value.shape, value.ctypes.data)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(present_name(name), *place)
        self._logits, self._kept = graph.bind_logits(self._binding, self._bound), 1

    def step(self, ids: Ids, lengths: Sequence[int]) -> Logits:
        """Run `ids [rows, tokens]`; logits of the last token, `[rows, vocabulary]`.

        `lengths`: the tokens that each row has, and then those of the row after them, 0 for none: it may run beside them,
        and keeps what it has. Several tokens at a time are for one row only.
        """
        return self._run(ids, lengths, 1)[:, -1]

    def step_all(self, ids: Ids, lengths: Sequence[int]) -> Logits:
        """As `step`; logits of every token, `[rows, tokens, vocabulary]`."""
        return self._run(ids, lengths, ids.shape[1])

    def _run(self, ids: Ids, lengths: Sequence[int], kept: int) -> Logits:
        if kept != self._kept:
            self._logits, self._kept = self._graph.bind_logits(self._binding, self._bound, kept), kept
        if self._bound > self._count:
            ids = np.concatenate([ids, np.zeros((self._bound - self._count, ids.shape[1]), ids.dtype)])
        starts = lengths[: self._bound]
        total = max(starts) + ids.shape[1]
        if self._bound == 1:
            mask = self._graph.ones(1, total)
        else:
            ends = np.array(starts, np.int64)[:, None] + ids.shape[1]
            mask = (np.arange(total) < ends).astype(np.int64)
        self._graph.run_bound(self._inputs, ids, mask, starts)
        logits = self._logits or self._binding.get_outputs()[-1]
        found: Logits = logits.numpy()[: self._count, -kept:].astype(np.float32, copy=False)
        return found


class RowsTogether:
    """Rows of one buffer, decoded as one batch."""

    def __init__(self, rows: JoinedRows, edits: Sequence[DecodeEdit]) -> None:
        self._rows, self._edits = rows, edits
        self._bound: BoundRows | None = None

    def step(self, ids: Ids, lengths: Sequence[int]) -> list[Logits | Exception]:
        """Run `ids [rows, 1]`, `lengths` as for `BoundRows.step`; each row's logits `[vocabulary]`, or what went wrong with
        it. Where the batch fails, its rows are tried one by one."""
        try:
            if self._bound is None:
                self._bound = self._rows.bind_edits(0, self._edits)
            return list(self._bound.step(ids, lengths))
        except Exception as error:
            self._bound = None
            if len(self._edits) == 1:
                return [error]
        return [self._alone(row, ids, lengths) for row in range(len(self._edits))]

    def _alone(self, row: int, ids: Ids, lengths: Sequence[int]) -> Logits | Exception:
        try:
            bound = self._rows.bind_edits(row, self._edits[row : row + 1])
            logits: Logits = bound.step(ids[row : row + 1], lengths[row:])[0]
        except Exception as error:
            return error
        return logits


class SeparateRows:
    """Room for `rows` rows, each in a cache of its own."""

    def __init__(self, graph: GraphSession, rows: int) -> None:
        self.graph, self.rows = graph, rows
        self.grows = graph.cache_in_numpy or not graph.shares_cache
        self._caches: list[KVCache | None] = [None] * (rows + 1)

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether `reserve` would do nothing."""
        return all(self._fits(cache, tokens) for cache, tokens in zip(self._caches, needs, strict=False))

    def reserve(self, needs: Sequence[int], used: Sequence[int]) -> None:
        """As `JoinedRows.reserve`. Raises ReftEdgeError if there is no memory; then nothing changed."""
        caches = [
            cache if self._fits(cache, tokens) else self._grown(cache, tokens, count)
            for cache, tokens, count in zip(self._caches, needs, used, strict=False)
        ]
        self._caches[: len(caches)] = caches

    def _fits(self, cache: KVCache | None, tokens: int) -> bool:
        return cache is not None and (not self.graph.shares_cache or tokens <= cache.capacity)

    def _grown(self, old: KVCache | None, tokens: int, used: int) -> KVCache:
        """A cache for `tokens` tokens or more, with the first `used` of the old one."""
        context = self.graph.context_length
        if not self.graph.shares_cache:
            return self.graph.take_cache(1, max(tokens, context))
        if old is None:
            return self.graph.take_cache(1, max(tokens, min(tokens + _STEP, context)))
        cache = self.graph.take_cache(1, max(tokens, min(2 * old.capacity, context)))
        self._put(cache, {name: value.numpy()[0, :, :used] for name, value in old.values.items()}, used)
        return cache

    def clear(self) -> None:
        """Give all memory back; there are no rows left."""
        self._caches = [None] * (self.rows + 1)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Let two rows change places."""
        caches = self._caches
        caches[source], caches[target] = caches[target], caches[source]

    def forget(self, row: int) -> None:
        """The row is no longer needed."""
        self._caches[row] = None

    def keep(self, tokens: int) -> int:
        """As `JoinedRows.keep`."""
        cache = self._at(0)
        if not self.graph.shares_cache or cache.capacity * self.graph.token_bytes > _AT_REST:
            return 0
        return tokens

    def cut(self, row: int, tokens: int) -> None:
        """Only a row's first `tokens` tokens hold."""
        self._at(row).length = tokens

    def read(self, row: int, tokens: int) -> KeysAndValues:
        """A copy of a row's first `tokens` tokens."""
        return {name: value.numpy()[0, :, :tokens].copy() for name, value in self._at(row).values.items()}

    def write(self, row: int, content: KeysAndValues, tokens: int) -> None:
        """Put the first `tokens` tokens of `content` at the start of a row."""
        self._put(self._at(row), content, tokens)

    def _put(self, cache: KVCache, content: KeysAndValues, tokens: int) -> None:
        for name, value in cache.values.items():
            if self.graph.shares_cache:
                held = value.numpy()
                held[0, :, :tokens] = content[name][:, :tokens]
                value.update_inplace(held)
            else:
                held = np.ascontiguousarray(content[name][None, :, :tokens])
                cache.values[name] = self.graph.to_device({name: held})[name]
        cache.length = tokens

    def bind_prompt(self, row: int, ports: Mapping[str, Any]) -> "RowInTurn":
        """One row, to be prefilled with these port inputs."""
        return RowInTurn(self.graph.bind(self._at(row), ports))

    def bind_decode(self, edits: Sequence[DecodeEdit]) -> "RowsInTurn":
        """The first rows, one an edit, to be decoded."""
        return RowsInTurn(self, edits)

    def bind_alone(self, row: int, edit: DecodeEdit) -> "RowInTurn":
        """One row, to be decoded by itself."""
        return RowInTurn(self.bind_edit(row, edit))

    def bind_tokens(self, row: int, edit: DecodeEdit) -> "RowInTurn":
        """One row, of which several generated tokens are to be run at a time."""
        return self.bind_alone(row, edit)

    def bind_edit(self, row: int, edit: DecodeEdit) -> BoundSession:
        """One row, to be decoded."""
        return self.graph.bind(self._at(row), self.graph.to_device(decode_inputs([edit], self.graph.dtype)))

    def _at(self, row: int) -> KVCache:
        cache = self._caches[row]
        assert cache is not None
        return cache


class RowInTurn:
    """A row that is prefilled."""

    def __init__(self, row: BoundSession) -> None:
        self._row = row

    def step(self, ids: Ids, lengths: Sequence[int]) -> Logits:
        """As `BoundRows.step`; the row's cache knows its length itself."""
        return self._row.step(ids)

    def step_all(self, ids: Ids, lengths: Sequence[int]) -> Logits:
        """As `BoundRows.step_all`, for a cache whose last tokens may have been taken back."""
        return self._row.step_all(ids, lengths[0])


class RowsInTurn:
    """Rows that are decoded one after another."""

    def __init__(self, rows: SeparateRows, edits: Sequence[DecodeEdit]) -> None:
        self._rows, self._edits = rows, edits
        self._bound: dict[int, BoundSession] = {}

    def step(self, ids: Ids, lengths: Sequence[int]) -> list[Logits | Exception]:
        """As `RowsTogether.step`."""
        return [self._alone(row, ids[row : row + 1]) for row in range(len(self._edits))]

    def _alone(self, row: int, ids: Ids) -> Logits | Exception:
        try:
            if row not in self._bound:
                self._bound[row] = self._rows.bind_edit(row, self._edits[row])
            logits: Logits = self._bound[row].step(ids)[0]
        except Exception as error:
            return error
        return logits
