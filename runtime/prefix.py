"""The prefix cache: keys and values of prompts that ran before, for later prompts that begin alike."""

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Edit
from reft_edge.adapter.positions import Span, active
from reft_edge.adapter.triggers import Tokens
from reft_edge.runtime.rows import ALIGNMENT, KeysAndValues

_FEW = 16
"""Tokens, and a part of a prompt, that may run again rather than be remembered with all that comes before them."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that was prefilled, and what its tokens left in the KV cache."""

    ids: tuple[int, ...]
    edit: Edit | None
    content: KeysAndValues

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(values.nbytes for values in self.content.values())


class Ran:
    """A prompt that ran. Its edit is not kept alive: prompts under an edit that nobody holds any more never come again."""

    def __init__(self, ids: tuple[int, ...], edit: Edit | None) -> None:
        self.ids = ids
        self._edit = None if edit is None else weakref.ref(edit)
        self._untouched = untouched(ids, edit)

    @property
    def gone(self) -> bool:
        return self._edit is not None and self._edit() is None

    def under(self, edit: Edit | None) -> bool:
        """Whether the prompt ran with this edit."""
        return not self.gone and (self._edit() if self._edit is not None else None) is edit

    def usable(self, ids: Sequence[int], edit: Edit | None) -> int:
        """How many first tokens of a prompt have the keys and values that they had in this one: under another edit, those
        that neither edits, such as all before a trigger.

        They are a multiple of ALIGNMENT, and at least the last two tokens are always left to run: the last one's logits are
        needed, and a token that runs alone is rounded in another way.
        """
        if tuple(ids[:ALIGNMENT]) != self.ids[:ALIGNMENT]:
            return 0
        if self.under(edit):
            count = shared(self.ids, ids, edit)
        elif self._untouched:
            count = min(self._untouched, same_tokens(self.ids, ids), untouched(ids, edit))
        else:
            return 0
        return max(0, min(count, len(ids) - 2)) // ALIGNMENT * ALIGNMENT


@dataclass(frozen=True, eq=False)
class _Kept:
    ran: Ran
    content: KeysAndValues
    size: int


class Files(Protocol):
    """Prompts that outlast the process."""

    def find(self, ids: Sequence[int], edit: Edit | None, beyond: int, most: int) -> Prefix | None:
        """One that shares clearly more than `beyond` tokens with a prompt, of at most `most` bytes."""

    def save(self, prefix: Prefix) -> None:
        """Keep one; it returns at once."""


class PrefixCache:
    """Prompts by recent use, under a budget of bytes. Any number of threads may use it."""

    def __init__(self, budget: int, files: Files | None = None) -> None:
        """`files`: where prompts are kept, too."""
        self.budget, self.files = budget, files
        self._entries: list[_Kept] = []
        self._lock = threading.Lock()
        self.hits = 0
        """Tokens that did not have to be prefilled."""

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self._entries)

    def find(self, ids: Sequence[int], edit: Edit | None, held: int = 0) -> tuple[int, KeysAndValues | None]:
        """How many first tokens of a prompt can be taken over, and from where: None for none, and where the caller holds as
        many, `held`, already."""
        with self._lock:
            count, found = self._best(ids, edit)
            if found is None or count <= held:
                self.hits += held
                return held, None
            self._entries.remove(found)
            self._entries.append(found)
            self.hits += count
            return count, found.content

    def fetch(self, ids: Sequence[int], edit: Edit | None) -> None:
        """Read from the files what they have of a prompt that is to run, where that is more than what is in memory. It can
        take a while: call it before the prompt has its turn. Where memory lacks, the prompt runs whole."""
        if self.files is None or not self.budget:
            return
        with self._lock:
            count = self._best(ids, edit)[0]
        with suppress(MemoryError):
            prefix = self.files.find(ids, edit, count, self.budget)
            if prefix is not None:
                self._keep(prefix)

    def wants(self, ids: Sequence[int], edit: Edit | None, size: int) -> bool:
        """Whether a prompt that ran is worth a copy of `size` bytes: it fits the budget, and has more than a few tokens that
        none before it had."""
        if size > self.budget or len(ids) < ALIGNMENT:
            return False
        with self._lock:
            return len(ids) - self._best(ids, edit)[0] > max(_FEW, len(ids) // _FEW)

    def add(self, entry: Prefix) -> None:
        """Remember a prompt; those it makes needless, those of edits that are gone, and the least recently used beyond the
        budget are forgotten."""
        if entry.size > self.budget or len(entry.ids) < ALIGNMENT:
            return
        self._keep(entry)
        if self.files is not None:
            self.files.save(entry)

    def _best(self, ids: Sequence[int], edit: Edit | None) -> tuple[int, _Kept | None]:
        best, found = 0, None
        for entry in self._entries:
            count = entry.ran.usable(ids, edit)
            if count > best:
                best, found = count, entry
        return best, found

    def _keep(self, entry: Prefix) -> None:
        with self._lock:
            self._entries = [
                other
                for other in self._entries
                if not other.ran.gone
                and (
                    not other.ran.under(entry.edit)
                    or shared(entry.ids, other.ran.ids, entry.edit) < len(other.ran.ids) - 1
                )
            ]
            self._entries.append(_Kept(Ran(entry.ids, entry.edit), entry.content, entry.size))
            while self.size > self.budget:
                self._entries.pop(0)


def shared(before: Tokens, ids: Tokens, edit: Edit | None) -> int:
    """How many tokens at the start of two prompts have the same keys and values: they are the same tokens, and every
    gate that acts on one of them does so in both prompts, whose lengths may differ, and whose triggers may stand elsewhere."""
    count = same_tokens(before, ids)
    t = np.arange(count)
    for gate in edit.gates if edit is not None else ():
        alike = _opened(gate.span, t, before) == _opened(gate.span, t, ids)
        count = min(count, int(alike.argmin()) if not alike.all() else count)
    return count


def same_tokens(before: Tokens, ids: Tokens) -> int:
    """How many tokens at the start of two prompts are the same."""
    count = min(len(before), len(ids))
    same = np.array(before[:count]) == np.array(ids[:count])
    return int(same.argmin()) if not same.all() else count


def untouched(ids: Tokens, edit: Edit | None) -> int:
    """How many tokens at the start of a prompt no gate acts on, so that their keys and values are the base model's."""
    count = len(ids)
    for gate in edit.gates if edit is not None else ():
        opened = _opened(gate.span, np.arange(count), ids) & (gate.scale != 0)
        count = int(opened.argmax()) if opened.any() else count
    return count


def _opened(span: Span, t: NDArray[np.int64], prompt: Tokens) -> Any:
    return active(span, t, len(prompt), span.start(prompt))
