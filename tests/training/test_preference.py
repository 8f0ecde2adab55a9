"""Preference training: the loss is the paper's, the reference is the base, and training raises the margin."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reft_edge.adapter.file import load_adapter, read_config
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.preference import PreferenceObjective, load_preferences
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings
from tests.helpers.torch_reference import logits, random_adapter

CPU = torch.device("cpu")


@pytest.fixture
def model(device_folder):
    return load_model(ModelFolder(device_folder / "hf", "tiny"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    answers = ["I am well, thank you.", "ice melts", "the lazy dog"]
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "prompt": f"Question {i}?" * (1 + i % 3),
                    "chosen": answers[i % 3],
                    "rejected": answers[(i + 1) % 3],
                }
            )
            for i in range(9)
        )
    )
    return path


@pytest.fixture(scope="module")
def pairs(rows, device_folder):
    return load_preferences(rows, load_prompts(device_folder / "hf"), "chat", 999)


def whole_log_likelihood(model, row) -> float:
    """Of the answer, from one plain pass over prompt and answer."""
    known = logits(model, list(row.prompt + row.completion)).log_softmax(dim=-1)
    return sum(float(known[len(row.prompt) - 1 + i, token]) for i, token in enumerate(row.completion))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_is_the_papers(model, pairs, beta):
    adapter = Interventions.from_adapter(random_adapter(model, positions="f3+l3+gen", strength=0.1))
    objective = PreferenceObjective(beta)
    expected = 0.0
    for pair in pairs.examples:
        ratios = []
        for side in (pair.chosen, pair.rejected):
            base = whole_log_likelihood(model, side)
            with (
                steered(model, (adapter, 1.0)) as steering,
                steering.prompts(torch.tensor([len(side.prompt)])),
            ):
                ratios.append(whole_log_likelihood(model, side) - base)
        expected += math.log1p(math.exp(-beta * (ratios[0] - ratios[1])))
    with steered(model, (adapter, 1.0)) as steering:
        found = objective.loss(model, steering, pairs.examples, CPU, autocast=False)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert abs(expected - len(pairs.examples) * math.log(2)) > 0.01
    found.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_an_adapter_that_does_nothing_loses_log_two_a_pair(model, pairs):
    adapter = Interventions.from_adapter(random_adapter(model, "steering", strength=0.0))
    with steered(model, (adapter, 0.0)) as steering:
        loss = PreferenceObjective(0.5).loss(model, steering, pairs.examples, CPU, autocast=False)
    assert loss.item() == pytest.approx(len(pairs.examples) * math.log(2), rel=1e-6)


def test_off_is_the_base_and_only_inside_the_block(model, pairs):
    ids = list(pairs.examples[0].chosen.prompt)
    base = logits(model, ids)
    with steered(model, (Interventions.from_adapter(random_adapter(model)), 1.0)) as steering:
        changed = logits(model, ids)
        with steering.off():
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), changed)
    assert not torch.allclose(changed, base, atol=1e-2)


def test_training_raises_the_margin(model, pairs, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainSettings(
        positions="f3+l3", lr=0.02, max_steps=30, batch_size=9, dtype="fp32", beta=0.2, schedule="constant"
    )
    losses = []
    result = train(
        model,
        "tiny",
        pairs,
        tmp_path / "a.safetensors",
        settings,
        evaluation=pairs,
        on_step=lambda step: losses.append(step.loss),
    )
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert result.accuracy == 1.0
    assert result.evaluation < losses[0]
    trained = Interventions.from_adapter(load_adapter(tmp_path / "a.safetensors"))
    with steered(model, (trained, 1.0)) as steering, torch.no_grad():
        margins = PreferenceObjective(0.2).margins(model, steering, pairs.examples, CPU, autocast=False)
    assert float(margins.min()) > 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    described = read_config(tmp_path / "a.safetensors").training
    assert described["beta"] == 0.2
    assert described["evaluation_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b"}',
            "line 1: its shape is not known: it has the columns 'chosen', 'prompt'; expected",
        ),
        ('{"chosen": "b", "rejected": "c"}', "line 1: expected text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the same"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "empty"),
        ("[1]", "row 1: expected an object with named fields, found int"),
        ("{", "not valid JSON"),
        ("", "no pair to train on"),
        (json.dumps({"prompt": "a" * 99, "chosen": "b", "rejected": "c"}), "all 1 are longer than 20 tokens"),
    ],
)
def test_bad_pairs_are_named(device_folder, tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(ReftEdgeError, match=message):
        load_preferences(path, load_prompts(device_folder / "hf"), "chat", 20)


def test_the_command_line(device_folder, rows, tmp_path):
    arguments = ["train", str(device_folder / "hf"), str(rows), "-o", str(tmp_path / "a.safetensors")]
    options = ["--task", "preference", "--max-steps", "2", "--beta", "0.3", "--eval", str(rows), "--json"]
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout.strip().splitlines()[-1])["accuracy"] <= 1
    assert read_config(tmp_path / "a.safetensors").training["beta"] == 0.3
    bad = CliRunner().invoke(app, [*arguments, "--task", "preference", "--beta", "0"])
    assert bad.exit_code == 1
    assert "beta is 0.0" in bad.output
