"""A base model's fingerprint: its own tensors, whatever is attached to it and however they are held."""

import pytest
import torch

from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.source import ModelFolder
from reft_edge.steering.hooks import Steering, steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.description import adapter_config
from reft_edge.training.settings import TrainSettings
from tests.helpers.tiny import make_model
from tests.helpers.torch_reference import random_adapter


@pytest.fixture(scope="module", params=["llama", "mistral"], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return ModelFolder(make_model(tmp_path_factory.mktemp("hf") / "hf", request.param), "tiny")


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.mark.parametrize(
    "attach",
    [
        lambda model, part: Steering(model, [(part, 1.0)]),
        lambda model, part: model.add_module("reft", part),
        lambda model, part: model.model.add_module("a_reft", part),
        lambda model, part: model.model.layers[1].add_module("reft", part),
    ],
    ids=["hooks", "module", "inside", "in-a-block"],
)
def test_what_is_attached_is_no_part_of_it(model, attach):
    before = fingerprint(model)
    config = adapter_config(model, "tiny", TrainSettings())
    parts = [Interventions.from_adapter(random_adapter(model, seed=seed)) for seed in (1, 2)]
    for part in parts:
        attach(model, part)
        assert fingerprint(model) == before
    assert adapter_config(model, "tiny", TrainSettings()) == config


def test_it_is_the_same_once_detached(model):
    before = fingerprint(model)
    part = Interventions.from_adapter(random_adapter(model))
    for _ in range(2):
        with steered(model, (part, 1.0)):
            assert fingerprint(model) == before
        assert fingerprint(model) == before
    model.reft = part
    del model.reft
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_does_not_depend_on_the_precision_of_loading(folder, model, dtype):
    other = load_model(folder, dtype=dtype)
    other.reft = Interventions.from_adapter(random_adapter(model))
    assert fingerprint(other) == fingerprint(model)


def test_a_compiled_model_is_the_same_one(model):
    assert fingerprint(torch.compile(model)) == fingerprint(model)


def test_one_that_was_quantised_as_it_was_loaded_keeps_the_stored_one(model):
    part = Interventions.from_adapter(random_adapter(model))
    before = fingerprint(model)
    model.base_fingerprint = before
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    model.reft = part
    assert fingerprint(model) == before


def test_other_weights_are_another_model(model):
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(model) != before
