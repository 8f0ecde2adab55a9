"""Guesses of the tokens that come next, from a prompt and the answer so far (prompt lookup), and how often they hold."""

from collections.abc import Callable, Sequence

_SIZES = (4, 2)
"""Tokens that must have come before for a guess of what followed them, the longest first."""
_FADE = 0.96
"""What an older guess counts for beside the next."""
_EXPECTED = ((2, 0.3), (4, 0.6), (8, 0.8), (16, 0.9))
"""Of guesses behind so many tokens that came before, the share that holds, until it is known."""
_WEIGHT = 3.0
"""Guesses that this expectation counts for."""


class Lookup:
    """One answer's guesses. What followed the last place where the latest tokens stood is taken to follow again.

    Whether a guess holds is known without running it, so that guesses are not paid for while they do not hold.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        """`ids`: the prompt's tokens."""
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """Of runs of tokens, where the token behind the latest of each is."""
        self._next: int | None = None
        """The place of the token that is guessed to come next."""
        self._same = 0
        """Tokens before that place that are those at the end."""
        self._held = [_WEIGHT * share for _, share in _EXPECTED]
        self._tried = [_WEIGHT] * len(_EXPECTED)
        for token in ids:
            self._add(token)
        self.length = len(ids)
        """Tokens of prompt and answer that are known here."""

    def follow(self, tokens: Sequence[int]) -> None:
        """The answer went on with these."""
        for token in tokens:
            if self._next is not None:
                kind = _kind(self._same)
                self._held[kind] = _FADE * self._held[kind] + (self._tokens[self._next] == token)
                self._tried[kind] = _FADE * self._tried[kind] + 1
            self._add(token)
        self.length += len(tokens)

    def best(self, most: int, sizes: Sequence[int], cost: Callable[[int], float]) -> tuple[list[int], float]:
        """Guesses, at most `most`, that make a run with the token before them as long as one of `sizes`, ascending: those
        whose run has the most tokens that hold for its `cost`. And the tokens to expect of it, the one behind included."""
        if self._next is None:
            return [], 1.0
        chosen, expected = 1, 1.0
        total, likely, length = 1.0, 1.0, 1
        for size in sizes:
            if size > most + 1:
                break
            while length < size:
                kind = _kind(self._same + length - 1)
                likely *= self._held[kind] / self._tried[kind]
                total += likely
                length += 1
            if total / cost(size) > expected / cost(chosen):
                chosen, expected = size, total
        guesses: list[int] = []
        for place in range(self._next, self._next + chosen - 1):
            known = len(self._tokens)
            guesses.append(self._tokens[place] if place < known else guesses[place - known])
        return guesses, expected

    def _add(self, token: int) -> None:
        tokens = self._tokens
        if self._next is not None and tokens[self._next] == token:
            self._next += 1
            self._same += 1
        else:
            self._next = None
        tokens.append(token)
        for size in _SIZES:
            if len(tokens) >= size:
                run = tuple(tokens[-size:])
                if self._next is None and run in self._ends:
                    self._next, self._same = self._ends[run], size
                self._ends[run] = len(tokens)


def _kind(same: int) -> int:
    """Which of _EXPECTED a guess behind so many tokens belongs to."""
    return next((kind for kind, (most, _) in enumerate(_EXPECTED) if same < 2 * most), len(_EXPECTED) - 1)
