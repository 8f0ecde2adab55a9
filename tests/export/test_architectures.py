"""Decoders of kinds that not all others have: layers with a state in place of keys and values, layers of unlike sizes, and
those that are refused by name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig

from reft_edge.adapter.linear import fold
from reft_edge.errors import ReftEdgeError
from reft_edge.export import export_model
from reft_edge.export.architectures import SAME_GRAPH, check_architecture
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import load_manifest
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import Request, Sampling, SteeredModel
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.speculation import StepCosts
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.tiny import ARCHITECTURES, SHARED, make_model
from tests.helpers.torch_reference import logits, random_adapter

ROWS = [[5, 80, 33, 120, 7, 61, 19, 200, 44], [3, 99, 150], [12, 77, 23, 8, 14]]


@pytest.fixture(scope="module", params=["lfm2", "qwen3_5_text", "gemma4_text"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = ModelFolder(make_model(folder / "hf", request.param), request.param)
    export_model(source, folder / "export", "int4" if request.param == "lfm2" else "fp32")
    torch_model = load_model(source)
    adapter = random_adapter(torch_model, positions="f2+l2+gen", path=folder / "a.safetensors")
    model = SteeredModel(folder / "export", device="cpu")
    model.load_adapter(folder / "a.safetensors")
    model.manifest = replace(model.manifest, eos_token_ids=())
    return torch_model, adapter, model


def test_a_state_is_carried_from_step_to_step_in_a_cache_that_grows(exported):
    _, _, model = exported
    names = [value.name for value in model.graph.session.get_inputs()]
    hybrid = model.manifest.architecture != "Gemma4ForCausalLM"
    assert model.manifest.cache == ("growing" if hybrid else "shared")
    assert any(name.startswith("past.") for name in names) == hybrid


def test_prompts_in_parts_and_in_batches_have_the_answers_of_each_alone(exported):
    _, _, model = exported
    requests = [
        Request(tuple(row), chosen, 6) for row in [*ROWS, ROWS[0] * 20] for chosen in ({}, {"a": 1.0})
    ]
    alone = [model._run_together([request], 1)[0] for request in requests]
    assert model._run_together(requests, 3) == alone
    batch = model.batch(3, prefix_budget=1 << 20)
    for _ in range(2):
        rows = [model.row(request, lambda _: None) for request in requests]
        for row in rows:
            batch.add(row)
        while not batch.idle:
            batch.step()
        assert [row.tokens for row in rows] == [tokens for tokens, _ in alone]


def test_states_cannot_be_stepped_back_and_sliding_windows_can(exported):
    """Guessed tokens that turn out wrong are taken back."""
    _, _, model = exported
    if model.manifest.cache == "growing":
        with pytest.raises(ReftEdgeError, match="cannot guess tokens ahead: some of its layers keep a state"):
            model.batch(1, speculate=True)
        assert model.batch(1).speculation is None
        return

    class Free(StepCosts):
        def together(self, rows):
            return 1.0 * rows

        def alone(self, tokens):
            return 0.1

    model._costs = Free()
    requests = [
        Request(tuple(ROWS[0] * 20), chosen, 60, sampling=Sampling(temperature, seed=1))
        for chosen in ({}, {"a": 1.0})
        for temperature in (0.0, 0.4)
    ]
    for request in requests:
        assert model._run_together([request], 1, True) == model._run_together([request], 1)


def test_a_prompt_in_parts_has_the_logits_of_the_whole(exported):
    _, _, model = exported
    ids = np.array([ROWS[0] * 3])
    whole = model.graph.bind(model.graph.take_cache(1, 64), {}).prefill(ids)
    parts = model.graph.bind(model.graph.take_cache(1, 64), {}).prefill(ids, 5)
    assert np.abs(whole - parts).max() < (1 if model.manifest.quantisation else 1e-4)


def test_rows_that_are_scored_together_have_lengths_of_their_own(exported):
    torch_model, adapter, model = exported
    if model.manifest.quantisation:
        pytest.skip("PyTorch has other weights")
    inputs = port_inputs(fold(adapter), model.manifest, model.graph.dtype)
    inputs["reft.prompt_len"] = np.array([len(row) for row in ROWS], np.int64)
    found = model.graph.score(ROWS, inputs)
    with steered(torch_model, (Interventions.from_adapter(adapter), 1.0)):
        for row, scored in zip(ROWS, found, strict=True):
            assert np.abs(scored - logits(torch_model, row).numpy()).max() < 1e-3


def test_a_state_of_no_fixed_size_is_refused(exported, tmp_path):
    from reft_edge.runtime.session import _state

    class Value:
        name, type = "past.0.conv", "tensor(float)"

        def __init__(self, *shape):
            self.shape = shape

    for shape, reason in (
        (("batch", "channels", 2), "expected fixed sizes"),
        (("batch", 1 << 20, 1 << 20), "too large for a state"),
    ):
        with pytest.raises(ReftEdgeError, match=reason):
            _state(Value(*shape))


REFUSED = {
    "granitemoehybrid": (
        {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0},
        r"GraniteMoeHybridForCausalLM has Mamba-2 layers \(0, 2\), which .* attention alone can be exported",
    ),
    "granitemoehybrid ": (
        {"layer_types": ["attention"] * 3, "num_local_experts": 4},
        "has experts beside its MLP",
    ),
    "gemma4_text": ({"hidden_size_per_layer_input": 16}, "an embedding for each layer .* as in E2B and E4B"),
    "gemma4_text ": ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, "has experts"),
    "phimoe": ({}, "PhimoeForCausalLM has experts .* for CUDA in int4 alone"),
    **{
        kind: ({}, "does not know .*; export it with another tool, .* `reft-edge add-ports`")
        for kind in ("olmo2", "olmo3", "cohere2", "glm4", "exaone4", "mixtral", "qwen3_moe", "mamba")
    },
    **{
        f"{kind} ": ({}, "does not know")
        for kind in (
            "falcon_h1",
            "deepseek_v3",
            "stablelm",
            "starcoder2",
            "gpt2",
            "opt",
            "bloom",
            "ministral3",
        )
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_built_is_refused_by_name(kind):
    changes, reason = REFUSED[kind]
    kind = kind.strip()
    config = AutoConfig.for_model(kind, **{**SHARED, **ARCHITECTURES.get(kind, {}), **changes})
    with pytest.raises(ReftEdgeError, match=f"tiny cannot be exported: .*{reason}"):
        check_architecture(config, "tiny")


@pytest.mark.parametrize("kind", ["gpt_oss", "lfm2_moe"])
def test_experts_are_not_rounded(kind):
    config = AutoConfig.for_model(kind, **{**SHARED, **ARCHITECTURES[kind]})
    with pytest.raises(
        ReftEdgeError, match=r"in int4 or int8: .* has experts, .*; choose --precision fp32 or fp16"
    ):
        check_architecture(config, "tiny", quantised=True)


def test_every_architecture_of_the_parity_table_is_let_through():
    for kind, changes in ARCHITECTURES.items():
        check_architecture(AutoConfig.for_model(kind, **{**SHARED, **changes}), "tiny")
    assert {"Qwen3_5ForCausalLM", "Gemma4ForCausalLM"} < set(SAME_GRAPH)


def test_a_text_model_among_other_parts_is_refused_by_name(tmp_path, device_folder):
    shutil.copytree(device_folder / "hf", tmp_path / "hf")
    text = json.loads((tmp_path / "hf/config.json").read_text())
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    whole["text_config"] = {**text, "model_type": "gemma3_text"}
    (tmp_path / "hf/config.json").write_text(json.dumps(whole))
    with pytest.raises(
        ReftEdgeError, match=r"Gemma3ForConditionalGeneration holds a text model .* ForCausalLM, and"
    ):
        export_model(ModelFolder(tmp_path / "hf", "hf"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_architecture_that_is_unknown_is_named_before_anything_is_built(tmp_path, device_folder):
    shutil.copytree(device_folder / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "architectures": ["BloomForCausalLM"]}))
    steps = []
    with pytest.raises(ReftEdgeError, match=r"hf cannot be exported: .* does not know BloomForCausalLM"):
        export_model(ModelFolder(tmp_path / "hf", "hf"), tmp_path / "a", report=steps.append)
    assert steps == []
    assert not (tmp_path / "a").exists()
    assert load_manifest(device_folder / "export").architecture == "LlamaForCausalLM"
