"""What exactness.py and speed.py share: a job for both sides, and processes that take steps in turn."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import reft_edge.export
from reft_edge.adapter.file import save_adapter
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.steering.interventions import Interventions, Rotation
from reft_edge.training.data import Dataset
from reft_edge.training.description import adapter_config
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import Trainer
from reft_edge.training.turns import Example

TEXT = Path(reft_edge.export.__file__).with_name("report_text.txt")
CONTENDER = Path(__file__).with_name("contender.py")


def report_tokens(source: ModelFolder) -> list[int]:
    """A text that ships with reft-edge, as the model's tokens."""
    return load_model_prompts(source).encode_raw(TEXT.read_text(encoding="utf-8"))


def prepare(
    source: ModelFolder,
    rows: list[Example],
    settings: TrainSettings,
    threads: int,
    work: Path,
) -> Path:
    """A job file: weights, an initial adapter, its rotations' charts for pyreft, and every step's batch."""
    model = load_model(source)
    config = adapter_config(model, source.name, settings)
    interventions = Interventions(config, seed=settings.seed)
    adapter = work / "initial.safetensors"
    save_adapter(interventions.to_adapter(), adapter)
    start = {name: tensor.detach().contiguous() for name, tensor in interventions.trained.items()}
    assert interventions.rotation is not None
    start["base"] = whole_base(interventions.rotation)
    save_file(start, work / "start.safetensors")
    trainer = Trainer(model, interventions, settings, Dataset(rows, 0, ""), torch.device("cpu"))
    batches = [trainer.rows(step) for step in range(trainer.steps)]
    job = {
        "model": str(source.path),
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "adapter": str(adapter),
        "start": str(work / "start.safetensors"),
        "layers": config.layers,
        "settings": asdict(settings),
        "threads": threads,
        "compiled": False,
        "rows": [(row.prompt, row.completion) for row in rows],
        "batches": [[(row.prompt, row.completion) for row in batch] for batch in batches],
    }
    path = work / "job.json"
    path.write_text(json.dumps(job))
    return path


def variant(job: Path, name: str, dtype: str, compiled: bool) -> Path:
    """The same job in other arithmetic."""
    changed = json.loads(job.read_text())
    changed["settings"]["dtype"] = dtype
    changed["compiled"] = compiled
    path = job.with_name(f"{name}.json")
    path.write_text(json.dumps(changed))
    return path


@torch.no_grad()
def whole_base(rotation: Rotation) -> torch.Tensor:
    """The square orthogonal matrices of which the initial R is the first columns, `[layers, groups, d, d]`."""
    *shape, size, rank = rotation.vectors.shape
    whole = torch.eye(size).expand(*shape, size, size).clone()
    whole.diagonal(dim1=-2, dim2=-1)[..., :rank] *= rotation.base_signs
    return rotation.moved(whole).contiguous()


class Side:
    """A contender in a process of its own."""

    def __init__(self, name: str, python: str, job: Path, log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [python, str(CONTENDER), name, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        while self._line() != "ready":
            pass

    def step(self) -> dict[str, Any]:
        """One optimiser step: its seconds, loss and peak memory."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def close(self) -> None:
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed:\n{self.log.read_text()[-2000:]}")
        return line.strip()
