import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.sampling import Sampler, Sampling, distribution

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 1.5], np.float32)


def probabilities(logits, sampling):
    tokens, p = distribution(logits, sampling)
    assert (np.diff(tokens) > 0).all()
    dense = np.zeros(len(logits))
    dense[tokens] = p
    return dense


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_greedy_is_the_default():
    assert Sampler(Sampling(), []).choose(LOGITS) == 0


@given(st.floats(0.2, 5))
def test_temperature(temperature):
    np.testing.assert_allclose(
        probabilities(LOGITS, Sampling(temperature)),
        softmax(LOGITS.astype(float) / temperature),
        rtol=1e-5,
    )


@given(
    seed=st.integers(0, 999), size=st.integers(2, 400), spread=st.floats(0.1, 20), top_p=st.floats(0.01, 0.99)
)
def test_top_p_keeps_what_a_full_sort_keeps(seed, size, spread, top_p):
    logits = np.random.default_rng(seed).normal(scale=spread, size=size).astype(np.float32)
    share = softmax(logits)
    order = np.argsort(-share, kind="stable")
    before = np.cumsum(share[order], dtype=np.float64) - share[order]
    if np.abs(before - top_p).min() < 1e-5:
        return  # rounding decides
    assert np.flatnonzero(probabilities(logits, Sampling(1.0, top_p=top_p))).tolist() == sorted(
        order[before < top_p].tolist()
    )


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ReftEdgeError, match="not finite"):
        Sampler(Sampling(1.0), []).choose(np.array([1.0, np.nan, 0.0], np.float32))


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
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert p[0] > 0
    assert p[Sampler(sampling, []).choose(LOGITS)] > 0


def test_draws_follow_the_probabilities():
    sampler = Sampler(Sampling(1.0, seed=0), [])
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(counts, softmax(LOGITS), atol=0.03)


def test_draws_from_a_long_vocabulary_follow_the_probabilities():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    sampler = Sampler(Sampling(1.0, seed=0), [])
    drawn = np.array([sampler.choose(logits) for _ in range(20000)])
    share, expected = (
        np.histogram(drawn, bins=10, range=(0, 1000))[0] / 20000,
        softmax(logits).reshape(10, 100).sum(1),
    )
    np.testing.assert_allclose(share, expected, atol=0.015)
    assert softmax(logits)[drawn].mean() == pytest.approx((softmax(logits) ** 2).sum(), rel=0.05)


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


@pytest.mark.parametrize("temperature", [1e-46, 5e-324, 1e-320, 1e-40])
def test_a_temperature_that_float32_does_not_have_is_greedy(temperature):
    logits = np.array([0.5, 3.0, 2.999, -1e30], np.float32)
    assert {Sampler(Sampling(temperature, seed=seed), []).choose(logits) for seed in range(20)} == {1}


IMPOSSIBLE = np.array([-np.inf, 1.0, 2.0, -np.inf], np.float32)


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 0.7, 1e300])
@pytest.mark.parametrize(
    "logits",
    [
        [1.0, np.nan, 0.0],
        [np.inf, 1.0, 2.0],
        [-np.inf, -np.inf, -np.inf],
        [np.nan] * 3,
        [np.inf, np.nan, -np.inf],
    ],
)
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_p": 0.5}, {"repetition_penalty": 2.0}])
def test_logits_that_are_not_finite_are_an_error_at_any_setting(temperature, logits, options):
    with pytest.raises(ReftEdgeError, match="not finite"):
        Sampler(Sampling(temperature, **options), [0, 1]).choose(np.array(logits, np.float32))


@pytest.mark.filterwarnings("error")
def test_what_is_impossible_is_never_drawn():
    for temperature in (0.0, 1e-46, 1.0, 1e300):
        sampler = Sampler(Sampling(temperature, repetition_penalty=1.5, seed=0), [0, 1, 2, 3])
        assert {sampler.choose(IMPOSSIBLE) for _ in range(50)} <= {1, 2}


POSITIVE = st.floats(1e-300, 1.7e308)


@given(
    logits=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=30),
    temperature=st.one_of(st.just(0.0), POSITIVE),
    top_k=st.one_of(st.integers(0, 40), st.just(10**30)),
    top_p=st.floats(1e-300, 1.0),
    min_p=st.floats(0, 1),
    penalty=POSITIVE,
    seed=st.one_of(st.none(), st.integers(0, 2**200)),
)
@pytest.mark.filterwarnings("error")
def test_no_setting_breaks_a_draw(logits, temperature, top_k, top_p, min_p, penalty, seed):
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty, seed)
    sampler = Sampler(sampling, [0, len(logits) - 1])
    scores = np.array(logits, np.float32)
    for _ in range(3):
        assert 0 <= sampler.choose(scores) < len(logits)
    np.testing.assert_array_equal(scores, np.array(logits, np.float32))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_numbers_without_end_are_refused(name, value):
    with pytest.raises(ReftEdgeError, match=name):
        Sampling(**{name: value})


def test_bias_and_penalties_change_what_is_chosen():
    def greedy(count=1, **options):
        sampler = Sampler(Sampling(**options), [0])
        return [sampler.choose(LOGITS) for _ in range(count)]

    assert greedy(logit_bias={3: 3.5}) == [3]
    assert greedy(logit_bias={0: -100.0, 4: -100.0}) == [1]
    # 2.0 and 1.5 take turns as each mention costs 0.3; the prompt's tokens cost nothing.
    assert greedy(5, frequency_penalty=0.3) == [0, 0, 4, 0, 4]
    assert greedy(4, presence_penalty=0.6) == [0, 4, 0, 0]
    assert greedy(3, presence_penalty=-1.0) == [0, 0, 0]
    allowed = np.array([2, 3])
    assert Sampler(Sampling(logit_bias={3: 1.5}), []).choose(LOGITS, allowed) == 3
    impossible = np.array([-np.inf, 1.0], np.float32)
    assert Sampler(Sampling(logit_bias={0: 100.0}), []).choose(impossible) == 1


def test_bias_and_penalties_that_are_wrong_are_refused():
    with pytest.raises(ReftEdgeError, match="logit_bias names token 5; this model's tokens are from 0 to 4"):
        Sampler(Sampling(logit_bias={5: 1.0}), []).choose(LOGITS)
    for options in ({"logit_bias": {1: float("inf")}}, {"frequency_penalty": float("nan")}):
        with pytest.raises(ReftEdgeError, match="expected"):
            Sampling(**options)
