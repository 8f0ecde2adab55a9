"""Memory of running requests: it follows the tokens that are used, and where there is none, one request ends."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Engine, Request, Sampling, SteeredModel, memory, rows, session
from reft_edge.runtime.memory import NoMemoryError, sparse_zeros
from reft_edge.runtime.rows import JoinedRows, SeparateRows, part_end

LONG = 120


@pytest.fixture(scope="module", params=["joined", "separate"])
def model(request, device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(device_folder / "everywhere.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        patch.setattr(rows, "_STEP", 16)
        patch.setattr(session, "_CACHE_STEP", 16)
        yield model


def ids(model, text="Who are you?"):
    return tuple(model.prompts.encode_prompt(text, "chat"))


def endless(model, count=LONG, seed=0, text="ice"):
    """A request that runs for `count` tokens: no token that ends an answer is likely."""
    return Request(ids(model, text), {"everywhere": 1.0}, count, sampling=Sampling(1.0, seed=seed))


@pytest.fixture(scope="module", autouse=True)
def no_end(model):
    manifest, model.manifest = model.manifest, replace(model.manifest, eos_token_ids=())
    yield
    model.manifest = manifest


def alone(model, request):
    [(tokens, _)] = model._run_together([request], 1)
    return tokens


def capacity(batch):
    cache = batch._cache
    if isinstance(cache, JoinedRows):
        return cache.capacity
    return max((held.capacity for held in cache._caches if held is not None), default=0)


def run(batch):
    most = 0
    while not batch.idle:
        batch.step()
        most = max(most, capacity(batch))
    return most


def test_a_cache_grows_with_its_tokens_and_is_given_back(model):
    batch, found = model.batch(3), []
    request = endless(model)
    row = model.row(replace(request, max_tokens=10**9), found.append)
    batch.add(row)
    batch.step()
    assert capacity(batch) <= len(request.ids) + 32
    while len(row.tokens) < 40:
        batch.step()
        assert capacity(batch) <= 2 * (row.length + 16)
    row.cancelled = True
    run(batch)
    assert capacity(batch) == 0
    assert row.tokens == alone(model, replace(request, max_tokens=40))[: len(row.tokens)]


def test_growing_and_shrinking_change_no_answer(model, monkeypatch):
    requests = [
        endless(model, count, seed, text)
        for seed, (count, text) in enumerate(
            [(150, "ice"), (3, "Who are you?"), (60, "Water"), (90, "A"), (5, "ice")]
        )
    ]
    monkeypatch.setattr(rows, "_STEP", 512)
    monkeypatch.setattr(session, "_CACHE_STEP", 512)
    whole = [alone(model, request) for request in requests]
    monkeypatch.undo()
    monkeypatch.setattr(rows, "_STEP", 16)
    monkeypatch.setattr(session, "_CACHE_STEP", 16)
    for slots in (1, 2, 5):
        found = model._run_together(requests, slots)
        assert [tokens for tokens, _ in found] == whole


def test_memory_of_a_long_row_is_given_back_while_others_run(model):
    if "separate" in str(type(model.batch(1)._cache)).lower():
        pytest.skip("each row has memory of its own")
    batch = model.batch(2)
    long, short = (model.row(endless(model, count), lambda piece: None) for count in (200, 230))
    batch.add(long)
    while len(long.tokens) < 180:
        batch.step()
    high = capacity(batch)
    long.cancelled = True
    batch.add(short)
    batch.step()
    batch.step()
    assert short.finish_reason is None
    assert capacity(batch) < high / 2


class Failing:
    """Calls a function, but fails at the n-th call, and at those after it while `broken`."""

    def __init__(self, function, at, error, times=1):
        self.function, self.left, self.error, self.times = function, at, error, times

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left <= 0 and self.times > 0:
            self.times -= 1
            raise self.error
        return self.function(*arguments, **options)


PLACES = {
    "memory": (rows, "sparse_zeros"),
    "caches": (session.GraphSession, "_empty_pasts"),
    "inputs": (session.GraphSession, "to_device"),
    "bindings": (session.GraphSession, "new_binding"),
    "logits": (session.GraphSession, "bind_logits"),
    "runs": (session.GraphSession, "run_bound"),
}


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), NoMemoryError("ONNX Runtime failed: bad allocation")]
)
@pytest.mark.parametrize("at", [1, 2, 5, 14])
@pytest.mark.parametrize("place", PLACES)
def test_an_allocation_that_fails_ends_one_request_at_most(model, monkeypatch, place, at, error):
    requests = [
        endless(model, count, count, text) for count, text in ((30, "ice"), (44, "Who are you?"), (12, "A"))
    ]
    whole = [alone(model, request) for request in requests]
    batch = model.batch(2, prefix_budget=1 << 20)
    pieces = [[] for _ in requests]
    made = [model.row(request, found.append) for request, found in zip(requests, pieces, strict=True)]
    for row in made:
        batch.add(row)
    owner, name = PLACES[place]
    failing = Failing(getattr(owner, name), at, error)
    monkeypatch.setattr(owner, name, lambda *given, **options: failing(*given, **options))
    run(batch)
    ended = [found[-1] for found in pieces]
    failed = [piece for piece in ended if piece.finish_reason == "error"]
    assert len(failed) <= 1
    for row, piece, expected in zip(made, ended, whole, strict=True):
        if piece.finish_reason == "error":
            assert isinstance(piece.error, NoMemoryError)
            assert row.tokens == expected[: len(row.tokens)]
        else:
            assert row.tokens == expected
    monkeypatch.undo()
    assert [tokens for tokens, _ in model._run_together(requests, 2)] == whole


def test_an_engine_answers_again_after_requests_that_found_no_memory(model, monkeypatch):
    request = endless(model, 8)
    whole = alone(model, request)
    engine = Engine(model, slots=2)
    with monkeypatch.context() as patch:
        for owner, name in (PLACES["memory"], PLACES["caches"]):
            patch.setattr(owner, name, Failing(None, 1, NoMemoryError("there is no memory"), 10**9))
        last = [list(engine.submit(request))[-1] for _ in range(3)]
    assert {(piece.finish_reason, str(piece.error)) for piece in last} == {("error", "there is no memory")}
    ticket = engine.submit(request)
    list(ticket)
    assert ticket.tokens == whole
    engine.close()


def test_a_stream_that_finds_no_memory_says_so_and_the_next_answers(model, monkeypatch):
    whole = model.generate("ice", max_tokens=40)
    stream = model.stream("ice", max_tokens=40)
    first = next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(session.GraphSession, "run_bound", Failing(None, 1, MemoryError(), 1))
        with pytest.raises(ReftEdgeError, match="not enough memory for this request"):
            list(stream)
    assert whole.startswith(first)
    assert stream.finish_reason == "error"
    assert model.generate("ice", max_tokens=40) == whole


@pytest.mark.parametrize("broken", ["sampler", "text", "deliver"])
def test_whatever_a_row_raises_ends_that_row_only(model, broken):
    requests = [endless(model, 20, seed) for seed in range(3)]
    whole = [alone(model, request) for request in requests]
    batch, pieces = model.batch(3), [[] for _ in requests]
    made = [model.row(request, found.append) for request, found in zip(requests, pieces, strict=True)]

    def fail(*given):
        raise KeyError("odd")

    if broken == "sampler":
        made[1].sampler.choose = fail
    elif broken == "text":
        made[1].text.push = fail
    else:
        made[1].deliver = fail
    for row in made:
        batch.add(row)
    run(batch)
    assert [made[0].tokens, made[2].tokens] == [whole[0], whole[2]]
    assert made[1].finish_reason in ("error", "cancelled")
    assert len(made[1].tokens) < 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_end_their_own_row(model, temperature):
    good = endless(model, 12)
    whole = alone(model, good)
    bad = replace(good, adapters={"everywhere": 1e38}, sampling=Sampling(temperature, seed=0))
    pieces = [[], []]
    batch = model.batch(2)
    made = [model.row(request, found.append) for request, found in zip((bad, good), pieces, strict=True)]
    for row in made:
        batch.add(row)
    run(batch)
    assert made[1].tokens == whole
    assert pieces[0][-1].finish_reason == "error"
    assert "not finite" in str(pieces[0][-1].error)
    with pytest.raises(ReftEdgeError, match="not finite"):
        model.generate("ice", {"everywhere": 1e38}, sampling=Sampling(temperature))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shape", [(8, 3, 8192, 64), (2, 8, 131072, 64)])
def test_zeros_take_memory_only_where_something_is_written(shape):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    array = sparse_zeros(shape, np.float32)
    array[:, :, :50] = 1
    assert resident() - before < 4 << 20
    assert not array[:, :, 50:60].any()


@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 70])
def test_memory_that_nobody_has_is_a_plain_error(size):
    with pytest.raises(NoMemoryError, match=r"no memory for .* MB of keys and values; ask for fewer"):
        sparse_zeros((1, 2, size, 4), np.float32)
    assert memory.sparse_zeros((3, 0, 2), np.float16).shape == (3, 0, 2)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 127, 128, 129, 130, 511, 512, 513, 1025, 1537])
@pytest.mark.parametrize("most", [128, 512])
@pytest.mark.parametrize("start", [0, 16, 48])
def test_parts_of_a_prompt_end_evenly_and_never_in_a_lone_token(tokens, most, start):
    if start and start > tokens - 2:
        return
    ends = [start]
    while ends[-1] < tokens:
        ends.append(part_end(ends[-1], tokens, most))
    sizes = np.diff(ends)
    assert ends[-1] == tokens
    assert all(end % 16 == 0 for end in ends[:-1])
    assert tokens == 1 or not any(size % 128 == 1 for size in sizes)
    assert sizes.max() <= most


def test_much_is_copied_as_little_is():
    """Two threads copy much, into memory that is asked for at once."""
    random = np.random.default_rng(0)
    for tokens in (3, 700):
        sources = [random.normal(size=(5, tokens + 9, 65)).astype(np.float32)[:, :tokens] for _ in range(20)]
        targets = [memory.sparse_zeros((3, 5, 1000, 65), np.float32) for _ in sources]
        memory.fill([target[1] for target in targets], sources)
        for target, source in zip(targets, sources, strict=True):
            assert (target[1, :, :tokens] == source).all()
            assert not target[1, :, tokens:].any()
            assert not target[0].any()
            assert not target[2].any()
    with pytest.raises(ValueError, match="broadcast"):
        memory.fill([targets[0][0]] * 20, [np.zeros((4, 700, 65), np.float32)] * 20)
