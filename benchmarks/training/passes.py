"""Training passes that leave out what changes nothing, each beside plain ones: steps take turns in one process.

    python benchmarks/training/passes.py [--rows demo|FILE.jsonl] [--dtype fp32|bf16]

SmolLM2-135M. `demo` are the demo's rows and settings: chat rows behind a system prompt, four layers from 9 on. Printed are
medians of a step's seconds, of the processor's seconds, and of each round's ratio to a plain step. Every row was seen once
before the clock starts.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reft_edge.commands.demo_steps import SETTINGS
from reft_edge.model.device import chosen_dtype
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import resolve_model
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.data import Dataset, load_dataset
from reft_edge.training.description import adapter_config
from reft_edge.training.frozen_base import frozen
from reft_edge.training.passes import Passes
from reft_edge.training.settings import Execution, TrainSettings
from reft_edge.training.trainer import Trainer

CPU = torch.device("cpu")
NONE = Execution(shared_prefix=False, needed_tokens=False, frozen_cache=0)
WAYS = {
    "plain": NONE,
    "shared prefix": dataclasses.replace(NONE, shared_prefix=True),
    "kept states": dataclasses.replace(NONE, frozen_cache=512),
    "needed tokens": dataclasses.replace(NONE, needed_tokens=True),
    "all three": Execution(),
}


class Way:
    """A training that can be asked for its next step."""

    def __init__(
        self, model: Any, data: Dataset, settings: TrainSettings, execution: Execution, stack: ExitStack
    ) -> None:
        model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        interventions = Interventions(adapter_config(model, "base", settings), seed=0)
        passes = Passes(model, interventions, data, settings, execution, print)
        self.trainer = Trainer(model, interventions, settings, data, CPU, logits=passes)
        stack.enter_context(frozen(model, self.trainer.autocast))
        stack.enter_context(passes.attached())
        self.steering = stack.enter_context(steered(model, (interventions, 1.0)))

    def step(self, number: int, learn: bool = True) -> tuple[float, float, float]:
        """Seconds, the processor's seconds, and the loss."""
        clocks = time.perf_counter(), time.process_time()
        loss = self.trainer._gradients(self.steering, self.trainer.rows(number))
        if learn:
            self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - clocks[0], time.process_time() - clocks[1], loss


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", default="demo")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--layers", default=SETTINGS.layers)
    parser.add_argument("--batch-size", type=int, default=SETTINGS.batch_size)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = resolve_model(given.model)
    prompts, form = load_model_prompts(source), "raw" if given.raw else "chat"
    with as_file(files("reft_edge") / "demo_data" / "emoji.jsonl") as demo:
        data = load_dataset(demo if given.rows == "demo" else Path(given.rows), prompts, form, 1024)
    settings = dataclasses.replace(
        SETTINGS, dtype=given.dtype, layers=given.layers, batch_size=given.batch_size, max_steps=1000
    )
    assert chosen_dtype(settings.dtype, CPU)
    model = load_model(source)
    epoch = -(-len(data.examples) // settings.batch_size)
    with ExitStack() as stack:
        ways = {name: Way(model, data, settings, how, stack) for name, how in WAYS.items()}
        for number in range(epoch):
            ways["kept states"].step(number, learn=False)
            ways["all three"].step(number, learn=False)
        for name in ("plain", "shared prefix", "needed tokens"):
            ways[name].step(0, learn=False)
        rounds = [
            {name: way.step(number) for name, way in ways.items()}
            for number in range(epoch, epoch + given.steps)
        ]
    table = Table("", "s a step", "processor", "steps/s, x", "processor, x", "last loss")
    for name in ways:
        wall, processor, _ = (
            statistics.median(values) for values in zip(*(one[name] for one in rounds), strict=True)
        )
        ratios = (
            statistics.median(one["plain"][clock] / one[name][clock] for one in rounds) for clock in (0, 1)
        )
        table.add_row(
            name,
            f"{wall:.2f}",
            f"{processor:.2f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{rounds[-1][name][2]:.4f}",
        )
    Console(width=120).print(f"{len(data.examples)} rows, layers {settings.layers}, {given.dtype}", table)


if __name__ == "__main__":
    main()
