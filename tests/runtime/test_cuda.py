"""The runtime on an NVIDIA GPU: graphs built for CUDA against PyTorch in float32. Skipped where there is none."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
if "CUDAExecutionProvider" not in ort.get_available_providers():
    pytest.skip("this ONNX Runtime has no CUDA provider", allow_module_level=True)

from reft_edge.adapter.file import load_adapter  # noqa: E402
from reft_edge.errors import ReftEdgeError  # noqa: E402
from reft_edge.export import export_model  # noqa: E402
from reft_edge.export.checks import batch_logits  # noqa: E402
from reft_edge.model.loading import load_model  # noqa: E402
from reft_edge.model.manifest import load_manifest  # noqa: E402
from reft_edge.model.source import ModelFolder  # noqa: E402
from reft_edge.runtime import Engine, Request, SteeredEncoder, SteeredModel  # noqa: E402
from reft_edge.steering.hooks import steered  # noqa: E402
from reft_edge.steering.interventions import Interventions  # noqa: E402
from tests.helpers.tiny import make_encoder, make_model  # noqa: E402
from tests.helpers.torch_reference import random_adapter  # noqa: E402

PROMPTS = [
    "ice",
    "Who are you?",
    "The quick brown fox jumps over the lazy dog. Who are you, and how are you today?",
    "Water boils when it is hot; ice melts when it is warm. " * 2,
]
ACTS = ("relu", "gelu", "silu", "tanh", "sigmoid")
CHOICES = [
    {},
    {"first": 1.0},
    {"everywhere": 0.7},
    {"first": 1.0, "everywhere": -0.5},
    {"everywhere": 0.7, "silu": 0.3},
    {"first": 1.0, "red": -0.1, "gelu": 0.2},
]
TOLERANCE = {"fp16": 0.01, "bf16": 0.06, "int8": 0.02, "int4": 0.02}
"""Of the largest logit; activations have 16 bits."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    made = make_model(folder / "hf", hidden_size=128, intermediate_size=256, max_position_embeddings=1024)
    source = ModelFolder(made, "tiny-llama")
    model = load_model(source)
    random_adapter(model, rank=4, positions="f3+l3", seed=1, path=folder / "first.safetensors")
    random_adapter(model, rank=9, positions="all+gen", seed=2, path=folder / "everywhere.safetensors")
    for act in ACTS:
        random_adapter(model, "nodireft", "all+gen", seed=3, act_fn=act, path=folder / f"{act}.safetensors")
    random_adapter(model, "red", "all+gen", seed=4, path=folder / "red.safetensors")
    return source


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "int4"])
def exported(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "export"
    export_model(source, folder, request.param, device="cuda", port_kinds=("affine", "act", "diagonal"))
    return folder


@pytest.fixture(scope="module")
def model(exported, source):
    model = SteeredModel(exported, device="cuda")
    for file in source.path.parent.glob("*.safetensors"):
        model.load_adapter(file)
    model.manifest = replace(model.manifest, eos_token_ids=())
    return model


def ids_of(model, prompt):
    return model.prompts.encode_prompt(prompt, "raw")


@torch.no_grad()
def expected_logits(exported, source, rows, name):
    if load_manifest(exported).precision in ("int8", "int4"):
        same = SteeredModel(exported, device="cpu")
        return same.logits(rows, name and same.load_adapter(source.path.parent / f"{name}.safetensors"))
    reference = load_model(source)
    if name is None:
        return batch_logits(reference, rows)
    interventions = Interventions.from_adapter(load_adapter(source.path.parent / f"{name}.safetensors"))
    with steered(reference, (interventions, 1.0)):
        return batch_logits(reference, rows)


def test_it_runs_there(model):
    assert model.device == "cuda"
    assert model.graph.session.get_providers()[0] == "CUDAExecutionProvider"


@pytest.mark.parametrize("name", [None, "first", "everywhere", *ACTS, "red"])
def test_logits_are_those_of_the_reference_up_to_rounding(model, exported, source, name):
    """PyTorch in float32; where weights are quantised, the same folder on the CPU."""
    rows = [ids_of(model, prompt) for prompt in PROMPTS]
    tolerance = TOLERANCE[model.manifest.precision]
    for found, wanted in zip(
        model.logits(rows, name), expected_logits(exported, source, rows, name), strict=True
    ):
        assert np.isfinite(found).all()
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_an_adapter_changes_the_answer_and_leaves_no_trace(model):
    prompt = PROMPTS[2]
    plain = model.generate(prompt, raw=True, max_tokens=24)
    steered_text = model.generate(prompt, "everywhere", raw=True, max_tokens=24)
    assert steered_text != plain
    assert model.generate(prompt, raw=True, max_tokens=24) == plain
    assert model.generate(prompt, "everywhere", raw=True, max_tokens=24) == steered_text


def test_steps_give_what_one_run_gives(model):
    ids = ids_of(model, PROMPTS[3])
    at_once = model.logits([ids])[0][-1]
    bound = model.graph.bind(model.graph.take_cache(1, len(ids)), {})
    bound.prefill(np.array([ids[:9]]))
    steps = [bound.step(np.array([[token]]))[0] for token in ids[9:]]
    tolerance = min(TOLERANCE[model.manifest.precision], 0.06)
    assert np.abs(steps[-1] - at_once).max() <= tolerance * np.abs(at_once).max()


def test_an_answer_outgrows_its_cache(model):
    short = model.stream(PROMPTS[1], "everywhere", raw=True, max_tokens=200)
    short.text()
    long = model.stream(PROMPTS[1], "everywhere", raw=True, max_tokens=700)
    long.text()
    assert len(long.tokens) == 700
    alike = 100 if model.manifest.precision == "bf16" else 200  # a larger cache is summed in other parts
    assert long.tokens[:alike] == short.tokens[:alike]


def test_rows_with_other_adapters_run_together(model):
    made = [
        Request(tuple(ids_of(model, prompt)), choice, 12 + 5 * number)
        for number, prompt in enumerate(PROMPTS)
        for choice in CHOICES
    ]
    alone = [model._run_together([request], 1)[0] for request in made]
    for size in (2, 5, 16):
        together = model._run_together(made, size)
        assert together == alone


def test_an_engine_remembers_prompts(model):
    requests = [Request(tuple(ids_of(model, PROMPTS[3] + prompt)), {"first": 1.0}, 8) for prompt in PROMPTS]
    alone = [model._run_together([request], 1)[0][0] for request in requests]
    engine = Engine(model, slots=3)
    for _ in range(2):
        tickets = [engine.submit(request) for request in requests]
        for ticket in tickets:
            list(ticket)
        assert [len(ticket.tokens) for ticket in tickets] == [8] * len(requests)
    if model.manifest.precision != "bf16":
        assert engine.batch.prefixes.hits > 0
    assert [ticket.tokens[0] for ticket in tickets] == [tokens[0] for tokens in alone]
    engine.close()


def test_too_little_memory_on_the_gpu_is_told(model, exported):
    with pytest.raises(ReftEdgeError, match="ONNX Runtime failed"):
        SteeredModel(exported, device="cuda", provider_options={"gpu_mem_limit": "1024"})


def test_an_encoder_runs_there(tmp_path):
    source = ModelFolder(make_encoder(tmp_path / "hf"), "tiny-bert")
    export_model(source, tmp_path / "export")
    found = SteeredEncoder(tmp_path / "export", device="cuda").embed(["Who are you?", "ice"])[0]
    expected = SteeredEncoder(tmp_path / "export", device="cpu").embed(["Who are you?", "ice"])[0]
    np.testing.assert_allclose(found, expected, atol=0.01)
