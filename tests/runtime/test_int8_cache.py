"""KV caches in 8 bits: a quarter of the memory, nearly the same logits, and the same answer in a batch as alone."""

from dataclasses import replace

import numpy as np
import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Request, Sampling, SteeredModel
from reft_edge.runtime.int8_cache import with_int8_cache


@pytest.fixture(scope="module")
def plain(device_folder):
    return SteeredModel(device_folder / "export", device="cpu")


@pytest.fixture(scope="module")
def model(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu", cache_type="int8")
    model.load_adapter(device_folder / "everywhere.safetensors")
    model.manifest = replace(model.manifest, eos_token_ids=())
    return model


def last_logits(model, ids):
    bound = model.graph.bind(model.graph.take_cache(1, len(ids) + 8), {})
    bound.prefill(np.array([ids[:-4]]))
    return np.array([bound.step(np.array([[token]]))[0] for token in ids[-4:]])


def test_a_cache_takes_a_quarter_and_logits_hardly_change(model, plain):
    assert 4 * model.graph.token_bytes == plain.graph.token_bytes
    ids = [5, 80, 33, 120, 7, 61, 19, 200, 44, 3, 99, 150, 12, 77, 23, 8]
    exact, found = last_logits(plain, ids), last_logits(model, ids)
    assert 0 < np.abs(exact - found).max() < 0.1 * np.abs(exact).max()


def test_answers_in_a_batch_behind_prefixes_and_under_a_budget_are_those_alone(model):
    requests = [
        Request(
            tuple(model.prompts.encode_prompt(text, "raw")),
            {"everywhere": 1.0} if number % 2 else {},
            12 + number,
            sampling=Sampling(1.0, seed=number) if number % 3 else Sampling(),
        )
        for number, text in enumerate(
            ["Who are you?", "ice", "Water boils when it is hot.", "Who are you today?"] * 2
        )
    ]
    alone = [model._run_together([request], 1)[0][0] for request in requests]
    for budget in (None, 90 * model.graph.token_bytes):
        batch = model.batch(4, 1 << 20, budget)
        rows = [model.row(request, lambda _: None, batch.room) for request in requests]
        for row in rows:
            batch.add(row)
        while not batch.idle:
            batch.step()
        assert [row.tokens for row in rows] == alone


def test_other_types_and_devices_are_refused(device_folder, monkeypatch):
    with pytest.raises(ReftEdgeError, match="unknown type of cache 'int2'; choose one of auto, int8"):
        SteeredModel(device_folder / "export", cache_type="int2")
    monkeypatch.setattr("reft_edge.runtime.int8_cache.GraphSession", lambda *given, **more: Elsewhere())
    with pytest.raises(ReftEdgeError, match="is for the CPU, and this runs on cuda"):
        SteeredModel(device_folder / "export", cache_type="int8")


class Elsewhere:
    device = "cuda"


def test_a_graph_without_such_attention_is_refused(device_folder, tmp_path):
    scales = {
        "past_key_values.9.key": np.ones(4, np.float32),
        "past_key_values.9.value": np.ones(4, np.float32),
    }
    with pytest.raises(
        ReftEdgeError, match=r"cannot be int8: past_key_values.9.key, .*another operator than GroupQuery"
    ):
        with_int8_cache(device_folder / "export/model.onnx", scales)
    (tmp_path / "model.onnx").write_bytes(b"\x3a\xffno model")
    with pytest.raises(ReftEdgeError, match="it is no whole ONNX model"):
        with_int8_cache(tmp_path / "model.onnx", scales)
