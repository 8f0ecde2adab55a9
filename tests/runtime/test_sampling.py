import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.sampling import Sampler, Sampling, probabilities

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 1.5], np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_greedy_is_the_default():
    assert Sampler(Sampling(), []).choose(LOGITS) == 0


@given(st.floats(0.2, 5))
def test_temperature(temperature):
    np.testing.assert_allclose(
        probabilities(LOGITS, Sampling(temperature)), softmax(LOGITS.astype(float) / temperature)
    )


def test_filters():
    def kept(**options):
        return np.flatnonzero(probabilities(LOGITS, Sampling(1.0, **options))).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 4]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.4) == [0]
    assert kept(top_p=0.7) == [0, 4]
    assert kept(min_p=0.3) == [0, 1, 4]
    assert kept(top_k=3, min_p=0.5) == [0, 4]


@given(seed=st.integers(0, 99), top_k=st.integers(0, 6), top_p=st.floats(0.01, 1), min_p=st.floats(0, 1))
def test_what_is_drawn_was_kept(seed, top_k, top_p, min_p):
    sampling = Sampling(0.8, top_k, top_p, min_p, seed=seed)
    p = probabilities(LOGITS, sampling)
    assert p.sum() == pytest.approx(1)
    assert p[0] > 0
    assert p[Sampler(sampling, []).choose(LOGITS)] > 0


def test_draws_follow_the_probabilities():
    sampler = Sampler(Sampling(1.0, seed=0), [])
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(counts, softmax(LOGITS), atol=0.03)


def test_repetition_penalty_counts_prompt_and_answer():
    sampler = Sampler(Sampling(repetition_penalty=2.5), [0])
    assert sampler.choose(LOGITS) == 4
    assert sampler.choose(LOGITS) == 1
    np.testing.assert_allclose(LOGITS, [2.0, 1.0, 0.0, -1.0, 1.5])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"temperature": float("nan")},
    ],
)
def test_bad_options(options):
    with pytest.raises(ReftEdgeError, match=next(iter(options))):
        Sampling(**options)
