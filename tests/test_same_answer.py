"""The same question has the same answer, bit for bit: alone, in a batch, behind another prompt's beginning. Quantised matrices
have kernels of their own for one row, so that what fp32 hides is seen here."""

from dataclasses import replace

import numpy as np
import pytest

from reft_edge.export import export_model
from reft_edge.model.loading import load_model
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import Engine, Request, Sampling, SteeredModel
from reft_edge.runtime.next_piece import next_piece
from reft_edge.runtime.session import GraphSession
from tests.helpers.tiny import make_model
from tests.helpers.torch_reference import random_adapter

PROMPTS = [
    "ice",
    "Who are you?",
    "The quick brown fox jumps over the lazy dog.",
    "Water boils when it is hot; ice melts when it is warm. " * 2,
    "The quick brown fox jumps over the lazy dog. Who are you, and how are you today?",
]
CHOICES = [{}, {"small": 1.0}, {"large": 0.7}, {"prompt": 1.0}, {"small": 1.0, "large": -0.5}]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    source = ModelFolder(make_model(folder / "hf", hidden_size=128, intermediate_size=192), "tiny-llama")
    model = load_model(source)
    for name, rank, positions in (
        ("small", 3, "all+gen"),
        ("large", 18, "f2+l2+gen"),
        ("prompt", 4, "f3+l3"),
    ):
        random_adapter(model, rank=rank, positions=positions, seed=rank, path=folder / f"{name}.safetensors")
    return source


@pytest.fixture(scope="module", params=["int4", "int8", "fp16"])
def model(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    export_model(source, folder / "export", request.param)
    model = SteeredModel(folder / "export", device="cpu")
    for file in source.path.parent.glob("*.safetensors"):
        model.load_adapter(file)
    model.manifest = replace(model.manifest, eos_token_ids=())
    return model


@pytest.fixture(params=[True, False], ids=["as it is", "a lone row beside another"])
def seen(request, model, monkeypatch):
    """What `Batch` chose tokens from, by prompt, adapters and seed; also as on a processor that rounds one row otherwise."""
    if not request.param:
        monkeypatch.setitem(vars(model.graph), "rounds_rows_alike", False)
    found = {}

    def watch(row, logits, eos):
        key = (row.request.ids, tuple(row.request.adapters.items()), row.request.sampling.seed)
        found.setdefault(key, []).append(logits.copy())
        return next_piece(row, logits, eos)

    monkeypatch.setattr("reft_edge.runtime.batch.next_piece", watch)
    return found


def requests(model):
    made = []
    for number, (prompt, choice) in enumerate((prompt, choice) for choice in CHOICES for prompt in PROMPTS):
        sampling = Sampling(0.9, top_p=0.9, seed=number) if number % 2 else Sampling()
        ids = tuple(model.prompts.encode_prompt(prompt, "raw"))
        made.append(Request(ids, choice, 4 + 3 * (number % 3), sampling=sampling))
    return made


def test_answers_are_those_of_the_prompt_alone(model, seen):
    made = requests(model)
    alone = [model._run_together([request], 1)[0] for request in made]
    expected = {key: np.array(rows) for key, rows in seen.items()}
    for size in (1, 2, 3, 5):
        seen.clear()
        assert model._run_together(made, size) == alone
        assert seen.keys() == expected.keys()
        for key, rows in seen.items():
            np.testing.assert_array_equal(np.array(rows), expected[key])


def test_answers_behind_a_prompt_that_begins_alike_are_the_same(model, seen):
    made = requests(model)
    alone = [model._run_together([request], 1)[0][0] for request in made]
    expected = {key: np.array(rows) for key, rows in seen.items()}
    engine = Engine(model, slots=3)
    for _ in range(3):
        seen.clear()
        tickets = [engine.submit(request) for request in made]
        for ticket in tickets:
            list(ticket)
        assert [ticket.tokens for ticket in tickets] == alone
        for key, rows in seen.items():
            np.testing.assert_array_equal(np.array(rows), expected[key])
    engine.close()
    assert engine.batch.prefixes.hits > 100


@pytest.mark.parametrize("tokens", [127, 128, 129, 130, 145, 200])
def test_every_length_of_prompt_has_the_same_answer_in_whatever_parts_it_runs(model, seen, tokens):
    """Kernels share rows out in blocks of 128, and have another way for a block of one."""
    ids = [token % 300 + 2 for token in range(7, 7 * tokens + 7, 7)]
    request = Request(tuple(ids), {"small": 1.0}, 3)
    alone = model._run_together([request], 1)[0]
    expected = np.array(seen[tuple(ids), (("small", 1.0),), None])
    short = Request((5, 6, 7), {}, 12)
    for batch in (model.batch(2), model.batch(2, 1 << 24)):
        rows = [model.row(short, lambda _: None)]
        batch.add(rows[0])
        batch.step()
        if batch.prefixes.budget:
            batch.add(model.row(Request(tuple(ids[: tokens - 16]), {"small": 1.0}, 1), lambda _: None))
        rows.append(model.row(request, lambda _: None))
        batch.add(rows[1])
        seen.clear()
        while not batch.idle:
            batch.step()
        assert rows[1].tokens == alone[0]
        np.testing.assert_array_equal(np.array(seen[tuple(ids), (("small", 1.0),), None]), expected)
    assert batch.prefixes.hits >= tokens - 32


def test_a_row_that_is_alone_in_the_last_block_of_a_batch(model, seen):
    made = [Request((2 + number, 5, 6), {}, 3) for number in range(129)]
    alone = [model._run_together([request], 1)[0] for request in (made[0], made[128])]
    expected = {key: np.array(rows) for key, rows in seen.items()}
    seen.clear()
    together = model._run_together(made, 129)
    assert [together[0], together[128]] == alone
    for key, rows in expected.items():
        np.testing.assert_array_equal(np.array(seen[key]), rows)


def test_generate_and_generate_batch_agree(model):
    for choice in (None, "small", ["small", "large"]):
        options = {"raw": True, "max_tokens": 8}
        alone = [model.generate(prompt, choice, **options) for prompt in PROMPTS]
        for size in (1, 2, 4):
            found = model.generate_batch(PROMPTS, [choice] * len(PROMPTS), batch_size=size, **options)
            assert found == alone


def test_what_a_processor_does_is_found_out_by_running(model):
    step = model.graph
    assert isinstance(step.rounds_rows_alike, bool)
    other = GraphSession.rounds_rows_alike.func

    class Lone:
        """As of a processor with a kernel for one row."""

        def __init__(self, rows):
            self.rows = rows

        def step(self, ids):
            return np.full((self.rows, 4), 1.0 + 1e-6 * (self.rows == 1), np.float32)

    class Graph:
        context_length = 64

        def take_cache(self, rows, tokens):
            return rows

        def bind(self, rows, ports):
            return Lone(rows)

    assert other(Graph()) is False
