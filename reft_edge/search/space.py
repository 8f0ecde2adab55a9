"""What a search chooses from. A new intervention, position or choice of layers is one line here."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reft_edge.adapter.config import INTERVENTIONS, LINEAR_ONLY, OF_RANK_1
from reft_edge.adapter.positions import parse_positions
from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import named_layers, parse_layers
from reft_edge.steering.interventions import activation
from reft_edge.training.settings import TrainSettings

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Edit:
    """A kind of intervention."""

    intervention: str
    act_fn: str = "linear"

    @property
    def ranked(self) -> bool:
        """Whether it has a rank to choose; others have rank 1."""
        return self.intervention not in OF_RANK_1

    def __str__(self) -> str:
        return self.intervention if self.act_fn == "linear" else f"{self.intervention}:{self.act_fn}"


EDITS = (Edit("loreft"), Edit("direft"), Edit("noreft"), Edit("nodireft"), Edit("steering"))
"""Kinds that every export runs. Others are tried where a user names them."""
POSITIONS = ("f1", "l1", "f3+l3", "f7+l7", "l1+gen", "all", "all+gen")
LAYERS: dict[str, Callable[[int], range]] = {
    "all": lambda count: range(count),
    "lower half": lambda count: range((count + 1) // 2),
    "upper half": lambda count: range(count // 2, count),
    "middle third": lambda count: range(count // 3, max(count // 3 + 1, 2 * count // 3)),
    "every fourth": lambda count: range(min(3, count - 1), count, 4),
}
"""Layers of a model that has `count` of them."""
RANKS = (1, 2, 4, 8, 16)
LEARNING_RATES = (2e-4, 2e-2)
"""Lowest and highest; drawn evenly by their logarithms."""
SEARCHED = ("intervention", "act_fn", "positions", "layers", "rank", "lr")
"""Fields of TrainSettings that a trial chooses."""


@dataclass(frozen=True)
class Narrowed:
    """What a user lets a search choose from; None for all that there is."""

    interventions: Sequence[str] | None = None
    positions: Sequence[str] | None = None
    layers: Sequence[str] | None = None
    ranks: Sequence[int] | None = None
    lr: tuple[float, float] | None = None


ANYTHING = Narrowed()


def narrowed(
    interventions: Sequence[str] | None,
    positions: Sequence[str] | None,
    layers: Sequence[str] | None,
    ranks: Sequence[int] | None,
    lr: Sequence[float] | None,
) -> Narrowed:
    """What there is to choose from, from lists that may be empty. Raises ReftEdgeError for a range that is none."""
    ends = tuple(lr or ())
    if ends and len(ends) != 2:
        raise ReftEdgeError(f"lr has {len(ends)} numbers; expected the lowest and the highest learning rate")
    return Narrowed(
        _texts(interventions),
        _texts(positions),
        _texts(layers),
        tuple(ranks) if ranks else None,
        (float(ends[0]), float(ends[1])) if ends else None,
    )


def _texts(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """One text, or several; layers may be numbers."""
    if not given:
        return None
    return (given,) if isinstance(given, str) else tuple(named_layers(one) for one in given)


@dataclass(frozen=True)
class Space:
    """What the trials of a study choose from."""

    edits: tuple[str, ...]
    positions: tuple[str, ...]
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    lr: tuple[float, float]

    def suggest(self, trial: "Trial") -> dict[str, Any]:
        """The settings of a trial, by the names of TrainSettings."""
        edit = _edit(trial.suggest_categorical("intervention", self.edits))
        return {
            "intervention": edit.intervention,
            "act_fn": edit.act_fn,
            "positions": trial.suggest_categorical("positions", self.positions),
            "layers": trial.suggest_categorical("layers", self.layers),
            "rank": trial.suggest_categorical("rank", self.ranks) if edit.ranked else 1,
            "lr": trial.suggest_float("lr", *self.lr, log=True),
        }

    def parameters(self, settings: TrainSettings) -> dict[str, Any] | None:
        """What a trial with these settings would choose; None where it could not."""
        edit = Edit(settings.intervention, settings.act_fn)
        chosen = {
            "intervention": str(edit),
            "positions": settings.positions,
            "layers": settings.layers,
            "rank": settings.rank,
            "lr": settings.lr,
        }
        known = (
            str(edit) in self.edits,
            settings.positions in self.positions,
            settings.layers in self.layers,
            settings.rank in self.ranks,
            self.lr[0] <= settings.lr <= self.lr[1],
        )
        return chosen if all(known) else None

    def described(self) -> dict[str, Any]:
        """For the study, which is of one space, in JSON's types."""
        return {name: list(value) for name, value in asdict(self).items()}


def space_for(narrowed: Narrowed, num_layers: int, hidden_size: int, generates: bool) -> Space:
    """What there is to choose for a model; `generates`: whether it generates tokens, which positions can name.

    Raises ReftEdgeError for a choice that no training takes.
    """
    edits = tuple(narrowed.interventions or map(str, EDITS))
    for name in edits:
        _edit(name)
    positions = tuple(narrowed.positions or (spec for spec in POSITIONS if generates or not _generated(spec)))
    for spec in positions:
        if _generated(spec) and not generates:
            raise ReftEdgeError(f"positions {spec!r}: a classifier generates no tokens; drop the part `gen`")
    if narrowed.layers:
        layers = tuple(spec.strip() for spec in narrowed.layers)
        for spec in layers:
            parse_layers(spec, num_layers)
    else:
        layers = _layers(num_layers)
    ranks = tuple(narrowed.ranks or (rank for rank in RANKS if rank <= hidden_size))
    if unfit := [rank for rank in ranks if not 1 <= rank <= hidden_size]:
        raise ReftEdgeError(f"rank is {unfit[0]}; expected 1 to {hidden_size}, the model's hidden size")
    low, high = narrowed.lr or LEARNING_RATES
    if not 0 < low <= high < float("inf"):
        raise ReftEdgeError(
            f"the learning rates are {low:g} to {high:g}; expected two positive numbers, the lower first"
        )
    return Space(_once(edits), _once(positions), _once(layers), _once(ranks), (low, high))


def _edit(name: str) -> Edit:
    """A kind of intervention by its name, as `noreft` or `nodireft:silu`. Raises ReftEdgeError for an unknown one."""
    intervention, _, act_fn = name.partition(":")
    if intervention not in INTERVENTIONS:
        raise ReftEdgeError(f"unknown intervention {name!r}; known: {', '.join(INTERVENTIONS)}")
    if act_fn and intervention in LINEAR_ONLY:
        raise ReftEdgeError(f"{intervention} has no activation function; leave {act_fn!r} out")
    activation(act_fn or "linear")
    return Edit(intervention, act_fn or "linear")


def _generated(spec: str) -> bool:
    return any(span.on_generated for span in parse_positions(spec, tied=False))


def _layers(count: int) -> tuple[str, ...]:
    """As texts; those that are the same in a small model are there once."""
    found: dict[tuple[int, ...], str] = {}
    for name, chosen in LAYERS.items():
        numbers = tuple(chosen(count))
        whole = len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1))
        spec = f"{numbers[0]}-{numbers[-1]}" if whole else ";".join(map(str, numbers))
        found.setdefault(numbers, name if name == "all" else spec)
    return tuple(found.values())


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
