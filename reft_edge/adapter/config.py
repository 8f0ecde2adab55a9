"""What an adapter is: its description, checked, and its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reft_edge.adapter.algebra import Array, folded_rows
from reft_edge.adapter.positions import Span, parse_positions, triggers_of
from reft_edge.adapter.storage import data_bytes, declared
from reft_edge.adapter.triggers import check_ids
from reft_edge.errors import AdapterFileError
from reft_edge.model.places import COMPONENTS, Place

INTERVENTIONS = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "steering", "red")
LINEAR_ONLY = ("consreft", "lobireft", "steering", "red")
OF_RANK_1 = {"steering": "a steering vector", "red": "an adapter of the kind red"}
POOLINGS = ("cls", "mean")
HEAD = ("head.weight", "head.bias")


MAX_DATA = 1 << 30
_MAX_LABELS, _MAX_LABEL = 1000, 200
_LIMITS = {"hidden_size": 1 << 20, "num_layers": 1 << 12, "rank": 1 << 12}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is and which base model it belongs to."""

    intervention: str
    """One of INTERVENTIONS."""
    base_name: str
    """The base model's name, for people."""
    base_fingerprint: str
    """The base model's fingerprint (`reft_edge.model.fingerprint`), for machines."""
    hidden_size: int
    num_layers: int
    """Layers of the base model."""
    layers: tuple[int, ...]
    """Layers that the adapter edits, ascending."""
    rank: int
    positions: str = "f7+l7"
    tied: bool = False
    act_fn: str = "linear"
    add_bias: bool = False
    """NoReFT only: W2 has a bias of its own."""
    prompt_format: str = "chat"
    """"chat": prompts went through the base model's chat template; "raw": they did not."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained: data digest, steps, learning rate, seed, versions, loss."""
    labels: tuple[str, ...] = ()
    """What the classification head tells apart; empty where there is no head."""
    pooling: str = ""
    """The vector that the head reads: `cls`, the first token's, or `mean`, the mean over a row's tokens."""
    component: str = "block"
    """What of each layer is edited: the output of its whole `block`, of its `attention`, or of its `mlp`."""

    def __post_init__(self) -> None:
        _check_config(self)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it acts, in the order of `layers`."""
        return tuple(Place(layer, self.component) for layer in self.layers)

    @property
    def spans(self) -> tuple[Span, ...]:
        """One gate a position group."""
        return parse_positions(self.positions, self.tied)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the file must hold."""
        if not self.labels:
            return self.edit_shapes()
        count = len(self.labels)
        return {**self.edit_shapes(), "head.weight": (count, self.hidden_size), "head.bias": (count,)}

    def edit_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same without the classification head."""
        groups = (len(self.layers), len(self.spans))
        matrix, vector = (*groups, self.rank, self.hidden_size), (*groups, self.rank)
        if self.intervention in ("loreft", "direft"):
            return {"R": matrix, "W": matrix, "b": vector}
        if self.intervention in ("noreft", "nodireft"):
            bias = {"b2": vector} if self.add_bias else {}
            return {"W1": matrix, "W2": matrix, "b": vector, **bias}
        if self.intervention == "steering":
            return {"v": matrix, "alpha": vector}
        if self.intervention == "red":
            return {"s": matrix, "v": matrix}
        return {"R": matrix, "b": vector}


@dataclass(frozen=True)
class Adapter:
    """An adapter's description and its unfolded parameters, shaped as `config.shapes()` says."""

    config: AdapterConfig
    tensors: dict[str, Array]

    def __post_init__(self) -> None:
        expected = self.config.shapes()
        check_names(self.config.intervention, set(self.tensors), set(expected))
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != shape or tensor.dtype != np.float32:
                raise AdapterFileError(
                    f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; expected float32 {list(shape)}"
                )
            if not np.isfinite(tensor).all():
                raise AdapterFileError(f"tensor {name} holds NaN or infinity; train the adapter again")
        _check_folds(self.config, self.tensors)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())


def _check_folds(config: AdapterConfig, tensors: Mapping[str, Array]) -> None:
    """Raise AdapterFileError if a difference that folding takes of finite numbers is beyond float32."""
    if config.act_fn != "linear":
        return
    with np.errstate(over="ignore"):
        rows_a, bias, _ = folded_rows(config.intervention, tensors)
    for name, folded in (("A", rows_a), ("b", bias)):
        given = folded is None or any(folded is tensor for tensor in tensors.values())
        if not given and not np.isfinite(folded).all():
            raise AdapterFileError(
                f"its tensors are finite, but not the {name} of h + (hA + b)B that they fold to: they hold values up to "
                f"{max(float(np.abs(tensor).max()) for tensor in tensors.values()):.3g}; train the adapter again"
            )


def check_size(config: AdapterConfig) -> None:
    """Raise AdapterFileError for tensors that no reader of adapter files would accept."""
    if (taken := data_bytes(declared(config.shapes(), "fp32"))) > MAX_DATA:
        raise AdapterFileError(f"it takes {taken:,} bytes as float32; at most {MAX_DATA:,} are accepted")


