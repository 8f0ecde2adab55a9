"""Tokens that are guessed and run together: whatever is guessed, an answer is what it is without."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Constraint, Engine, Request, Sampling, SteeredModel
from reft_edge.runtime.drafts import Lookup
from reft_edge.runtime.rows import SeparateRows
from reft_edge.runtime.speculation import StepCosts
from tests.helpers.batches import run_rows

CHOICES = [{}, {"first": 1.0}, {"everywhere": 1.0}, {"first": 1.0, "everywhere": -0.7}]


class Free(StepCosts):
    """Steps of any length cost the same, so that every guess is run."""

    def together(self, rows):
        return 1.0 * rows

    def alone(self, tokens):
        return 0.1


@pytest.fixture(scope="module", params=["joined", "separate", "int8"])
def model(request, device_folder):
    model = SteeredModel(
        device_folder / "export", device="cpu", cache_type="int8" if request.param == "int8" else "auto"
    )
    for name in ("first", "everywhere"):
        model.load_adapter(device_folder / f"{name}.safetensors")
    model._costs = Free()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        yield model


@pytest.fixture
def endless(model, monkeypatch):
    monkeypatch.setattr(model, "manifest", replace(model.manifest, eos_token_ids=()))
    return model


@pytest.fixture
def foresight(monkeypatch):
    """Guesses are what comes indeed, from the answers given here by their prompts, with a wrong one after every few."""
    answers = {}

    def best(self, most, sizes, cost):
        answer = next(answer for ids, answer in answers.items() if tuple(self._tokens[: len(ids)]) == ids)
        done = self.length - next(len(ids) for ids in answers if tuple(self._tokens[: len(ids)]) == ids)
        guesses = [token if at % 5 else token + 1 for at, token in enumerate(answer, 2)][done : done + 7]
        return guesses[:most], 1.0 + len(guesses[:most])

    monkeypatch.setattr(Lookup, "best", best)
    return answers


def run(model, requests, speculate, slots=3, **sizes):
    return run_rows(model.batch(slots, speculate=speculate, **sizes), model, requests)


def ask(model, text="Who are you?", adapters=None, **fields):
    return Request(tuple(model.prompts.encode_prompt(text, "chat")), adapters or {}, **fields)


OPTIONS = {
    "greedy": {},
    "drawn": {"sampling": Sampling(1.0, seed=3)},
    "filtered": {"sampling": Sampling(1.4, top_k=20, top_p=0.9, min_p=0.01, seed=11)},
    "penalties": {
        "sampling": Sampling(
            0.7,
            repetition_penalty=1.2,
            seed=5,
            frequency_penalty=0.3,
            presence_penalty=0.2,
            logit_bias={80: 2.0},
        )
    },
    "scores": {"logprobs": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("adapters", CHOICES, ids=["base", "first", "everywhere", "mix"])
def test_an_answer_is_the_one_without_guesses(endless, foresight, adapters, name):
    request = ask(endless, adapters=adapters, max_tokens=41, **OPTIONS[name])
    [plain], [text], steps = run(endless, [request], False)
    foresight[request.ids] = plain.tokens
    [row], [guessed], fewer = run(endless, [request], True)
    assert row.tokens == plain.tokens
    assert (guessed, row.finish_reason) == (text, plain.finish_reason) == (text, "length")
    assert fewer < steps / 2


def test_guesses_from_the_prompt_and_the_answer_are_right_or_taken_back(endless):
    """Without foresight: tiny models repeat themselves, so that some guesses hold."""
    requests = [
        ask(endless, text, adapters, max_tokens=48, sampling=sampling)
        for text in ("Who are you? Who are you? Who are", "ice melts when it is warm; ice melts")
        for adapters in CHOICES
        for sampling in (Sampling(), Sampling(0.5, seed=2))
    ]
    fewer = 0
    for request in requests:
        [plain], _, steps = run(endless, [request], False)
        [row], _, less = run(endless, [request], True)
        assert row.tokens == plain.tokens
        fewer += less < steps
    assert fewer > 3


def test_rows_of_a_batch_guess_for_themselves(endless, foresight):
    requests = [
        ask(endless, text, adapters, max_tokens=limit)
        for (text, limit), adapters in zip(
            [("ice", 30), ("Who are you?", 17), ("A", 1), ("Water boils", 2), ("The lazy dog", 44)],
            [*CHOICES, {}],
            strict=True,
        )
    ]
    alone = [run(endless, [request], False)[0][0].tokens for request in requests]
    foresight.update((request.ids, tokens) for request, tokens in zip(requests, alone, strict=True))
    _, _, steps = run(endless, requests, False)
    for sizes in ({}, {"cache_budget": 90 * endless.graph.token_bytes}, {"prefix_budget": 1 << 20}):
        rows, _, fewer = run(endless, requests, True, **sizes)
        assert [row.tokens for row in rows] == alone
        assert fewer < steps or "cache_budget" in sizes
    engine = Engine(endless, slots=2, speculate=True)
    tickets = [engine.submit(request) for request in requests]
    for ticket in tickets:
        list(ticket)
    engine.close()
    assert [ticket.tokens for ticket in tickets] == alone


@settings(max_examples=12)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_guessing_may_start_and_stop_at_any_step(device_folder, pattern):
    model = SHARED.setdefault("model", SteeredModel(device_folder / "export", device="cpu"))
    model.manifest = replace(model.manifest, eos_token_ids=())

    class Sometimes(Free):
        calls = 0

        def together(self, rows):
            self.calls += 1
            return 1.0 * rows if pattern[self.calls % len(pattern)] else None

    requests = [ask(model, text, max_tokens=40) for text in ("Who are you?", "ice ice ice")]
    plain, _, _ = run(model, requests, False)
    model._costs = Sometimes()
    rows, _, _ = run(model, requests, True)
    assert [row.tokens for row in rows] == [row.tokens for row in plain]


SHARED = {}


def test_ends_and_stop_strings_among_guesses_end_the_answer(model, endless, foresight, monkeypatch):
    request = ask(endless, adapters={"everywhere": 1.0}, max_tokens=40)
    [whole], [text], _ = run(endless, [request], False)
    foresight[request.ids] = whole.tokens
    for stop in (text[9:12], text[20:22]):
        stopped = replace(request, stop=(stop,))
        [plain], [expected], _ = run(endless, [stopped], False)
        [row], [found], _ = run(endless, [stopped], True)
        assert found == expected == text[: text.index(stop)]
        assert (row.tokens, row.finish_reason) == (plain.tokens, "stop")
    last = next(token for at, token in enumerate(whole.tokens) if at > 6 and token not in whole.tokens[:at])
    monkeypatch.setattr(endless, "manifest", replace(endless.manifest, eos_token_ids=(last,)))
    [row], _, _ = run(endless, [request], True)
    assert row.finish_reason == "stop"
    assert row.tokens == whole.tokens[: whole.tokens.index(last)]


def test_a_row_that_is_cancelled_or_fails_ends_alone(endless, foresight, monkeypatch):
    requests = [ask(endless, text, max_tokens=30) for text in ("ice", "Who are you?", "A")]
    alone = [run(endless, [request], False)[0][0].tokens for request in requests]
    foresight.update((request.ids, tokens) for request, tokens in zip(requests, alone, strict=True))
    batch = endless.batch(3, speculate=True)
    rows = [endless.row(request, lambda piece: None) for request in requests]
    rows[1].deliver = lambda piece: 1 / 0
    for row in rows:
        batch.add(row)
    while not batch.idle:
        batch.step()
    assert [row.finish_reason for row in rows] == ["length", "cancelled", "length"]
    assert [rows[0].tokens, rows[2].tokens] == [alone[0], alone[2]]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_the_form_of_an_answer_holds_among_guesses(model, foresight, temperature):
    pytest.importorskip("llguidance")
    form = Constraint.regex("(0|1)QZXJ(2|3)[a-z]{9}(4|5)!")
    request = ask(model, constraint=form, sampling=Sampling(temperature, seed=8))
    [plain], [text], _ = run(model, [request], False)
    foresight[request.ids] = plain.tokens
    [row], [found], _ = run(model, [request], True)
    assert (row.tokens, found, row.finish_reason) == (plain.tokens, text, "stop")


def test_guesses_need_a_cache_that_can_be_cut(model, monkeypatch):
    monkeypatch.setattr(model.graph, "steps_back", False)
    assert model.stream("ice", max_tokens=2).text() == model.generate("ice", max_tokens=2, speculate=False)
    with pytest.raises(ReftEdgeError, match=r"LlamaForCausalLM\) cannot guess .*--no-speculate"):
        model.stream("ice", speculate=True)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_unasked_tokens_are_guessed_where_they_change_no_answer(device_folder, foresight, monkeypatch, kind):
    model = SteeredModel(device_folder / "export", device="cpu", cache_type=kind)
    model._costs = Free()
    model.manifest = replace(model.manifest, eos_token_ids=())
    [plain], _, steps = run(model, [ask(model, max_tokens=40)], False)
    foresight[plain.request.ids] = plain.tokens
    for precision, alike in (("fp32", False), ("fp32", True), ("int4", False), ("int4", True)):
        monkeypatch.setattr(model, "manifest", replace(model.manifest, precision=precision))
        model.graph.__dict__["rounds_steps_alike"] = alike
        [row], _, fewer = run(model, [plain.request], None)
        assert row.tokens == plain.tokens
        assert (fewer < steps) == (alike or (precision, kind) == ("fp32", "auto"))
        assert run(model, [plain.request], True)[2] < steps


def test_a_step_tells_how_steps_round(device_folder):
    """Attention to caches in 8 bits rounds one token as it rounds several, on every machine tried."""
    small = SteeredModel(device_folder / "export", device="cpu", cache_type="int8").graph
    ids = np.arange(2, 42)[None]
    bound = small.bind(small.take_cache(1, 48), {})
    bound.prefill(ids[:, :36])
    several = bound.step_all(ids[:, 36:], 36)[0].copy()
    single = [bound.step_all(ids[:, at : at + 1], at)[0, 0].copy() for at in range(36, 40)]
    assert small.rounds_steps_alike == (several.tobytes() == np.stack(single).tobytes())
    assert np.abs(several - single).max() < 0.1


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60))
def test_a_lookup_guesses_what_followed_the_same_tokens(tokens, split):
    lookup = Lookup(tokens[:split])
    lookup.follow(tokens[split:])
    guesses, expected = lookup.best(15, (2, 4, 8, 16), lambda size: 1.0)
    seen = [at for at in range(2, len(tokens)) if tokens[at - 2 : at] == tokens[-2:]]
    assert len(guesses) == (15 if seen else 0)
    assert 1 <= expected <= 1 + len(guesses)
    if seen:
        assert any((tokens + guesses)[at : at + 15] == guesses for at in seen)


def test_guesses_that_fail_are_given_up_without_being_run():
    """What is guessed is held against what comes, whether it was run or not."""
    costs = [1.0, 1.4, 2.0, 3.3, 5.5]

    def cost(size):
        return costs[(1, 2, 4, 8, 16).index(size)]

    copied = Lookup(range(100))
    copied.follow(range(20))
    assert len(copied.best(30, (2, 4, 8, 16), cost)[0]) == 15
    assert len(copied.best(6, (2, 4, 8, 16), cost)[0]) == 3
    misled = Lookup([9, 9, 1, 9, 9, 2, 9, 9, 3, 9, 9, 4])
    for token in range(5, 40):
        misled.follow([9, 9])
        if token > 12:
            assert misled.best(30, (2, 4, 8, 16), cost)[0] == []
        misled.follow([token])


def test_steps_are_weighed_by_what_they_take():
    costs = StepCosts()
    assert costs.together(1) is None
    costs.ran_together(1, 1.0)
    assert (costs.together(1), costs.together(2)) == (1.0, None)
    assert costs.alone(4) == pytest.approx(1.99)
    costs.ran_alone(4, 30.0)
    assert costs.alone(4) == 30
    for _ in range(200):
        costs.ran_together(1, 1.0)
    assert costs.alone(4) < 2.6
    costs.ran_alone(4, 1.0)
    for _ in range(40):
        costs.ran_alone(4, 1.0)
    assert costs.alone(4) == pytest.approx(1.0, rel=0.01)
    costs.ran_together(1, 100.0)
    assert costs.together(1) < 1.5
    for _ in range(60):
        costs.ran_alone(4, 1.0)
    assert costs.together(1) is None


def test_where_longer_steps_cost_as_much_as_their_tokens_nothing_is_guessed(device_folder, monkeypatch):
    """By the clock: a run of several tokens is made slow."""
    model = SteeredModel(device_folder / "export", device="cpu")
    model.manifest = replace(model.manifest, eos_token_ids=())
    runs, run_bound = [], type(model.graph).run_bound

    def slow(self, inputs, ids, mask, starts):
        runs.append(ids.shape[1])
        time.sleep(0.002 * ids.size)
        run_bound(self, inputs, ids, mask, starts)

    monkeypatch.setattr(type(model.graph), "run_bound", slow)
    model.generate("ice ice ice ice ice ice", max_tokens=120, speculate=True)
    assert np.mean([count > 1 for count in runs[1:]]) < 0.1
