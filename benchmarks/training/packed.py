"""A base held packed, as an export has it, beside a float32 copy of the same weights: memory, and seconds a training step.

    python benchmarks/training/packed.py MODEL EXPORTED_FOLDER --how packed|copy [--plain]

The rows are the demo's; LoReFT of rank 4 at every layer, f3+l3. Run it once for each way: printed are the medians of a step's
seconds and of its processor seconds, the first step left out, and the process's peak of memory.
"""

import argparse
import resource
import statistics
import tempfile
import time
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

from reft_edge.model.exported_weights import GraphWeights
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.manifest import load_manifest
from reft_edge.model.packed_base import load_exported
from reft_edge.model.source import resolve_model
from reft_edge.training.data import load_dataset
from reft_edge.training.run import train
from reft_edge.training.settings import Execution, StepReport, TrainSettings


def main() -> None:
    """Measure one of the two ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("exported", type=Path)
    parser.add_argument("--how", choices=["packed", "copy"], default="packed")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--plain", action="store_true", help="leave nothing out of passes")
    given = parser.parse_args()
    source = resolve_model(given.model)
    with as_file(files("reft_edge") / "demo_data" / "emoji.jsonl") as path:
        rows = load_dataset(path, load_model_prompts(source), "chat", 256)
    if given.how == "packed":
        model = load_exported(source, given.exported)
    else:
        model = load_model(source)
        weights = GraphWeights(model, given.exported / load_manifest(given.exported).graph)
        weights.prepare(model)
        for name, parameter in model.named_parameters():
            weights.change(name, parameter.data)
    settings = TrainSettings(
        positions="f3+l3", batch_size=given.batch_size, max_steps=given.steps, dtype=given.dtype
    )
    clocks, losses = [(time.perf_counter(), time.process_time())], []

    def note(step: StepReport) -> None:
        clocks.append((time.perf_counter(), time.process_time()))
        losses.append(step.loss)

    with tempfile.TemporaryDirectory() as folder:
        quick, memory = not given.plain, 0 if given.plain else Execution.frozen_cache
        execution = Execution(
            checkpointing=given.checkpointing, shared_prefix=quick, needed_tokens=quick, frozen_cache=memory
        )
        train(
            model,
            "base",
            rows,
            Path(folder) / "adapter.safetensors",
            settings,
            execution=execution,
            on_step=note,
        )
    steps = [
        [after - before for before, after in zip(one, other, strict=True)]
        for one, other in pairwise(clocks[1:])
    ]
    wall, processor = (statistics.median(values) for values in zip(*steps, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{given.how}: {wall:.1f} s a step, {processor:.1f} s of processors; peak {peak:.2f} GB; losses {losses}"
    )


if __name__ == "__main__":
    main()
