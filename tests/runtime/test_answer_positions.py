"""Adapters that act on some tokens of an answer only: however its tokens are run, each is edited as the graph's gate says."""

from dataclasses import replace

import numpy as np
import pytest

from reft_edge.adapter.file import save_adapter
from reft_edge.runtime import Constraint, Engine, Request, SteeredModel
from reft_edge.runtime.bench import random_adapter, timed_run
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.drafts import Lookup
from reft_edge.runtime.rows import SeparateRows
from reft_edge.runtime.speculation import StepCosts
from tests.helpers.batches import run_rows

POSITIONS = {
    "three": "gen3",
    "one": "f2+gen1",
    "steps": "l2|gen2|gen5|gen",
    "long": "all+gen19",
    "always": "gen",
    "skipping": "all+gen4-f1-l2",
}
CHOICES = [
    {"three": 1.0},
    {"one": -2.0},
    {"steps": 1.0},
    {},
    {"long": 1.0, "three": 0.5},
    {"always": 1.0, "one": 1.0},
    {"always": 1.0},
    {"three": 0.0},
    {"skipping": 2.0, "one": 1.0},
]
TEXTS = ["Who are you?", "ice", "Water boils when it is hot; ice melts"]


@pytest.fixture(scope="module", params=["joined", "separate", "int8"])
def model(request, device_folder, tmp_path_factory):
    cache = "int8" if request.param == "int8" else "auto"
    model = SteeredModel(device_folder / "export", device="cpu", cache_type=cache)
    model.manifest = replace(model.manifest, eos_token_ids=())
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, positions) in enumerate(POSITIONS.items()):
        adapter = random_adapter(model, 4, positions, seed=seed)
        for tensor in adapter.tensors.values():
            tensor *= 3
        save_adapter(adapter, folder / f"{name}.safetensors")
        model.load_adapter(folder / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        yield model


def ask(model, text, adapters, **fields):
    return Request(tuple(model.prompts.encode_prompt(text, "chat")), adapters, **fields)


def requests(model, tokens=24):
    return [
        ask(model, TEXTS[i % len(TEXTS)], choice, max_tokens=tokens - i) for i, choice in enumerate(CHOICES)
    ]


def logits_behind(model, row):
    """Before each of a row's tokens, from all tokens run at once with the graph's own gate."""
    ids, edit = list(row.request.ids), row.bound.edit
    ports = port_inputs(edit, model.manifest, model.graph.dtype) if edit else {}
    ports["reft.prompt_len"] = np.array([len(ids)], np.int64)
    [logits] = model.graph.score([[*ids, *row.tokens]], ports)
    return logits[len(ids) - 1 : -1]


def run(model, asked, **options):
    return run_rows(model.batch(len(asked), **{"speculate": False, **options}), model, asked)


def test_answers_alone_are_those_of_the_graphs_gate(model):
    if model.graph.cache_dtype == np.uint8:
        pytest.skip("8 bits a number move the logits")
    rows = [run(model, [request])[0][0] for request in requests(model)]
    for row in rows:
        behind = logits_behind(model, row)
        assert (behind.max(1) - behind[np.arange(len(row.tokens)), row.tokens] <= 1e-3).all()
    answers = {}
    for name in POSITIONS:
        [row], _, _ = run(model, [ask(model, "ice", {name: 1.0}, max_tokens=24)])
        answers[name] = tuple(row.tokens)
    assert len(set(answers.values())) == len(answers)


@pytest.mark.parametrize("slots", [2, 3, 9])
def test_rows_beside_others_are_what_they_are_alone(model, slots):
    asked = requests(model)
    alone = [run(model, [request])[0][0].tokens for request in asked]
    rows, _, _ = run_rows(model.batch(slots, speculate=False), model, asked)
    assert [row.tokens for row in rows] == alone
    assert all(len(row.tokens) == row.request.max_tokens for row in rows)


def test_rows_that_step_back_and_prompts_that_are_kept_change_nothing(model):
    asked = requests(model)
    alone = [run(model, [request])[0][0].tokens for request in asked]
    for options in ({"cache_budget": 110 * model.graph.token_bytes}, {"prefix_budget": 1 << 22}):
        batch = model.batch(3, speculate=False, **options)
        for _ in range(2):
            assert [row.tokens for row in run_rows(batch, model, asked)[0]] == alone
        assert batch.prefixes.hits > 0 or "cache_budget" in options


class Free(StepCosts):
    """Steps of any length cost the same, so that every guess is run."""

    def together(self, rows):
        return 1.0 * rows

    def alone(self, tokens):
        return 0.1


def test_guesses_stop_where_an_adapter_does(model, monkeypatch):
    if not model.graph.steps_back:
        pytest.skip("guesses cannot be taken back")
    asked = requests(model)
    alone = [run(model, [request])[0][0].tokens for request in asked]
    answers = {
        (request.ids, tuple(request.adapters)): tokens for request, tokens in zip(asked, alone, strict=True)
    }
    asks = []

    def best(self, most, sizes, cost):
        known = self._tokens
        answer = next(
            answer
            for (ids, _), answer in answers.items()
            if tuple(known) == (*ids, *answer[: len(known) - len(ids)])
        )
        done = next(len(known) - len(ids) for (ids, _), found in answers.items() if found is answer)
        guesses = answer[done : done + 7][:most]
        asks.append(most)
        return guesses, 1.0 + len(guesses)

    monkeypatch.setattr(Lookup, "best", best)
    monkeypatch.setattr(model, "_costs", Free())
    for group in ([each] for each in asked):
        rows, _, fewer = run(model, group, speculate=True)
        assert rows[0].tokens == alone[asked.index(group[0])]
        assert fewer < 20
    rows, _, _ = run(model, asked, speculate=True)
    assert [row.tokens for row in rows] == alone
    assert 0 in asks
    engine = Engine(model, slots=3, speculate=True)
    tickets = [engine.submit(request) for request in asked]
    for ticket in tickets:
        list(ticket)
    engine.close()
    assert [ticket.tokens for ticket in tickets] == alone


def test_forced_tokens_run_in_parts_that_end_where_an_adapter_does(model):
    pytest.importorskip("llguidance")
    form = Constraint.regex("(0|1)QZXJKVBPQZXJ(2|3)KVBPQZXJQZXJ(4|5)!")
    asked = [replace(request, constraint=form, max_tokens=40) for request in requests(model)]
    alone = [run(model, [request]) for request in asked]
    rows, texts, _ = run(model, asked)
    assert texts == [text for _, [text], _ in alone]
    assert [row.tokens for row in rows] == [row.tokens for [row], _, _ in alone]
    assert all(steps <= len(row.tokens) / 2 for [row], _, steps in alone)
    if model.graph.cache_dtype == np.uint8:
        return
    for row in rows:
        behind = logits_behind(model, row)
        for place, pair in ((0, "01"), (13, "23"), (26, "45")):
            two = [model.prompts.encode_raw(digit)[0] for digit in pair]
            assert row.tokens[place] == two[int(behind[place][two].argmax())]


def test_the_bench_times_what_acts(model):
    bound = model.prepare("steps")
    assert bound.ends == (2, 5)
    assert len(timed_run(model.graph, bound, [5] * 20, 8)) == 2
