"""Whether it pays to run guessed tokens with a row's last one, by what steps of this session take."""

from collections.abc import Callable, Sequence

import numpy as np

from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.drafts import Lookup
from reft_edge.runtime.request import Row
from reft_edge.runtime.rounding import RUNS
from reft_edge.runtime.session import GraphSession, Logits

_WORTH, _WORTH_BESIDE_OTHERS = 1.1, 1.25
"""How many more tokens a second guesses must promise. Rows that run together cost little more than one, so that those which
are ahead leave others to run alone."""
_EACH = 0.33
"""What a further token takes of a step's time, until it is measured."""
_WEIGHT = 0.2
"""Of the latest time."""
_FORGET = 0.02
"""Share of what was measured that each other step takes back, so that a bad moment is not held against a length for ever."""
_LOOK_AGAIN = 48
"""Steps with guesses after which one without them is measured again."""


class StepCosts:
    """Seconds that steps of one session take: of several rows together, and of one row that runs several tokens. Batches in
    several threads may share it."""

    def __init__(self) -> None:
        self._together: dict[int, float] = {}
        self._alone: dict[int, float] = {}
        self._since = 0

    def together(self, rows: int) -> float | None:
        """Of a step of so many rows; None if it is not known, or was not looked at for long."""
        return None if self._since >= _LOOK_AGAIN else self._together.get(rows)

    def alone(self, tokens: int) -> float:
        """Of one row's run of so many tokens, which is a guess until there was one."""
        return self._alone.get(tokens) or self._guess(tokens)

    def ran_together(self, rows: int, seconds: float) -> None:
        self._since = 0
        self._together[rows] = _blend(self._together.get(rows), seconds)
        for tokens, held in list(self._alone.items()):
            self._alone[tokens] = held + _FORGET * (self._guess(tokens) - held)

    def ran_alone(self, tokens: int, seconds: float) -> None:
        self._since += 1
        self._alone[tokens] = _blend(self._alone.get(tokens), seconds)

    def _guess(self, tokens: int) -> float:
        one = self._together.get(1) or min(self._together.values())
        return one * (1 + _EACH * (tokens - 1))


def _blend(before: float | None, seconds: float) -> float:
    """A running mean, which one slow step moves little."""
    return seconds if before is None else before + _WEIGHT * (min(seconds, 3 * before) - before)


class Speculation:
    """Guesses for the rows of one batch."""

    def __init__(self, costs: StepCosts, allowed: Callable[[], bool]) -> None:
        """`allowed`: asked when guesses first promise something."""
        self.costs, self._ask = costs, allowed
        self._allowed: bool | None = None

    def guess(self, rows: Sequence[Row], room: int | None) -> bool:
        """Whether each of these rows is to run by itself, with guesses (`row.guesses`), since all get more tokens a second so
        than in a step together. `room`: tokens that the rows may have beyond what they need."""
        if self._allowed is False:
            return False
        found = _best_guesses(rows, self.costs)
        if not any(found) or (room is not None and sum(map(len, found)) > room):
            return False
        if self._allowed is None:
            self._allowed = self._ask()
            if not self._allowed:
                return False
        for row, guesses in zip(rows, found, strict=True):
            row.guesses = guesses
        return True


def speculation_for(
    graph: GraphSession, manifest: Manifest, costs: StepCosts, wanted: bool | None
) -> Speculation | None:
    """Guesses for one batch. `wanted`: None for where they change no answer. Raises ReftEdgeError where they are wanted and
    cannot be taken back."""
    if not graph.steps_back:
        if wanted:
            raise ReftEdgeError(
                f"{manifest.base_name} ({manifest.architecture}) cannot guess tokens ahead: {_why_not(graph)}; leave "
                "speculation off (--no-speculate)"
            )
        return None
    if wanted is None:
        return Speculation(costs, lambda: _rounds_finely(graph, manifest))
    return Speculation(costs, lambda: True) if wanted else None


def _why_not(graph: GraphSession) -> str:
    if graph.cache_in_numpy and not graph.cuts_cache:
        return "some of its layers keep a state, out of which wrong guesses cannot be taken"
    return "its KV cache is made anew at every step"


def _rounds_finely(graph: GraphSession, manifest: Manifest) -> bool:
    """Whether steps of one token and of several choose the same tokens: their numbers are the same, or those of float32, in
    which the last bit differs. Where activations or caches are rounded to fewer bits, one such bit may move a logit by 2 %."""
    return (manifest.precision == "fp32" and graph.cache_dtype == np.float32) or graph.rounds_steps_alike


def _best_guesses(rows: Sequence[Row], costs: StepCosts) -> list[list[int]]:
    """For each row, which are all one token behind, what is worth to be run behind it; nothing where no row should."""
    together = costs.together(len(rows))
    found, expected, seconds = [], 0.0, 0.0
    for row in rows:
        if row.lookup is None:
            row.lookup = Lookup(row.request.ids)
        row.lookup.follow(row.tokens[row.lookup.length - len(row.request.ids) :])
        if together is None or row.behind != 1:
            continue
        most = min(row.limit - len(row.tokens), row.alike) - 1
        guesses, tokens = row.lookup.best(most, RUNS, costs.alone)
        found.append(guesses)
        expected += tokens
        seconds += costs.alone(1 + len(guesses))
    if together is None or len(found) < len(rows):
        return []
    worth = _WORTH if len(rows) == 1 else _WORTH_BESIDE_OTHERS
    return found if expected * together >= worth * seconds * len(rows) else []


def take_guessed(
    row: Row, guesses: Sequence[int], logits: Logits, take: Callable[[Row, Logits], bool]
) -> bool:
    """Choose a row's tokens from `logits [1 + guesses, vocabulary]` with `take`, each as if it were the only one, for as long
    as they are those that were guessed; whether the row goes on. Its length is then that of the tokens that hold."""
    first, known = len(row.tokens), 0
    while known <= len(guesses) and row.tokens[first:] == guesses[:known]:
        if not take(row, logits[known]):
            return False
        known = len(row.tokens) - first
    held = 0
    while held < len(guesses) and row.tokens[first + held] == guesses[held]:
        held += 1
    row.length += 1 + held
    row.together = min(row.together, row.behind)
    return True
