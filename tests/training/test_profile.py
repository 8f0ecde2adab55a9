"""Where a step's time goes, and other ways to compute the same training."""

import json

import pytest
import torch
from typer.testing import CliRunner

from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.loading import load_model
from reft_edge.model.source import ModelFolder
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.frozen_base import (
    SHORT,
    checkpointed,
    compiled,
    frozen,
    quick_attention,
    rounded_once,
)
from reft_edge.training.objectives import batch_loss
from reft_edge.training.profile import SECTIONS, Profile, watched
from reft_edge.training.turns import Example
from tests.helpers.torch_reference import random_adapter

CPU = torch.device("cpu")
ROWS = [Example(tuple(range(3, 20)), (5, 6, 7)), Example((9, 8, 7, 6), (30, 31))]


@pytest.fixture
def model(device_folder):
    return load_model(ModelFolder(device_folder / "hf", "tiny"))


def loss_and_gradients(model, steering, autocast=False):
    loss = batch_loss(model, steering, ROWS, CPU, autocast)
    ((adapter, _),) = steering.adapters
    adapter.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in adapter.named_parameters()}


def assert_same(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=tolerance, atol=tolerance)


def plain(model, component="block"):
    adapter = Interventions.from_adapter(random_adapter(model, positions="f3+l3", component=component))
    with steered(model, (adapter, 1.0)) as steering:
        return adapter, loss_and_gradients(model, steering)


@pytest.mark.parametrize("component", ["block", "attention"])
def test_checkpointing_keeps_less_and_gives_the_same(model, component):
    adapter, expected = plain(model, component)
    kept = []

    def pack(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for context in (quick_attention, checkpointed):
        kept.append(0)
        with (
            context(model),
            steered(model, (adapter, 1.0)) as steering,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            assert_same(loss_and_gradients(model, steering), expected)
    assert kept[1] < kept[0]
    assert all("forward" not in vars(block) for block in decoder_layers(model))


def test_compiled_blocks_give_the_same(model):
    adapter, expected = plain(model)
    with compiled(model), steered(model, (adapter, 1.0)) as steering:
        assert_same(loss_and_gradients(model, steering), expected, 1e-4)
    assert all("forward" not in vars(block) for block in decoder_layers(model))


def test_compiling_without_a_compiler_says_so(model, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ReftEdgeError, match=r"--compile needs a C\+\+ compiler"), compiled(model):
        pass


def test_attention_of_short_rows_is_plain_and_the_same(model):
    adapter, expected = plain(model)
    used = []
    model.register_forward_hook(lambda *_: used.append(model.config._attn_implementation))
    long = [Example(tuple(3 + i % 200 for i in range(SHORT)), (5,))]
    with quick_attention(model), steered(model, (adapter, 1.0)) as steering:
        assert_same(loss_and_gradients(model, steering), expected)
        batch_loss(model, steering, long, CPU, autocast=False)
    assert used == ["eager", "sdpa"]
    assert model.config._attn_implementation == "sdpa"


def test_weights_rounded_once_are_what_autocast_multiplies_with(model):
    adapter, _ = plain(model)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with steered(model, (adapter, 1.0)) as steering:
        expected = loss_and_gradients(model, steering, autocast=True)
        with rounded_once(model):
            assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
            assert model.get_input_embeddings().weight.dtype == torch.float32
            assert_same(loss_and_gradients(model, steering, autocast=True), expected)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_every_section_gets_its_time(model):
    adapter = Interventions.from_adapter(random_adapter(model, positions="f3+l3"))
    profile = Profile(CPU)
    entered = []
    switch = profile.switch
    profile.switch = lambda section: (entered.append(section), switch(section))[1]
    with (
        frozen(model),
        steered(model, (adapter, 1.0)) as steering,
        watched(model, steering, profile),
    ):
        loss_and_gradients(model, steering)
    edits = len(adapter.config.places)
    forward = ["interventions", "base forward"] * (1 + edits) + ["loss"]
    backward = ["base backward", "interventions"] * edits
    assert entered == forward + backward  # below the lowest edit there is nothing to compute
    assert set(profile.seconds) == set(SECTIONS)


def test_the_first_step_is_left_out_where_there_are_more():
    profile = Profile(CPU)
    assert profile.a_step() is None
    profile.seconds["loss"] = 100.0
    profile.end_step()
    assert profile.a_step()["loss"] == 100.0
    for _ in range(2):
        profile.seconds["loss"] += 3.0
        profile.end_step()
    assert profile.steps == 2
    assert profile.a_step()["loss"] == pytest.approx(3.0)


@pytest.mark.parametrize("options", [[], ["--checkpointing"], ["--dtype", "bf16"]])
def test_the_command_line_prints_it(device_folder, tmp_path, options):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Who are you?", "completion": "I am well."}\n')
    arguments = ["train", str(device_folder / "hf"), str(rows), "-o", str(tmp_path / "a"), "--profile"]
    done = CliRunner().invoke(app, [*arguments, "--max-steps", "3", *options])
    assert done.exit_code == 0, done.output
    assert all(section in done.output for section in SECTIONS)
    done = CliRunner().invoke(app, [*arguments, "--max-steps", "3", "--json", *options])
    found = json.loads(done.stdout)["profile"]
    assert list(found) == list(SECTIONS)
    assert all(seconds > 0 for seconds in found.values())
