"""Streaming text out of tokens: whole characters only, and nothing from a stop string on."""

import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import decode, encode

_PENDING = 8
"""Tokens without the end of a character that are waited for; a character has 4 bytes at most."""
_TAIL = 3
_LONGEST = 64
"""Tokens that are decoded at once, at most."""
_UNKNOWN = "\ufffd"
_FIRST_MARK, _LAST_MARK = 0xD800, 0xDFFF
"""Code points that no text has: they stand for special tokens in stop strings."""


class TextStream:
    """Turns tokens into text pieces; holds back what may become a stop string.

    Special tokens are left out of the text, but for those that are to be shown. A stop string that has their text, alone or among other text, is found all
    the same.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), shown: Sequence[str] = ()) -> None:
        """`shown`: special tokens whose text is wanted."""
        self._decoder = _Decoder(tokenizer)
        special = _special_tokens(tokenizer)
        if shown:
            special = {token: text for token, text in special.items() if text not in shown}
        self._special = frozenset(special)
        self._marks: dict[int, str] = {}
        patterns = dict.fromkeys(text for text in stop if text)
        for text in list(patterns):
            patterns[_marked(text, special, self._marks)] = None
        self._stops = [_Stop(text) for text in patterns]
        self._held: deque[str] = deque()
        """Characters."""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character or a possible stop string is unfinished."""
        if token in self._special:
            return self._take(self._marks[token]) if token in self._marks else ""
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, at the end; a character that was never completed is U+FFFD."""
        ready = self._take(self._decoder.flush())
        return ready if self.stopped else ready + self._release(0)

    def _take(self, text: str) -> str:
        if not self._stops:
            return text
        for character in text:
            if not _is_mark(character):
                self._held.append(character)
            found = [stop.seen for stop in self._stops if stop.feed(character)]
            if found:
                self.stopped = True
                return self._release(max(found))
        return self._release(max(stop.seen for stop in self._stops))

    def _release(self, keep: int) -> str:
        return "".join(self._held.popleft() for _ in range(len(self._held) - keep))


class _Stop:
    """Knuth, Morris and Pratt's search for one stop string, a character at a time; each costs the same on average."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._marks = {character for character in text if _is_mark(character)}
        self._matched = 0
        self._shorter = [0, 0]
        """For each length of a begun match, the longest shorter one that ends alike; known as far as one was reached."""
        self._visible = [0]
        """For each length, its characters without the marks."""

    @property
    def seen(self) -> int:
        """Characters of the text that belong to the match so far."""
        return self._visible[self._matched]

    def feed(self, character: str) -> bool:
        """Take the next character; whether the stop string is complete with it. Special tokens that it does not have are
        passed over."""
        mark = _is_mark(character)
        if mark and character not in self._marks:
            return False
        while self._matched and self._text[self._matched] != character:
            self._matched = self._shorter[self._matched]
        if self._text[self._matched] == character:
            self._matched += 1
            self._know(mark)
        return self._matched == len(self._text)

    def _know(self, mark: bool) -> None:
        size = self._matched
        if len(self._visible) == size:
            self._visible.append(self._visible[-1] + (not mark))
        if len(self._shorter) == size:
            shorter = self._shorter[size - 1]
            while shorter and self._text[shorter] != self._text[size - 1]:
                shorter = self._shorter[shorter]
            self._shorter.append(shorter + (self._text[shorter] == self._text[size - 1]))


def _is_mark(character: str) -> bool:
    return _FIRST_MARK <= ord(character) <= _LAST_MARK


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {
        token: added.content
        for token, added in tokenizer.get_added_tokens_decoder().items()
        if added.special and added.content
    }


def _marked(stop: str, special: dict[int, str], marks: dict[int, str]) -> str:
    """A stop string with a mark in place of each special token's text; new ones are added to `marks`."""
    within = {text: token for token, text in special.items() if text in stop}
    if not within or len(marks) + len(within) > _LAST_MARK - _FIRST_MARK:
        return stop

    def mark(found: re.Match[str]) -> str:
        return marks.setdefault(within[found[0]], chr(_FIRST_MARK + len(marks)))

    return re.sub("|".join(re.escape(text) for text in sorted(within, key=len, reverse=True)), mark, stop)


class _Decoder:
    """Text of tokens, as far as it is known to be whole. No token is left out; it fails with ReftEdgeError, and only where
    the tokenizer does.

    Tokens are decoded with those before them, since spaces and characters depend on neighbours. Where later tokens change
    the text of earlier ones, which tokenizers with a token for each byte do at bytes that are no UTF-8, text that was given
    away stays, and what follows is decoded anew.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []
        self._known = ""
        """The text of `before`."""

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._pending.append(token)
        text = self._decode([*self._before, *self._pending])
        if not text.endswith(_UNKNOWN) or len(self._pending) == _LONGEST:
            return self._give(text, len(self._pending))
        for count in range(len(self._pending) - _TAIL, _PENDING - _TAIL, -1):
            head = self._decode([*self._before, *self._pending[:count]])
            if text.startswith(head):
                return self._give(head, count)
        return ""

    def flush(self) -> str:
        """The text of what is unfinished."""
        if not self._pending:
            return ""
        return self._give(self._decode([*self._before, *self._pending]), len(self._pending))

    def _give(self, text: str, count: int) -> str:
        """What `text`, that of all tokens up to the pending ones' first `count`, adds."""
        new, self._pending = self._pending[:count], self._pending[count:]
        piece = text[len(self._known) :] if text.startswith(self._known) else self._alone(new)
        self._before = new if piece else [*self._before, *new][-_LONGEST:]
        self._known = self._decode(self._before)
        return piece

    def _alone(self, tokens: list[int]) -> str:
        """The text of tokens as it is behind others that have nothing to do with it."""
        with suppress(ReftEdgeError):
            for token in encode(self._tokenizer, "a", special_tokens=False).ids[-1:]:
                start, whole = self._decode([token]), self._decode([token, *tokens])
                if whole.startswith(start):
                    return whole[len(start) :]
        return self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens, special_tokens=True)
