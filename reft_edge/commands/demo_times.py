"""How long the demo's parts will take on this machine: short measurements, from which the rest is reckoned."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reft_edge.export.checks import TEXTS
from reft_edge.model.prompts import Prompts
from reft_edge.runtime import SteeredModel
from reft_edge.training.data import Dataset
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings

_WEIGHTS_MOVED = 3.5
"""How often an export reads or writes the weights, counted in times that reading them took."""
_TEXTS_RUN = 3
"""How often it runs its texts, through PyTorch and through ONNX Runtime, counted in times that PyTorch took once."""
_TIMED_TOKENS = 4

Clock = Callable[[], float]


def time_step(base: Any, data: Dataset, settings: TrainSettings, clock: Clock = time.perf_counter) -> float:
    """Seconds that a step of this training takes: of two steps the second, since the first also warms up."""
    ends: list[float] = []
    with TemporaryDirectory(prefix="reft-edge-demo-") as folder:
        train(
            base,
            "probe",
            data,
            Path(folder) / "probe.safetensors",
            replace(settings, max_steps=2),
            on_step=lambda step: ends.append(clock()),
        )
    return ends[1] - ends[0]


def training_seconds(step: float, measured: Dataset, data: Dataset, steps: int) -> float:
    """Seconds of `steps` on other rows, where a step on the measured ones took `step` seconds."""
    return step * steps * _tokens(data) / _tokens(measured)


def export_seconds(
    base: Any, prompts: Prompts, imports: float, loading: float, clock: Clock = time.perf_counter
) -> float:
    """Seconds of an export: it starts a Python of its own, moves the weights about, and runs some texts to check.

    `imports` and `loading`: seconds that the imports of this process and the loading of the model took.
    """
    import torch

    started = clock()
    with torch.no_grad():
        for text in TEXTS:
            base(input_ids=torch.tensor([prompts.encode_raw(text)]))
    return imports + _WEIGHTS_MOVED * loading + _TEXTS_RUN * (clock() - started)


def answer_seconds(runtime: SteeredModel, question: str, tokens: int) -> float:
    """Seconds of an answer of that many tokens: the second of two short ones, since the first also warms up."""
    for _ in range(2):
        answer = runtime.stream(question, max_tokens=_TIMED_TOKENS)
        answer.text()
    steps = max(answer.decode_steps, 1)
    return answer.prefill_seconds + answer.decode_seconds / steps * (tokens - 1)


def _tokens(data: Dataset) -> int:
    """That a step runs: those with which all prompts begin run once."""
    columns = zip(*(row.prompt for row in data.examples), strict=False)
    shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, columns)))
    whole = sum(len(row.prompt) + len(row.completion) for row in data.examples)
    return whole - shared * (len(data.examples) - 1)
