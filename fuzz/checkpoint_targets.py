"""The reader of checkpoints, up to a trainer that goes on from one."""

import json
from pathlib import Path

import torch
from harness import Target
from safetensors.torch import save

from reft_edge.adapter.config import AdapterConfig
from reft_edge.steering.interventions import Interventions
from reft_edge.training.checkpoint import Checkpoint
from reft_edge.training.data import Dataset
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import Trainer
from reft_edge.training.turns import Example

_MINE = {"settings": {"lr": 0.1, "seed": 0}, "data": "digest"}
_DATA = Dataset([Example((1, 2), (3,))] * 4, 0, "digest")


def checkpoint_target(folder: Path) -> Target:
    """A checkpoint of a small training, taken or refused."""
    path = folder / "a.checkpoint"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        checkpoint, trainer = Checkpoint(path, _MINE), _trainer()
        found = checkpoint.load(trainer.expected_state)
        if found is not None:
            trainer.restore(*found)
            trainer.interventions.check_sound()

    state = _after(2)
    sound = _file(state)
    return Target(
        read, [sound, _file(_after(1), step="1"), _file(state, step="9"), _file(state, belongs_to="[]")], 2
    )


def _trainer() -> Trainer:
    config = AdapterConfig(
        intervention="loreft",
        base_name="tiny",
        base_fingerprint="0" * 16,
        hidden_size=4,
        num_layers=1,
        layers=(0,),
        rank=1,
        positions="f1+l1",
    )
    settings = TrainSettings(max_steps=4, batch_size=2, dtype="fp32")
    return Trainer(None, Interventions(config), settings, _DATA, torch.device("cpu"))


def _after(steps: int) -> dict[str, torch.Tensor]:
    trainer = _trainer()
    for _ in range(steps):
        for parameter in trainer.interventions.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainer.optimizer.step()
        trainer.losses.append(1.0)
        trainer.held_out.append(float("nan"))
    return trainer.state()


def _file(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    return save(tensors, {"step": "2", "belongs_to": json.dumps(_MINE), **metadata})
