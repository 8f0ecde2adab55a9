"""Checkpoints that were tampered with: every one is refused with a reason before anything of it is taken."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from reft_edge.adapter.config import AdapterConfig
from reft_edge.errors import ReftEdgeError
from reft_edge.model.texts import Tokens
from reft_edge.steering.interventions import Interventions
from reft_edge.training.checkpoint import Checkpoint
from reft_edge.training.classification import LabelledText, LabelledTexts
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import Trainer

ROWS = LabelledTexts([LabelledText(Tokens((1, 2), (0, 0)), 0)] * 4, ("no", "yes"), "digest")
MINE = {"settings": {"lr": 0.1, "seed": 0}, "data": "digest"}
STEPS = 3


def make_trainer() -> Trainer:
    """One with a rotation and a head, of 4 steps, and no model: nothing is run."""
    config = AdapterConfig(
        intervention="loreft",
        base_name="tiny",
        base_fingerprint="0" * 16,
        hidden_size=6,
        num_layers=2,
        layers=(0, 1),
        rank=2,
        positions="f1+l1",
        labels=ROWS.labels,
        pooling="cls",
    )
    chosen = TrainSettings(max_steps=4, batch_size=2, dtype="fp32")
    return Trainer(None, Interventions(config), chosen, ROWS, torch.device("cpu"))


def trained() -> dict[str, torch.Tensor]:
    """The state of such a trainer after some steps with random gradients."""
    trainer = make_trainer()
    for step in range(STEPS):
        for parameter in trainer.interventions.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        trainer.optimizer.step()
        trainer.step += 1
        trainer.losses.append(1.5)
        trainer.held_out.append(float("nan"))
    return trainer.state()


STATE = trained()
MATRIX = "optimizer.trained.W.exp_avg"


def write(path, tensors, **metadata):
    header = {"step": str(STEPS), "belongs_to": json.dumps(MINE), **metadata}
    path.write_bytes(save(tensors, header))


def resume(path) -> Trainer:
    """As a training resumes; the trainer is as it was where that raises ReftEdgeError."""
    checkpoint, trainer = Checkpoint(path, MINE), make_trainer()
    before = trainer.state()
    try:
        found = checkpoint.load(trainer.expected_state)
        assert found is not None
        trainer.restore(*found)
    except ReftEdgeError:
        assert trainer.step == 0
        assert trainer.losses == []
        assert trainer.state().keys() == before.keys()
        raise
    return trainer


def test_a_sound_one_is_taken_whole(tmp_path):
    write(tmp_path / "c", STATE)
    taken = resume(tmp_path / "c")
    assert taken.step == STEPS
    for name, tensor in taken.state().items():
        assert torch.equal(tensor.nan_to_num(7), STATE[name].nan_to_num(7))


def changed(**changes):
    return {**STATE, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


@pytest.mark.parametrize(
    "metadata",
    [
        *({"step": step} for step in ("0", "-1", "4.0", "5", "1e1", "03", "٣", "²", "", "9" * 5000, " 3 ")),
        *({"belongs_to": text} for text in ("", "[", "5", "null", "{}", '{"settings": []}', "[" * 100_000)),
        {"belongs_to": json.dumps({**MINE, "data": "other"})},
        {"belongs_to": json.dumps({**MINE, "settings": {"lr": float("nan"), "seed": 0}})},
        {"belongs_to": json.dumps({**MINE, "more": 1})},
    ],
)
def test_odd_headers(tmp_path, metadata):
    write(tmp_path / "c", STATE, **metadata)
    with pytest.raises(ReftEdgeError, match=r"is not a usable checkpoint|of another training"):
        resume(tmp_path / "c")


@pytest.mark.parametrize("name", sorted(STATE))
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: None,
        lambda tensor: tensor[None],
        lambda tensor: torch.zeros(0),
        lambda tensor: tensor.half(),
        lambda tensor: tensor.to(torch.int32),
        lambda tensor: tensor.bool(),
    ],
    ids=["gone", "axis", "empty", "half", "int", "bool"],
)
def test_every_tensor_has_its_form(tmp_path, name, change):
    tensor = change(STATE[name])
    tensors = {key: value for key, value in STATE.items() if key != name}
    write(tmp_path / "c", tensors if tensor is None else {**tensors, name: tensor})
    with pytest.raises(ReftEdgeError, match="is not a usable checkpoint"):
        resume(tmp_path / "c")


@pytest.mark.parametrize("name", sorted(STATE.keys() - {"held_out"}))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_value_is_finite(tmp_path, name, value):
    spoilt = STATE[name].clone()
    spoilt.view(-1)[-1] = value
    write(tmp_path / "c", {**STATE, name: spoilt})
    with pytest.raises(ReftEdgeError, match=r"is not a usable checkpoint|is not finite"):
        resume(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.trained.W.step", lambda tensor: tensor * 0),
        ("optimizer.trained.W.step", lambda tensor: tensor + 0.5),
        ("optimizer.head.bias.step", lambda tensor: -tensor),
        ("optimizer.trained.b.exp_avg_sq", lambda tensor: -tensor),
        ("module.rotation.base_signs", lambda tensor: tensor * 0.5),
        ("module.rotation.base_vectors", lambda tensor: tensor * 1e30),
        ("more", lambda tensor: torch.zeros(1)),
        ("module.evil", lambda tensor: torch.zeros(1)),
    ],
)
def test_values_that_no_training_leaves(tmp_path, name, change):
    write(tmp_path / "c", {**STATE, name: change(STATE.get(name))})
    with pytest.raises(ReftEdgeError):
        resume(tmp_path / "c")


def test_what_is_not_safetensors(tmp_path):
    path = tmp_path / "c"
    write(path, STATE)
    whole = path.read_bytes()
    for content in (
        b"",
        b"{}",
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
        (2**60).to_bytes(8, "little"),
    ):
        path.write_bytes(content)
        with pytest.raises(ReftEdgeError, match="is not a usable checkpoint"):
            resume(path)
        assert not Checkpoint(path, MINE).remove()
        assert path.exists()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_bytes_are_taken_or_refused(tmp_path, data):
    write(tmp_path / "c", STATE)
    content = bytearray((tmp_path / "c").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, (header if data.draw(st.booleans()) else len(content)) - 1))
        new = data.draw(st.binary(min_size=0, max_size=9))
        content[start : start + (len(new) or 4)] = new
    (tmp_path / "c").write_bytes(bytes(content))
    try:
        taken = resume(tmp_path / "c")
    except ReftEdgeError:
        return
    taken.interventions.check_sound()
    assert load(taken_bytes(taken)).keys() == STATE.keys()


def taken_bytes(trainer: Trainer) -> bytes:
    return save(trainer.state())
