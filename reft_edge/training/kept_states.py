"""Hidden states below the lowest edit, which no step changes: computed once a row, and kept.

They are in memory, or in a file that is mapped into memory. They are given up where reading them takes longer than
computing them.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from reft_edge.model.blocks import decoder_layers
from reft_edge.model.places import Place
from reft_edge.training.replaced_forwards import replaced_forwards

Key = tuple[int, ...]
"""A row's tokens."""
_TRIED = 3
"""Passes that read before it is asked whether that pays."""


class KeptStates:
    """Hidden states behind the blocks that nothing below edits, of the rows of a training.

    `of` says of the next pass which rows it has, and where their tokens are in it.
    """

    def __init__(self, last: int, lengths: dict[Key, int], size: int, report: Callable[[str], None]) -> None:
        """`last`: the highest block that no edit comes before. `lengths`: tokens that are run of each row. `size`: of the
        hidden states.
        """
        self._last, self._size, self._report = last, size, report
        self.file: Path | None = None
        """Holds them in place of memory."""
        self._first: dict[Key, int] = {}
        count = 0
        for key, length in lengths.items():
            self._first[key] = count
            count += length
        self._count = count
        self._states: Tensor | None = None
        self._full: set[Key] = set()
        self._tokens: tuple[Tensor, Tensor] | None = None
        """Where the next pass's tokens are among all states, and in the pass; None for a pass of no row that is known."""
        self._reads: Tensor | None = None
        self._as_tuple = False
        self._began = self._computing = self._reading = 0.0
        self._computed = self._read = self._passes = 0

    @property
    def nbytes(self) -> int:
        """Of all rows in float32."""
        return self._count * self._size * 4

    def of(self, rows: Sequence[Key], numbers: Tensor, ids: Tensor, reads: bool) -> None:
        """The next pass is of these rows: of `ids [batch, columns]`, flattened, the tokens of `numbers [rows, tokens]`, -1 for
        padding. Rows may share tokens.
        """
        real = numbers >= 0
        first = torch.tensor([self._first[row] for row in rows])[:, None]
        self._tokens = (first + torch.arange(numbers.shape[1]))[real.cpu()], numbers[real]
        self._reads = self._read_for(ids) if reads else None

    def nothing(self) -> None:
        """The next pass is of no row that is known."""
        self._tokens = self._reads = None

    def has(self, rows: Sequence[Key]) -> bool:
        """Whether all these rows' states are kept."""
        return all(row in self._full for row in rows)

    def takes(self, rows: Sequence[Key]) -> bool:
        """Whether these rows' states would be kept."""
        return all(row in self._first for row in rows)

    def done(self, rows: Sequence[Key]) -> None:
        """All tokens of these rows were run, or read."""
        if self.takes(rows):
            self._full.update(rows)
        if (
            self._first
            and self._passes >= _TRIED
            and self._reading * self._computed > self._computing * self._read
        ):
            self._give_up()

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Inside the block, the model's lowest blocks only run where their states are not kept."""
        blocks = list(decoder_layers(model))[: self._last + 1]
        instead = ((block, self._instead(block.forward, number)) for number, block in enumerate(blocks))
        try:
            with replaced_forwards(instead):
                yield
        finally:
            self._give_up()

    def _instead(self, forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._reads is not None:
                states = self._reads.to(hidden.dtype) if number == self._last else hidden
                return (states,) if self._as_tuple else states
            if number == 0:
                self._began = perf_counter()
            output = forward(hidden, *args, **kwargs)
            if number == self._last and self._tokens is not None:
                self._keep(output)
            return output

        return run

    def _keep(self, output: Any) -> None:
        self._computing += perf_counter() - self._began
        self._as_tuple = isinstance(output, tuple)
        hidden = (output[0] if self._as_tuple else output).detach()
        assert self._tokens is not None
        if self._states is None:
            self._states = self._room(hidden.dtype)
        if self._states is None:
            self._give_up()
            return
        kept, run = self._tokens
        self._states[kept] = hidden.flatten(0, 1)[run].cpu()
        self._computed += len(kept)

    def _read_for(self, ids: Tensor) -> Tensor:
        began = perf_counter()
        assert self._states is not None
        assert self._tokens is not None
        kept, run = self._tokens
        states = self._states[kept].to(ids.device)
        found = states.new_zeros(ids.numel(), self._size).index_copy(0, run, states)
        self._read += len(kept)
        self._reading += perf_counter() - began
        self._passes += 1
        return found.view(*ids.shape, -1)

    def _room(self, dtype: torch.dtype) -> Tensor | None:
        """For all rows; None, told, where the disk has not so much."""
        shape, count = (self._count, self._size), self._count * self._size
        if self.file is None:
            return torch.empty(shape, dtype=dtype)
        try:
            with self.file.open("wb") as file:
                # A mapped file that the disk has no room for would end the process when it is written to.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                elif shutil.disk_usage(self.file.parent).free < count * dtype.itemsize:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._report(
                f"no hidden states are kept: {self.nbytes / 1e6:,.0f} MB do not go into {self.file.parent.parent}: "
                f"{error.strerror}"
            )
            return None
        return torch.from_file(str(self.file), shared=True, size=count, dtype=dtype).view(shape)

    def _give_up(self) -> None:
        self._states = self._reads = self._tokens = None
        self._first.clear()
        self._full.clear()


def last_untouched(places: Sequence[Place]) -> int:
    """The highest block whose output, before it is edited itself, depends on no edit; -1 if there is none."""
    return min(place.layer if place.component == "block" else place.layer - 1 for place in places)
