"""A budget of KV caches that running requests share: what has no room waits, and every answer is the same."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Engine, Request, Sampling, SteeredModel, room, rows
from reft_edge.runtime.memory import give_back, sparse_zeros
from reft_edge.runtime.rows import SeparateRows


@pytest.fixture(scope="module", params=["joined", "separate"])
def model(request, device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(device_folder / "everywhere.safetensors")
    model.load_adapter(device_folder / "first.safetensors")
    model.manifest = replace(model.manifest, eos_token_ids=())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        patch.setattr(rows, "_STEP", 16)
        patch.setattr("reft_edge.runtime.batch.SPARE", 2)
        yield model


def requests(model):
    texts = ["ice", "Who are you?", "Water boils when it is hot.", "A", "How are you today?", "ice"]
    chosen = [{}, {"everywhere": 1.0}, {"first": 1.0}]
    found = []
    for number, text in enumerate(texts):
        sampling = Sampling(1.0, seed=number) if number % 2 else Sampling()
        ids = tuple(model.prompts.encode_prompt(text, "raw"))
        found.append(Request(ids, chosen[number % 3], 20 + 7 * number, sampling=sampling, logprobs=1))
    return found


def run(batch, model, requests):
    """Every request's pieces, its row, and how often one stepped back."""
    pieces = [[] for _ in requests]
    made = [
        model.row(request, found.append, batch.room) for request, found in zip(requests, pieces, strict=True)
    ]
    for row in made:
        batch.add(row)
    most = back = 0
    while not batch.idle:
        before = {row for row in batch._running() if row.tokens}
        batch.step()
        back += sum(row in before for row in batch.waiting)
        most = max(most, sum(row.length for row in batch._running()))
        assert most <= (batch.room or most)
    return pieces, made, back


@pytest.mark.parametrize("tokens", [64, 75, 110, 150])
def test_answers_under_a_budget_are_those_without_and_never_use_more(model, tokens):
    made = requests(model)
    whole, _, none = run(model.batch(4, speculate=False), model, made)
    assert none == 0
    batch = model.batch(4, 1 << 20, cache_budget=tokens * model.graph.token_bytes, speculate=False)
    assert batch.room == tokens
    found, _, back = run(batch, model, made)
    assert found == whole
    assert back > 0 or tokens >= 110
    assert not batch._running()
    assert not batch.waiting


def test_an_answer_that_fills_the_budget_alone_ends_there(model):
    request = Request(tuple(range(2, 12)), {}, 500)
    batch = model.batch(2, cache_budget=40 * model.graph.token_bytes)
    [pieces, other], [row, _], _ = run(batch, model, [request, replace(request, max_tokens=3)])
    assert (len(row.tokens), pieces[-1].finish_reason) == (30, "length")
    assert other[-1].finish_reason == "length"


def test_a_request_that_steps_back_can_be_cancelled(model):
    first, second = (Request(tuple(range(2, 12)), {}, 60) for _ in range(2))
    batch = model.batch(2, cache_budget=70 * model.graph.token_bytes)
    pieces = []
    made = [model.row(first, lambda _: None, batch.room), model.row(second, pieces.append, batch.room)]
    for row in made:
        batch.add(row)
    while made[1] not in batch.waiting or not made[1].tokens:
        batch.step()
    made[1].cancelled = True
    while not batch.idle:
        batch.step()
    assert pieces[-1].finish_reason == "cancelled"
    assert len(made[0].tokens) == 60


def test_a_prompt_that_the_budget_does_not_hold_is_refused_and_others_go_on(model):
    engine = Engine(model, slots=2, cache_budget=40 * model.graph.token_bytes)
    with pytest.raises(
        ReftEdgeError, match=r"has 40 tokens, and the memory for KV caches holds 40: .*--cache-memory"
    ):
        engine.submit(Request((5,) * 40, {}, 4))
    ticket = engine.submit(Request((5,) * 36, {}, 9))
    list(ticket)
    assert len(ticket.tokens) == 4
    engine.close()


def test_a_budget_that_holds_nothing_is_refused(model):
    with pytest.raises(
        ReftEdgeError, match=r"is 100 bytes; a token of this model takes .*, so give at least"
    ):
        model.batch(2, cache_budget=100)


def test_the_usual_budget_holds_a_context_and_not_more_than_half_of_the_memory(model, monkeypatch):
    assert room.usual_budget(model.graph) == room.LEAST_BUDGET
    monkeypatch.setattr(room, "LEAST_BUDGET", 1000)
    whole = model.graph.token_bytes * model.graph.context_length
    assert room.usual_budget(model.graph) == whole
    monkeypatch.setattr(room, "_memory", lambda: whole)
    assert room.usual_budget(model.graph) == whole // 2
    monkeypatch.setattr(room, "_memory", lambda: 0)
    assert room.usual_budget(model.graph) == 1000


@pytest.mark.skipif(sys.platform != "linux", reason="needs madvise")
def test_memory_of_a_row_that_left_is_given_back():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    values = sparse_zeros((4, 2, 16384, 64), np.float32)
    values[:] = 1
    assert resident() - before > 30 << 20
    for row in (1, 2, 3):
        give_back(values[row])
    assert resident() - before < 12 << 20
    assert (values[0] == 1).all()
    assert (values[1] == 0).all()
    give_back(np.ones(5, np.float32))
