"""What a training is told, and what it tells."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.model.device import DTYPES, torch_device
from reft_edge.model.places import named_layers
from reft_edge.steering.interventions import STARTS
from reft_edge.training.distributed import ALONE, Processes

SCHEDULES = ("linear", "cosine", "constant")


LOAD_IN = ("", "4bit", "8bit")


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults suit models of 100M to 1B parameters."""

    intervention: str = "loreft"
    layers: str = "all"
    rank: int = 4
    positions: str = "f7+l7"
    tied: bool = False
    act_fn: str = "linear"
    add_bias: bool = False
    prompt_format: str = "chat"
    lr: float = 2e-3
    epochs: float = 3.0
    max_steps: int | None = None
    """Optimiser steps; takes the place of `epochs`."""
    batch_size: int = 16
    """Rows a forward pass."""
    accumulate: int = 1
    """Forward passes an optimiser step."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    schedule: str = "linear"
    weight_decay: float = 0.0
    """AdamW's; never applied to the rotation R."""
    component: str = "block"
    """What of each layer is edited: the output of its `block`, its `attention` or its `mlp`."""
    dropout: float = 0.0
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    start: str = "auto"
    """`unchanged`: the first step's edit is none; `random`, as pyreft's; or `auto`: unchanged where the formula can."""
    dtype: str = "auto"
    """Of the base model's arithmetic: fp32, bf16 (autocast), or auto for bf16 where the hardware has it."""
    pooling: str = ""
    """What a classifier's head reads: `cls` or `mean`; empty where there is no head."""
    beta: float = 0.1
    """Of preference training: how firmly it holds on to the base's own preferences."""
    load_in: str = ""
    """`4bit` or `8bit` where the frozen base was quantised as it was loaded."""
    group_by_length: bool = False
    """Rows of like length share a forward pass, so that less is padding."""

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0 and math.isfinite(self.lr), "a positive number"),
            "epochs": (self.epochs > 0 and math.isfinite(self.epochs), "a positive number"),
            "max_steps": (self.max_steps is None or self.max_steps >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "warmup": (0 <= self.warmup < 1, "at least 0, less than 1"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip": (self.clip > 0, "a positive number"),
            "beta": (self.beta > 0 and math.isfinite(self.beta), "a positive number"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            "start": (self.start in STARTS, f"one of {', '.join(STARTS)}"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "load_in": (self.load_in in LOAD_IN, "4bit or 8bit"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                raise ReftEdgeError(f"{name} is {getattr(self, name)!r}; expected {expected}")


def of_kind(name: str, value: Any) -> Any:
    """A setting as its field has it, numbers of numpy's as Python's. Raises ReftEdgeError for a value of another type."""
    kind = get_type_hints(TrainSettings)[name]
    value = named_layers(value) if name == "layers" else value
    if kind in (bool, str):
        if isinstance(value, kind):
            return value
    elif not isinstance(value, bool):
        if kind is float and isinstance(value, Real):
            return float(value)
        if kind is not float and isinstance(value, Integral):
            return int(value)
    named = {bool: "True or False", str: "a text", float: "a number"}.get(kind, "a whole number")
    raise ReftEdgeError(f"{name} is {value!r:.100}; expected {named}")


@dataclass(frozen=True)
class StepReport:
    """One optimiser step."""

    step: int
    """Steps done, counting this one."""
    steps: int
    loss: float
    """Mean over the step's completion tokens, in nats."""
    lr: float
    tokens_per_second: float
    """Prompt and completion tokens, padding left out."""
    evaluation: float | None = None
    """Loss on the held-out rows after this step, where they were evaluated; it may not be finite."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training wrote."""

    path: Path
    size: int
    """Bytes."""
    parameters: int
    base_parameters: int
    steps: int
    loss: float
    """Mean training loss of the last tenth of the steps, in nats a token."""
    evaluation: float | None
    """Loss on the held-out file, in nats a token; None also where it is not finite."""
    seconds: float
    accuracy: float | None = None
    """Share of the held-out rows whose label is right, or of held-out pairs in which the chosen answer gained more."""
    profile: dict[str, float] | None = None
    """Mean seconds of a step by section, where asked for."""

    @property
    def adapter(self) -> Path:
        """The adapter file; `path` by another name."""
        return self.path


@dataclass(frozen=True)
class Execution:
    """How a training is carried out; nothing of it changes what is learnt, but for rounding."""

    device: str | None = None
    """A torch device; by default CUDA where there is one. Several processes choose their own."""
    processes: Processes = ALONE
    profile: bool = False
    """Measure where the time of a step goes."""
    checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile: faster steps after half a minute or so."""
    shared_prefix: bool = True
    """Run tokens with which all rows of a batch begin once for all of them."""
    needed_tokens: bool = True
    """Leave padding out, and out of the last block what has no label."""
    frozen_cache: int = 512
    """MB in which hidden states below the lowest edited layer are kept from one epoch to the next; 0 for none."""
    frozen_cache_in: Path | None = None
    """A folder for a file that holds them in place of memory."""

    def __post_init__(self) -> None:
        if self.frozen_cache < 0:
            raise ReftEdgeError(f"frozen_cache is {self.frozen_cache!r}; expected 0 MB or more")

    def place(self) -> torch.device:
        """The device of this process. Raises ReftEdgeError if it cannot be used."""
        if self.processes.accelerator is None:
            return torch_device(self.device)
        found: torch.device = self.processes.accelerator.device
        return found


PLAIN = Execution()
