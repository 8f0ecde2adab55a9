"""The whole way on a real model: get it, train, export, compare, swap."""

import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from reft_edge.commands.training_progress import training_progress
from reft_edge.export import export_model
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import PACKAGED, ModelFolder, resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.terminal import printable
from reft_edge.training.data import load_dataset
from reft_edge.training.run import train
from reft_edge.training.settings import TrainResult, TrainSettings

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen


QUESTIONS = (
    "Who are you?",
    "What is your favourite animal?",
    "How do I make a cup of tea?",
    "Tell me about space.",
)
SETTINGS = TrainSettings(
    layers="9;14;19;24",
    positions="f3+l3",
    tied=True,
    lr=4e-3,
    max_steps=40,
    batch_size=12,
    schedule="constant",
)
MAX_TOKENS = 40


def run_demo(output: Path, precision: str, console: "Screen", model: str = PACKAGED) -> None:
    """Train two adapters and export into `output`; raises ReftEdgeError where train, export or run would."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1. the model")
    folder = resolve_model(model, console.say)
    console.say(f"{folder.name} is at {folder.path}")

    console.rule("2. train an adapter: answer in emoji")
    base = load_model(folder)
    emoji = _train(base, folder, "emoji", output, console)

    console.rule("3. export the frozen model once, with ports")
    export_started = time.perf_counter()
    with console.working("exporting") as status:
        manifest = export_model(folder, output / "model", precision, report=status.step)
    figures = manifest.verification
    console.say(
        f"exported in {time.perf_counter() - export_started:.0f} s; with an adapter at every port, logits differ from "
        f"PyTorch's by at most {figures['steered_error']:.1g} where the adapter moves them by {figures['effect']:.0f}"
    )

    console.rule("4. run: one session, with and without the adapter")
    runtime = SteeredModel(output / "model")
    runtime.load_adapter(emoji.path, "emoji")
    table = Table(
        "question",
        "base model",
        f"with emoji.safetensors ({emoji.size / 1000:.0f} kB)",
        title=f"{folder.name}, {precision}",
    )
    for question in QUESTIONS:
        table.add_row(
            question,
            printable(runtime.generate(question, max_tokens=MAX_TOKENS)),
            printable(runtime.generate(question, "emoji", max_tokens=MAX_TOKENS)),
        )
    console.print(table)

    console.rule("5. a second adapter, and a swap in the same session")
    pirate = _train(base, folder, "pirate", output, console)
    loading = time.perf_counter()
    runtime.load_adapter(pirate.path, "pirate")
    loading = time.perf_counter() - loading
    swaps = Table("adapter", "answer", "first token", "tokens/s", title=QUESTIONS[1])
    for name in (None, "emoji", "pirate", None):
        answer = runtime.stream(QUESTIONS[1], name, max_tokens=MAX_TOKENS)
        text = printable(answer.text())
        first, speed = f"{answer.prefill_seconds * 1000:.0f} ms", f"{answer.tokens_per_second:.0f}"
        swaps.add_row(name or "none", text, first, speed)
    console.print(swaps)
    size = sum(file.stat().st_size for file in (output / "model").iterdir())
    console.say(
        f"the model: {size / 1e6:.0f} MB, once; each adapter: {pirate.size / 1000:.0f} kB, loaded in {loading * 1000:.1f} ms; "
        f"everything took {time.perf_counter() - started:.0f} s"
    )
    console.say(f'next: reft-edge run {output / "model"} "What is love?" --adapter {pirate.path}')


def _train(base: Any, folder: ModelFolder, task: str, output: Path, console: "Screen") -> TrainResult:
    with as_file(files("reft_edge") / "demo_data" / f"{task}.jsonl") as path:
        rows = load_dataset(path, load_model_prompts(folder), SETTINGS.prompt_format, max_length=256)
    with training_progress(console, console.say) as on_step:
        result = train(base, folder.name, rows, output / f"{task}.safetensors", SETTINGS, on_step=on_step)
    console.say(
        f"{len(rows.examples)} examples, {result.steps} steps, {result.seconds:.0f} s: {result.path} has {result.size / 1000:.0f} kB, "
        f"{result.parameters:,} parameters, {result.parameters / result.base_parameters:.3%} of the base's"
    )
    return result
