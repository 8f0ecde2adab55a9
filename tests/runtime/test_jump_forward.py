"""Tokens that an answer's form leaves no choice about are not chosen one by one: they run through the graph together."""

import json

import numpy as np
import pytest

from reft_edge.runtime import Constraint, Engine, Request, Sampling, SteeredModel, next_piece
from reft_edge.runtime.constraints import Constraints
from tests.helpers.batches import run_rows

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "favourite_colour": {"enum": ["red", "green", "greenish"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "is_ripe_already": {"type": "boolean"},
    },
    "required": ["favourite_colour", "count", "is_ripe_already"],
    "additionalProperties": False,
}
FORM = Constraint.json_schema(SCHEMA)


@pytest.fixture(scope="module")
def model(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(device_folder / "everywhere.safetensors")
    return model


def request(model, prompt="Who are you?", adapters=None, **fields):
    ids = tuple(model.encode(prompt, adapters or {}))
    return Request(ids, adapters or {}, constraint=FORM, **fields)


def run(model, requests):
    return run_rows(model.batch(max(2, len(requests))), model, requests)


@pytest.mark.parametrize("adapters", [{}, {"everywhere": 1.0}])
def test_what_is_chosen_follows_from_the_whole_text_before(model, adapters):
    """Greedy choices between forced tokens are those of the graph for all tokens before, run at once."""
    [row], [text], steps = run(model, [request(model, adapters=adapters)])
    assert set(json.loads(text)) == set(SCHEMA["properties"])
    assert steps < len(row.tokens) / 2
    ids = list(row.request.ids)
    [logits] = model.logits([[*ids, *row.tokens]], adapters, [len(ids)])
    progress = Constraints(model.prompts.tokenizer, model.manifest.eos_token_ids).begin(FORM)
    free = 0
    for place, token in enumerate(row.tokens):
        allowed = progress.allowed(logits.shape[1])
        forced = bool(progress._matcher.compute_ff_tokens())
        if not forced:
            free += 1
            assert token == allowed[logits[len(ids) + place - 1][allowed].argmax()]
        progress.take(token)
    assert 3 <= free < len(row.tokens) / 2


def test_rows_with_forced_tokens_run_beside_others(model):
    free = Request(tuple(model.encode("ice", {})), max_tokens=40)
    adapted = request(model, "Water boils", {"everywhere": 1.0})
    requests = [request(model), free, adapted, request(model, max_tokens=9), free]
    _, together, _ = run(model, requests)
    alone = [run(model, [each])[1][0] for each in requests]
    assert together == alone
    engine = Engine(model, slots=2)
    tickets = [engine.submit(each) for each in requests]
    assert ["".join(piece.text for piece in ticket) for ticket in tickets] == alone
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_text_is_that_of_an_answer_without_them(model, monkeypatch, temperature):
    """Where the model writes forced text in the same tokens; these are letters, so that there is one way only."""
    form = Constraint.regex("(0|1)QZXJ(2|3)KVBP(4|5)!")
    for seed in range(4):
        asked = {"constraint": form, "sampling": Sampling(temperature, seed=seed), "raw": True}
        jumped = model.stream("ice", **asked)
        text = jumped.text()
        with monkeypatch.context() as patch:
            patch.setattr(next_piece, "_MOST_FORCED", 0)
            plain = model.stream("ice", **asked)
            assert plain.text() == text
        assert jumped.tokens == plain.tokens
        assert jumped.decode_steps < plain.decode_steps
        assert jumped.tokens_per_second > 0


def test_limits_stops_and_penalties_see_forced_tokens(model):
    for limit in (1, 2, 5, 11):
        answer = model.stream("ice", constraint=Constraint.regex("(0|1)QZXJKVBPQZXJ"), max_tokens=limit)
        text = answer.text()
        assert (len(answer.tokens), answer.finish_reason) == (limit, "length")
        assert text[1:] == "QZXJKVBPQZXJ"[: limit - 1]
    stopped = model.stream("ice", constraint=Constraint.regex("(0|1)QZXJKVBPQZXJ"), stop=["JK"])
    assert stopped.text()[1:] == "QZX"
    assert stopped.finish_reason == "stop"
    whole = model.stream("ice", constraint=Constraint.regex("(0|1)QZXJ"))
    assert (whole.text()[1:], whole.finish_reason) == ("QZXJ", "stop")
    sampling = Sampling(frequency_penalty=2.0, logit_bias={model.prompts.encode_raw("Q")[0]: 1.5})
    form = Constraint.regex("(0|1)QQQQ(Q|Z)")
    assert model.generate("ice", constraint=form, sampling=sampling)[1:5] == "QQQQ"


def test_scores_are_given_for_every_token(model):
    """With log-probabilities, all tokens are chosen."""
    pieces = []
    row = model.row(request(model, logprobs=1), pieces.append)
    together = model.batch(1)
    together.add(row)
    while not together.idle:
        together.step()
    assert [score.token for piece in pieces for score in piece.tokens] == row.tokens
    assert np.isfinite([score.logprob for piece in pieces for score in piece.tokens]).all()
