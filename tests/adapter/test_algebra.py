"""Properties of folding and combining edits, against the formulas of pyreft 0.1.0 written out one by one."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.adapter.algebra import ACTS, Edit, apply, concat, scale, subspace
from reft_edge.adapter.config import INTERVENTIONS, LINEAR_ONLY, OF_RANK_1, Adapter, AdapterConfig
from reft_edge.adapter.linear import fold
from reft_edge.adapter.positions import active
from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import COMPONENTS, Place
from reft_edge.steering.interventions import activation

D, LAYERS = 12, 4


def make_adapter(
    intervention: str,
    seed: int = 0,
    rank: int = 3,
    positions: str = "f2+l2",
    tied: bool = False,
    layers: tuple[int, ...] = (0, 2),
    **fields: Any,
) -> Adapter:
    random = np.random.default_rng(seed)
    config = AdapterConfig(
        intervention,
        "base",
        "0" * 16,
        D,
        LAYERS,
        layers,
        1 if intervention in OF_RANK_1 else rank,
        positions,
        tied,
        **fields,
    )
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in config.shapes().items()}
    if "R" in tensors:
        tensors["R"] = np.linalg.qr(tensors["R"].swapaxes(-1, -2))[0].swapaxes(-1, -2).copy()
    return Adapter(config, tensors)


def formula(adapter: Adapter, i: int, g: int, h: np.ndarray) -> np.ndarray:
    """pyreft's forward for the i-th layer and g-th position group, minus h."""
    t = {name: tensor[i, g].astype(np.float64) for name, tensor in adapter.tensors.items()}
    kind = adapter.config.intervention
    act = activation(adapter.config.act_fn)

    def acted(z: np.ndarray) -> np.ndarray:
        return act(torch.from_numpy(z)).numpy()

    if kind == "loreft":
        return (acted(h @ t["W"].T + t["b"]) - h @ t["R"].T) @ t["R"]
    if kind == "noreft":
        return (acted(h @ t["W1"].T + t["b"]) - (h @ t["W2"].T + t.get("b2", 0))) @ t["W2"]
    if kind == "direft":
        return acted(h @ t["W"].T + t["b"]) @ t["R"]
    if kind == "nodireft":
        return acted(h @ t["W1"].T + t["b"]) @ t["W2"]
    if kind == "red":
        return h * t["s"][0] + t["v"][0]
    if kind == "consreft":
        return (t["b"] - h @ t["R"].T) @ t["R"]
    if kind == "lobireft":
        return np.broadcast_to(t["b"] @ t["R"], h.shape)
    return np.broadcast_to(t["alpha"] * t["v"][0], h.shape)


def hidden(seed: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, D)).astype(np.float32)


def delta(edit: Edit, layer: int, h: np.ndarray, n: int) -> np.ndarray:
    return apply(edit, Place(layer), h, np.arange(len(h)), n) - h


@given(
    kind=st.sampled_from(INTERVENTIONS),
    seed=st.integers(0, 999),
    n=st.integers(1, 14),
    tied=st.booleans(),
    bias=st.booleans(),
    act=st.sampled_from(ACTS),
    positions=st.sampled_from(["f2+l2", "l3", "f1", "all", "gen", "all+gen", "f3+l3+gen"]),
)
def test_fold_is_the_formula(
    kind: str, seed: int, n: int, tied: bool, bias: bool, act: str, positions: str
) -> None:
    act = "linear" if kind in LINEAR_ONLY else act
    bias = bias and kind == "noreft"
    adapter = make_adapter(kind, seed, positions=positions, tied=tied, add_bias=bias, act_fn=act)
    h, t = hidden(seed, 16), np.arange(16)
    for i, layer in enumerate(adapter.config.layers):
        expected = np.zeros((16, D))
        for g, span in enumerate(adapter.config.spans):
            expected += active(span, t, n)[:, None] * formula(adapter, i, g, h.astype(np.float64))
        np.testing.assert_allclose(delta(fold(adapter), layer, h, n), expected, atol=2e-4)


@given(
    seed=st.integers(0, 999), factors=st.lists(st.floats(-2, 2), min_size=1, max_size=4), n=st.integers(1, 14)
)
def test_concatenation_adds_and_scale_multiplies(seed: int, factors: list[float], n: int) -> None:
    kinds = [INTERVENTIONS[(seed + i) % len(INTERVENTIONS)] for i in range(len(factors))]
    layers = [(0, 2), (1, 2), (2,), (0, 1, 3)]
    acts = ["linear" if kind in LINEAR_ONLY else ACTS[(seed + i) % len(ACTS)] for i, kind in enumerate(kinds)]
    edits = [
        fold(make_adapter(kind, seed + i, rank=i + 1, layers=layers[i], act_fn=act))
        for i, (kind, act) in enumerate(zip(kinds, acts, strict=True))
    ]
    together = concat([scale(edit, factor) for edit, factor in zip(edits, factors, strict=True)])
    h = hidden(seed, 16)
    for layer in range(LAYERS):
        expected = sum(
            np.float32(factor) * delta(edit, layer, h, n) for edit, factor in zip(edits, factors, strict=True)
        )
        np.testing.assert_allclose(delta(together, layer, h, n), expected, atol=5e-4)


@given(seed=st.integers(0, 999), cut=st.integers(0, 6))
def test_subspaces_split_an_edit(seed: int, cut: int) -> None:
    edit, h = fold(make_adapter("loreft", seed)), hidden(seed, 10)
    parts = [delta(subspace(edit, columns), 0, h, 10) for columns in (slice(None, cut), slice(cut, None))]
    np.testing.assert_allclose(parts[0] + parts[1], delta(edit, 0, h, 10), atol=1e-4)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_rank_0_and_scale_0_change_nothing(seed: int) -> None:
    edit, h = fold(make_adapter("loreft", seed, positions="all+gen")), hidden(seed, 10)
    assert np.array_equal(apply(subspace(edit, slice(0, 0)), Place(0), h, np.arange(10), 5), h)
    assert np.array_equal(apply(scale(edit, 0), Place(0), h, np.arange(10), 5), h)
    assert np.array_equal(apply(edit, Place(1), h, np.arange(10), 5), h)


def test_components_are_places_of_their_own() -> None:
    h = hidden(0, 10)
    edits = [fold(make_adapter("loreft", 1, component=component)) for component in COMPONENTS]
    together = concat(edits)
    for component, edit in zip(COMPONENTS, edits, strict=True):
        place = Place(0, component)
        assert np.array_equal(
            apply(together, place, h, np.arange(10), 10), apply(edit, place, h, np.arange(10), 10)
        )
    assert np.array_equal(apply(edits[1], Place(0), h, np.arange(10), 10), h)


def test_on_generated() -> None:
    assert fold(make_adapter("loreft", positions="l2+gen")).on_generated
    assert not fold(make_adapter("loreft", positions="all")).on_generated
    assert not scale(fold(make_adapter("loreft", positions="gen")), 0).on_generated


def test_refusals() -> None:
    with pytest.raises(ReftEdgeError, match="no edit"):
        concat([])
    with pytest.raises(
        ReftEdgeError, match="act_fn is 'gelu_new', which no port can carry; train it with one"
    ):
        fold(make_adapter("loreft", act_fn="gelu_new"))
    other = Edit(D + 1, (), {})
    with pytest.raises(ReftEdgeError, match="different hidden sizes"):
        concat([fold(make_adapter("loreft")), other])