def check_names(intervention: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise AdapterFileError(
            f"a {intervention} adapter has tensors {sorted(expected)}; "
            f"missing: {missing or 'none'}, unexpected: {extra[:8] or 'none'}"
        )


def _check_config(config: AdapterConfig) -> None:
    def is_int(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for name in ("intervention", "base_name", "base_fingerprint", "positions", "act_fn", "prompt_format"):
        if not isinstance(getattr(config, name), str):
            raise AdapterFileError(f"{name} is {getattr(config, name)!r}; expected text")
    for name in ("base_name", "base_fingerprint"):
        if len(getattr(config, name)) > 200 or not getattr(config, name).isprintable():
            raise AdapterFileError(f"{name} is not plain text of at most 200 characters")
    for name in ("tied", "add_bias"):
        if not isinstance(getattr(config, name), bool):
            raise AdapterFileError(f"{name} is {getattr(config, name)!r}; expected true or false")
    for name, limit in _LIMITS.items():
        value = getattr(config, name)
        if not is_int(value) or not 1 <= value <= limit:
            raise AdapterFileError(f"{name} is {value!r}; expected a whole number from 1 to {limit:,}")
    if config.intervention not in INTERVENTIONS:
        raise AdapterFileError(
            f"unknown intervention {config.intervention!r}; known: {', '.join(INTERVENTIONS)}"
        )
    if config.intervention in OF_RANK_1 and config.rank != 1:
        raise AdapterFileError(f"{OF_RANK_1[config.intervention]} has rank 1, not {config.rank}")
    if config.rank > config.hidden_size:
        raise AdapterFileError(f"rank {config.rank} is larger than the hidden size {config.hidden_size}")
    layers = config.layers
    if not isinstance(layers, tuple) or not layers or not all(is_int(layer) for layer in layers):
        raise AdapterFileError(f"layers are {layers!r}; expected a list of whole numbers")
    if list(layers) != sorted(set(layers)):
        raise AdapterFileError(f"layers {list(layers)} are not ascending without repeats")
    if layers[0] < 0 or layers[-1] >= config.num_layers:
        raise AdapterFileError(
            f"layers {list(layers)} go beyond a model of {config.num_layers} layers "
            f"(0 to {config.num_layers - 1})"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", config.act_fn):
        raise AdapterFileError(f"act_fn {config.act_fn!r} is not an activation's name")
    if config.intervention in LINEAR_ONLY and config.act_fn != "linear":
        raise AdapterFileError(f"{config.intervention} has no activation function; act_fn must be `linear`")
    if config.component not in COMPONENTS:
        raise AdapterFileError(f"component is {config.component!r}; expected one of {', '.join(COMPONENTS)}")
    if config.add_bias and config.intervention != "noreft":
        raise AdapterFileError("add_bias is only for noreft")
    if config.prompt_format not in ("chat", "raw"):
        raise AdapterFileError(f"prompt_format is {config.prompt_format!r}; expected `chat` or `raw`")
    if not isinstance(config.training, dict):
        raise AdapterFileError("training is not a JSON object")
    spans = parse_positions(config.positions, config.tied)
    if not config.positions.isprintable():
        raise AdapterFileError(f"positions {config.positions!r} are not plain text")
    triggers = triggers_of(spans)
    for trigger in triggers:
        check_ids(trigger)
    _check_head(config)
    if config.labels and triggers:
        raise AdapterFileError(
            f"positions {config.positions!r}: a classifier reads texts, without a prompt that a trigger could stand in; choose "
            "f, l or all"
        )
    if config.labels and any(span.on_generated for span in spans):
        raise AdapterFileError(
            f"positions {config.positions!r}: a classifier generates no tokens; drop the part `gen`"
        )


def _check_head(config: AdapterConfig) -> None:
    labels = config.labels
    if not isinstance(labels, tuple) or not all(isinstance(label, str) for label in labels):
        raise AdapterFileError(f"labels are {labels!r:.200}; expected a list of texts")
    if not labels:
        if config.pooling != "":
            raise AdapterFileError(f"pooling is {config.pooling!r}, but there are no labels to tell apart")
        return
    if not 2 <= len(labels) <= _MAX_LABELS:
        raise AdapterFileError(f"there are {len(labels)} labels; expected 2 to {_MAX_LABELS:,}")
    if len(set(labels)) != len(labels):
        raise AdapterFileError("a label is named twice")
    for label in labels:
        if not label or len(label) > _MAX_LABEL or not label.isprintable():
            raise AdapterFileError(f"label {label[:50]!r} is not plain text of 1 to {_MAX_LABEL} characters")
    if config.pooling not in POOLINGS:
        raise AdapterFileError(f"pooling is {config.pooling!r}; expected one of {', '.join(POOLINGS)}")
