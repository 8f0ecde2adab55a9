"""What an adapter's numbers tell: strength, overlap of layers, the training curve."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Array, folded_rows
from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.adapter.positions import group_names
from reft_edge.errors import ReftEdgeError

_MOST_PAIRS = 200_000
"""Pairs of subspaces, some seconds of work, above which a file's own layers are not compared: no known model comes near."""
_NEGLIGIBLE = 1e-6


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Overlap:
    """How far subspaces coincide: mean squared cosines of their principal angles, 0 (orthogonal) to 1 (equal)."""

    name: str
    layers: tuple[int, ...]
    shared: Floats
    """`[layers, layers]` between an adapter's own layers, `[layers]` between two adapters."""
    smallest: Floats
    """The smallest principal angles, in degrees, shaped alike."""


@dataclass(frozen=True)
class Strength:
    """Of h + hAB + bB, by layer, for one position group."""

    name: str
    gains: Floats
    """Spectral norm of AB: by how much a part of h, at most, is changed."""
    constants: Floats
    """Length of bB, what is added to every h."""


@dataclass(frozen=True)
class TokenShift:
    """One token's mean probability as the answer's first."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Effect:
    """What the adapter does on rows of data; positions are named by `position`."""

    rows: int
    norms: dict[str, dict[int, float]] = field(default_factory=dict)
    """By position and layer: the edit's length over the hidden state's, mean over edited tokens."""
    divergence: dict[str, float] = field(default_factory=dict)
    """By position: KL(with adapter, without) of the next token, in nats, mean over tokens."""
    gained: list[TokenShift] = field(default_factory=list)
    lost: list[TokenShift] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """Everything that a report shows."""

    name: str
    size: int
    """Bytes of the file."""
    config: AdapterConfig
    parameters: int
    strengths: list[Strength]
    overlaps: list[Overlap]
    """Between the layers of each position group; empty where they are too many to compare."""
    curve: list[tuple[int, float]]
    """Training loss at steps; empty if the file has none."""
    other: str = ""
    """The adapter that it was compared with."""
    between: Overlap | None = None
    effect: Effect | None = None


def inspect_adapter(
    adapter: Adapter,
    name: str,
    size: int,
    other: tuple[str, Adapter] | None = None,
    effect: Effect | None = None,
) -> Inspection:
    """Read all that the file alone tells, beside an `effect` that was measured. Raises ReftEdgeError for an `other` adapter of another base or other layers."""
    config = adapter.config
    # in float64, whose sums cannot overflow
    wide = {name: tensor.astype(np.float64) for name, tensor in adapter.tensors.items()}
    rows_a, bias, rows_b = folded_rows(config.intervention, wide)
    names = group_names(config.positions, config.tied)
    strengths = []
    if config.act_fn == "linear":
        gains = _gains(np.zeros_like(rows_b) if rows_a is None else rows_a, rows_b)
        if config.intervention == "red":
            gains = np.abs(wide["s"]).max(axis=(2, 3))
        constants = np.linalg.norm(np.einsum("lgr,lgrd->lgd", bias, rows_b), axis=-1)
        strengths = [Strength(names[g], gains[:, g], constants[:, g]) for g in range(len(names))]
    overlaps = []
    few = len(names) * len(config.layers) ** 2 <= _MOST_PAIRS
    for group, group_name in enumerate(names if few else ()):
        bases = [orthonormal(rows) for rows in rows_b[:, group]]
        pairs = [[_overlap(a, b) for b in bases] for a in bases]
        overlaps.append(Overlap(group_name, config.layers, *np.moveaxis(np.array(pairs), -1, 0)))
    return Inspection(
        name,
        size,
        config,
        adapter.num_parameters,
        strengths,
        overlaps,
        kept_curve(config.training),
        other[0] if other else "",
        _between(adapter, other[1]) if other else None,
        effect,
    )


def kept_curve(training: dict[str, Any]) -> list[tuple[int, float]]:
    """The loss curve in a file's description, if it holds a sound one."""
    curve = training.get("curve")
    if not isinstance(curve, list):
        return []
    points = [
        (int(point[0]), float(point[1]))
        for point in curve[:1000]
        if isinstance(point, list)
        and len(point) == 2
        and all(isinstance(number, int | float) and abs(number) < 1e12 for number in point)
    ]
    return sorted(points)


def orthonormal(rows: Array) -> Floats:
    """An orthonormal basis, `[rank, d]`, of the space that the rows span; directions of no weight are left out."""
    _, singular, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    kept = singular > _NEGLIGIBLE * max(float(singular.max(initial=0)), float(np.finfo(np.float32).tiny))
    found: Floats = basis[kept]
    return found


def principal_angles(a: Floats, b: Floats) -> Floats:
    """Between two orthonormal bases, in degrees, ascending."""
    cosines = np.linalg.svd(a @ b.T, compute_uv=False)
    angles: Floats = np.degrees(np.arccos(np.clip(cosines, 0, 1)))
    return angles


def _between(adapter: Adapter, other: Adapter) -> Overlap:
    bases = {(config.base_fingerprint, config.hidden_size) for config in (adapter.config, other.config)}
    if len(bases) > 1:
        raise ReftEdgeError(
            f"the two adapters have other base models, {adapter.config.base_name} and {other.config.base_name}; "
            "subspaces of different models cannot be compared"
        )
    layers = tuple(sorted(set(adapter.config.layers) & set(other.config.layers)))
    if not layers:
        raise ReftEdgeError("the two adapters have no layer in common")

    def basis(of: Adapter, layer: int) -> Floats:
        rows = folded_rows(of.config.intervention, of.tensors)[2][of.config.layers.index(layer)]
        return orthonormal(rows.reshape(-1, rows.shape[-1]))

    found = np.array([_overlap(basis(adapter, layer), basis(other, layer)) for layer in layers])
    return Overlap("all positions", layers, found[:, 0], found[:, 1])


def _overlap(a: Floats, b: Floats) -> tuple[float, float]:
    if not len(a) or not len(b):
        return 0.0, 90.0
    angles = principal_angles(a, b)
    return float((np.cos(np.radians(angles)) ** 2).mean()), float(angles[0])


def _gains(rows_a: Array, rows_b: Array) -> Floats:
    """Spectral norms of AB, `[L, G]`, from the small factors of Aᵀ and B."""
    small_a, small_b = (
        np.asarray(np.linalg.qr(rows.astype(np.float64).swapaxes(-1, -2))[1]) for rows in (rows_a, rows_b)
    )
    norms: Floats = np.linalg.norm(small_a @ small_b.swapaxes(-1, -2), ord=2, axis=(-2, -1))
    return norms
