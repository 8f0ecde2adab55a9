"""Many requests at once, each with its own adapters: every row must be what it is alone."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.adapter.algebra import Edit, Gate, concat, scale
from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.positions import Span
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Engine, QueueFullError, Request, Sampling, SteeredModel
from reft_edge.runtime.binding import decode_edit, decode_inputs, port_inputs
from reft_edge.runtime.prefix import Prefix, PrefixCache, shared
from reft_edge.runtime.rows import BoundRows, JoinedRows, SeparateRows
from tests.helpers.batches import run_rows

CHOICES = [None, "first", "everywhere", {"everywhere": 0.5}, {"first": 1.0, "everywhere": -0.7}]
PROMPTS = [
    "Who are you?",
    "ice",
    "The quick brown fox jumps over the lazy dog.",
    "Water boils when it is hot; ice melts",
]


@pytest.fixture(scope="module", params=["joined", "separate"])
def model(request, device_folder):
    """With rows of a batch in one buffer, and as on a GPU, where each row has a cache of its own."""
    model = SteeredModel(device_folder / "export", device="cpu")
    for name in ("first", "everywhere"):
        model.load_adapter(device_folder / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        yield model


def ids(model, prompt):
    return tuple(model.prompts.encode_prompt(prompt, "chat"))


def test_every_row_of_a_batch_is_its_solo_run(model):
    rows = [(prompt, choice) for choice in CHOICES for prompt in PROMPTS]
    solo = [model.generate(prompt, choice, raw=False, max_tokens=16) for prompt, choice in rows]
    prompts, choices = [prompt for prompt, _ in rows], [choice for _, choice in rows]
    for size in (1, 3, 8):
        assert model.generate_batch(prompts, choices, raw=False, max_tokens=16, batch_size=size) == solo
    assert len(set(solo)) > len(PROMPTS)


def test_logits_of_unlike_rows_are_those_of_solo_runs(model):
    """Decode steps of rows with unlike lengths and adapters, against each row in a cache of its own."""
    graph, batch = model.graph, model.batch(len(CHOICES))
    rows = [
        model.row(
            Request(ids(model, PROMPTS[i % len(PROMPTS)]), model._chosen(choice), 40), lambda piece: None
        )
        for i, choice in enumerate(CHOICES)
    ]
    for row in rows:
        batch.add(row)
    while len(batch.decoding) < len(rows):
        batch.step()
    for _ in range(3):
        found = {}
        original = batch._take
        batch._take = lambda row, logits, found=found, original=original: (
            found.__setitem__(id(row), logits.copy()) or original(row, logits)
        )
        batch._decode()
        batch._take = original
        assert len(found) >= 3
        for row in (row for row in rows if id(row) in found):
            history = [*row.request.ids, *row.tokens[:-1]]
            edit = row.bound.edit
            ports = port_inputs(edit, model.manifest, graph.dtype) if edit else {}
            ports["reft.prompt_len"] = np.array([len(row.request.ids)], np.int64)
            alone = graph.score([history], ports)[0][-1]
            assert np.abs(found[id(row)] - alone).max() <= 1e-4


def test_sampling_and_stop_rules_are_each_rows_own(model):
    options = [
        {"sampling": Sampling(temperature=1.0, seed=1), "max_tokens": 12},
        {"sampling": Sampling(temperature=0.7, top_k=5, seed=2), "max_tokens": 5},
        {"stop": ("e",), "max_tokens": 12},
    ]
    solo = [model.generate("Who are you?", "everywhere", raw=False, **option) for option in options]
    engine = Engine(model, slots=3)
    tickets = [
        engine.submit(Request(ids(model, "Who are you?"), {"everywhere": 1.0}, **option))
        for option in options
    ]
    found = ["".join(piece.text for piece in ticket) for ticket in tickets]
    engine.close()
    assert found == solo
    assert tickets[1].finish_reason == "length"


def test_requests_join_and_leave_a_running_engine(model):
    jobs = [
        (prompt, choice, 4 + 5 * (i % 4))
        for i, (prompt, choice) in enumerate(
            (prompt, choice) for choice in ("first", "everywhere", None) for prompt in PROMPTS
        )
    ]
    solo = [model.generate(prompt, choice, raw=False, max_tokens=count) for prompt, choice, count in jobs]
    engine, found = Engine(model, slots=3), [""] * len(jobs)

    def client(number):
        prompt, choice, count = jobs[number]
        time.sleep(0.002 * (number % 5))
        adapters = {} if choice is None else {choice: 1.0}
        found[number] = "".join(
            piece.text for piece in engine.submit(Request(ids(model, prompt), adapters, count))
        )

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert found == solo
    assert (engine.running, engine.waiting) == (0, 0)


def test_log_probabilities(model):
    engine = Engine(model)
    prompt = ids(model, "Who are you?")
    (ticket,) = [engine.submit(Request(prompt, max_tokens=4, logprobs=3))]
    scores = [score for piece in ticket for score in piece.tokens]
    engine.close()
    assert [score.token for score in scores] == ticket.tokens
    rows = model.logits([[*prompt, *ticket.tokens]], prompt_tokens=[len(prompt)])[0].astype(np.float64)
    for position, score in enumerate(scores):
        row = rows[len(prompt) - 1 + position]
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert abs(score.logprob - expected[score.token]) < 1e-4
        assert [token for token, _ in score.top] == list(np.argsort(-expected)[:3])


def test_cancelling_frees_the_slot(model):
    engine = Engine(model, slots=1)
    endless = Request(ids(model, "ice"), {"everywhere": 1.0}, 200, sampling=Sampling(temperature=2.0, seed=0))
    first, second = engine.submit(endless), engine.submit(endless)
    next(first)
    second.cancel()
    first.cancel()
    assert [list(ticket)[-1].finish_reason for ticket in (first, second)] == ["cancelled", "cancelled"]
    third = engine.submit(Request(ids(model, "ice"), max_tokens=3))
    assert "".join(piece.text for piece in third) == model.generate("ice", raw=False, max_tokens=3)
    engine.close()


def test_the_queue_is_bounded_and_closing_ends_everything(model):
    engine = Engine(model, slots=1, queue_limit=2)
    long = Request(ids(model, "ice"), {"everywhere": 1.0}, 200, sampling=Sampling(temperature=2.0, seed=0))
    tickets = [engine.submit(long)]
    next(tickets[0])
    tickets += [engine.submit(long), engine.submit(long)]
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        engine.submit(long)
    engine.close()
    assert [list(ticket)[-1].finish_reason for ticket in tickets] == ["cancelled"] * 3
    with pytest.raises(ReftEdgeError, match="closing and takes no more"):
        engine.submit(long)


def test_closing_can_wait_for_what_runs(model):
    engine = Engine(model, slots=1)
    tickets = [engine.submit(Request(ids(model, "ice"), max_tokens=5)) for _ in range(3)]
    engine.close(timeout=None)
    assert all(ticket.finish_reason in ("stop", "length") for ticket in tickets)


def test_a_reader_that_fails_loses_its_own_request_only(model):
    engine = Engine(model, slots=2)

    def broken(piece):
        raise RuntimeError("gone")

    lost = engine.submit(Request(ids(model, "ice"), {"everywhere": 1.0}, 200, logprobs=0), broken)
    other = engine.submit(Request(ids(model, "Who are you?"), max_tokens=12))
    assert "".join(piece.text for piece in other) == model.generate("Who are you?", raw=False, max_tokens=12)
    engine.close(timeout=None)
    assert lost.finish_reason in ("cancelled", "stop")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(()), "the prompt is empty"),
        (Request(tuple([5] * 256)), "the prompt has 256 tokens; this model's context is 256"),
        (Request((5,), max_tokens=0), "max_tokens is 0"),
        (Request((5,), {"nobody": 1.0}), "no adapter 'nobody' is loaded"),
        (Request((5,), {"first": float("nan")}), "expected a finite number"),
    ],
)
def test_requests_that_cannot_run_are_refused_at_once(model, request_, expected):
    engine = Engine(model)
    with pytest.raises(ReftEdgeError, match=expected):
        engine.submit(request_)
    engine.close()


def test_batches_of_unlike_lengths_need_prompts_and_choices_alike(model):
    with pytest.raises(ReftEdgeError, match="2 prompts and 1 adapter choices"):
        model.generate_batch(["a", "b"], ["first"])


def test_prefixes_are_reused_and_change_nothing(model):
    shared = "The quick brown fox jumps over the lazy dog. " * 2
    prompts = [
        shared + ending for ending in ("Who?", "ice melts when it is warm, water boils", "Who are you?")
    ]
    for choice in ({}, {"first": 1.0}, {"everywhere": 1.0}):
        engine = Engine(model, slots=1)
        for prompt in [*prompts, *prompts]:
            ticket = engine.submit(Request(ids(model, prompt), choice, 10))
            assert "".join(piece.text for piece in ticket) == model.generate(
                prompt, choice, raw=False, max_tokens=10
            )
        assert engine.batch.prefixes.hits > 3 * len(ids(model, shared)) * 0.5
        engine.close()


@pytest.mark.parametrize("choice", [{}, {"first": 1.0}])
def test_the_last_prompt_stays_in_its_row_for_the_next_that_begins_alike(model, monkeypatch, choice):
    start = "The quick brown fox jumps over the lazy dog. " * 2
    prompts = [start + ending for ending in ("Who?", "Why?", "ice melts when it is warm")]
    expected = [model.generate(prompt, choice, raw=False, max_tokens=6) for prompt in prompts]
    written = []
    engine = Engine(model, slots=2)
    monkeypatch.setattr(engine.batch._cache, "write", lambda *given: written.append(given))
    for prompt, text in zip(prompts, expected, strict=True):
        ticket = engine.submit(Request(ids(model, prompt), choice, 6))
        assert "".join(piece.text for piece in ticket) == text
    assert engine.batch.prefixes.hits > len(ids(model, start))
    assert not written
    engine.close()


def test_a_row_that_stays_is_of_its_adapter_and_ends_where_no_more_may_stay(model, monkeypatch):
    monkeypatch.setattr("reft_edge.runtime.rows._AT_REST", 20 * model.graph.token_bytes)
    prompt = ids(model, "The quick brown fox jumps over the lazy dog.")
    batch, taken_over = model.batch(2, prefix_budget=1 << 30), []
    for choice in (None, "first", "first", None, None):
        batch.prefixes = PrefixCache(1 << 30)
        request = Request(prompt, {choice: 1.0} if choice else {}, 4)
        ((row,), _, _) = run_rows(batch, model, [request])
        taken_over.append(batch.prefixes.hits)
        assert row.tokens == model._run_together([request], 1)[0][0]
    assert taken_over == ([0, 0, 16, 0, 16] if isinstance(batch._cache, JoinedRows) else [0] * 5)
    batch.abort("cancelled")
    batch.prefixes = PrefixCache(1 << 30)
    run_rows(batch, model, [request])
    assert batch.prefixes.hits == 0


def test_a_batch_that_remembers_nothing_keeps_no_row(model):
    batch = model.batch(1)
    run_rows(batch, model, [Request(ids(model, "ice melts when it is warm"), {}, 4)])
    assert batch._left is None
    assert not getattr(batch._cache, "capacity", 0)


def edit_of(span):
    return Edit(8, (Gate(span),), {})


@given(first=st.integers(0, 9), last=st.integers(0, 9), before=st.integers(1, 40), now=st.integers(1, 40))
def test_a_prefix_ends_where_interventions_begin_to_differ(first, last, before, now):
    from reft_edge.adapter.positions import active

    span = Span(first, last)
    count = shared([7] * before, [7] * now, edit_of(span))
    assert 0 <= count <= min(before, now)
    t = np.arange(count)
    assert np.array_equal(active(span, t, before), active(span, t, now))
    if count < min(before, now):
        assert active(span, count, before) != active(span, count, now)


def test_one_prompt_under_several_adapters_is_several_prefixes(model):
    prompt = "The quick brown fox jumps over the lazy dog."
    engine = Engine(model, slots=2)
    for _ in range(2):
        for choice in (None, "first", "everywhere"):
            ticket = engine.submit(Request(ids(model, prompt), {choice: 1.0} if choice else {}, 6))
            found = "".join(piece.text for piece in ticket)
            assert found == model.generate(prompt, choice, raw=False, max_tokens=6)
    engine.close()


def test_a_failing_step_ends_every_request_and_the_engine_goes_on(model, monkeypatch):
    engine = Engine(model, slots=2)

    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.batch.prefixes, "find", broken)
    tickets = [engine.submit(Request(ids(model, "ice"), max_tokens=4)) for _ in range(3)]
    last = [list(ticket)[-1] for ticket in tickets]
    assert {(piece.finish_reason, str(piece.error)) for piece in last} == {("error", "out of memory")}
    monkeypatch.undo()
    ticket = engine.submit(Request(ids(model, "ice"), max_tokens=4))
    assert "".join(piece.text for piece in ticket) == model.generate("ice", raw=False, max_tokens=4)
    engine.close()


def test_prefixes_belong_to_their_edit_and_stay_in_the_budget():
    def entry(start, edit=None, length=32):
        values = {"past_key_values.0.key": np.zeros((1, length, 4), np.float32)}
        return Prefix(tuple(range(start, start + length)), edit, values)

    size = entry(0).size
    cache = PrefixCache(2 * size)
    edit, late = edit_of(Span(first=9)), edit_of(Span(last=9))
    cache.add(entry(0))
    assert cache.find(list(range(40)), None)[0] == 32
    assert cache.find(list(range(40)), edit) == (0, None)
    assert cache.find(list(range(60)), late)[0] == 32
    assert cache.find(list(range(40)), late)[0] == 16  # its edit begins at token 31
    cache.add(entry(100))
    cache.add(entry(200, edit))
    assert cache.size <= 2 * size
    assert cache.find(list(range(40)), None) == (0, None)
    assert cache.find(list(range(200, 240)), edit)[0] == 32
    cache.add(entry(200, edit, 1000))
    assert cache.find(list(range(200, 240)), edit)[0] == 32


@settings(max_examples=20, deadline=None)
@given(factors=st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=2, max_size=2))
def test_a_decode_edit_is_what_acts_on_generated_tokens(device_folder, factors):
    names = ("first", "everywhere")
    edits = [fold_of(device_folder / f"{name}.safetensors") for name in names]
    edit = concat([scale(part, factor) for part, factor in zip(edits, factors, strict=True)])
    found = decode_edit(edit)
    assert bool(found) == (factors[1] != 0)
    inputs = decode_inputs([{}, found], np.dtype(np.float32))
    for place, part in found.items():
        a, b, back = part.A, part.b, part.B
        h = np.random.default_rng(0).normal(size=(4, len(a))).astype(np.float32)
        whole = edits[1].places[place]
        generated = [i for i, gate in enumerate(edits[1].gates) if gate.span.on_generated]
        columns = np.isin(whole.gates, generated)
        expected = factors[1] * ((h @ whole.A[:, columns] + whole.b[columns]) @ whole.B[columns])
        np.testing.assert_allclose((h @ a + b) @ back, expected, atol=1e-4)
        assert not inputs[f"{place.port}.A"][0].any()
        np.testing.assert_array_equal(inputs[f"{place.port}.B"][1, : len(back)], back)
        assert not inputs[f"{place.port}.B"][1, len(back) :].any()


def fold_of(path):
    from reft_edge.adapter.linear import fold

    return fold(load_adapter(path))


def test_a_prompt_is_remembered_for_what_is_new_in_it():
    values = {"k": np.zeros((1, 320, 1), np.float32)}
    cache = PrefixCache(10_000)
    assert cache.wants(range(320), None, 1280)
    assert not cache.wants(range(320), None, 10_001)
    cache.add(Prefix(tuple(range(320)), None, values))
    assert not cache.wants(range(320), None, 1280)
    assert not cache.wants([*range(320), *range(1000, 1010)], None, 1280)
    assert cache.wants([*range(320), *range(1000, 1030)], None, 1280)
    assert not cache.wants(range(5), None, 20)


def test_prefixes_of_an_edit_that_is_gone_go_with_the_next():
    cache = PrefixCache(10_000)
    ids = tuple(range(16))
    values = {"k": np.zeros((1, 16, 1), np.float32)}
    edit = Edit(8, (Gate(Span()),), {})
    cache.add(Prefix(ids, edit, values))
    assert cache.find([*ids, 1, 2], edit)[0] == 16
    del edit
    cache.add(Prefix(ids, None, values))
    assert cache.size == values["k"].nbytes
    assert cache.find([*ids, 1, 2], None)[0] == 16


def test_what_is_bound_is_kept_while_it_may_be_read(device_folder):
    """ONNX Runtime reads bound arrays where they lie, whether or not Python still has them."""
    model = SteeredModel(device_folder / "export", device="cpu")
    graph = model.graph
    ports = graph.to_device({"reft.scale": np.ones((1, 1, 1), np.float32)})
    kept = weakref.ref(ports["reft.scale"])
    values = {
        name: np.zeros((1, heads, 8, size), np.float32) for name, (heads, size) in graph.cache_shapes.items()
    }
    bound = BoundRows(graph, values, 1, ports)
    del ports
    gc.collect()
    assert kept() is not None
    del bound
    gc.collect()
    assert kept() is None
