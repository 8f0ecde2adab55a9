"""The whole way on a real model: get it, train, export, compare, swap."""

import time
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from reft_edge.commands.console import progress_bar
from reft_edge.commands.demo_times import answer_seconds, export_seconds, time_step, training_seconds
from reft_edge.commands.training_progress import duration, training_progress, working_on
from reft_edge.export import export_model
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.prompts import Prompts
from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.terminal import printable
from reft_edge.training.data import Dataset, load_dataset
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
TASKS = ("emoji", "pirate")
SWAPS = (None, "emoji", "pirate", None)


def run_demo(
    output: Path, precision: str, console: "Screen", model: str = "smollm2", imports: float = 0.0
) -> None:
    """Train two adapters and export into `output`; raises ReftEdgeError where train, export or run would.

    Every part says beforehand how long it will take. `imports`: seconds that this process's imports took.
    """
    started, steps = time.perf_counter(), SETTINGS.max_steps or 0
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1. the model")
    folder = resolve_model(model, console.say)
    console.say(f"{folder.name} is at {folder.path}")
    loading_started = time.perf_counter()
    base, prompts = load_model(folder), load_model_prompts(folder)
    loading = time.perf_counter() - loading_started
    rows = {task: _rows(task, prompts) for task in TASKS}
    with working_on(console, "measuring this machine"):
        step = time_step(base, rows["emoji"], SETTINGS)
        exporting = export_seconds(base, prompts, imports, loading)
    trainings = [training_seconds(step, rows["emoji"], rows[task], steps) for task in TASKS]
    console.say(f"two steps were timed: the whole demo takes {_about(sum(trainings) + exporting)}")

    console.rule("2. train an adapter: answer in emoji")
    console.say(f"{steps} steps, {_about(trainings[0])}")
    emoji = _train(base, folder, "emoji", rows["emoji"], output, console)

    console.rule("3. export the frozen model once, with ports")
    console.say(f"{_about(exporting)}: the graph is built, and checked against PyTorch")
    _export(folder, output / "model", precision, console)

    console.rule("4. run: one session, with and without the adapter")
    runtime = SteeredModel(output / "model")
    runtime.load_adapter(emoji.path, "emoji")
    answering = answer_seconds(runtime, QUESTIONS[0], MAX_TOKENS)
    _answer_all(runtime, emoji, f"{folder.name}, {precision}", answering, console)

    console.rule("5. a second adapter, and a swap in the same session")
    again = training_seconds(emoji.seconds / emoji.steps, rows["emoji"], rows["pirate"], steps)
    console.say(f"{steps} steps, {_about(again)}; then {_about(len(SWAPS) * answering)} of answers")
    pirate = _train(base, folder, "pirate", rows["pirate"], output, console)
    loading = _swap(runtime, pirate, console)
    size = sum(file.stat().st_size for file in (output / "model").iterdir())
    console.say(
        f"the model: {size / 1e6:.0f} MB, once; each adapter: {pirate.size / 1000:.0f} kB, loaded in {loading * 1000:.1f} ms; "
        f"everything took {time.perf_counter() - started:.0f} s"
    )
    console.say(f'next: reft-edge run {output / "model"} "What is love?" --adapter {pirate.path}')


def _about(seconds: float) -> str:
    return f"about {duration(max(seconds, 1))}"


def _rows(task: str, prompts: Prompts) -> Dataset:
    with as_file(files("reft_edge") / "demo_data" / f"{task}.jsonl") as path:
        return load_dataset(path, prompts, SETTINGS.prompt_format, max_length=256)


def _train(
    base: Any, folder: ModelFolder, task: str, rows: Dataset, output: Path, console: "Screen"
) -> TrainResult:
    with training_progress(console, console.say) as on_step:
        result = train(base, folder.name, rows, output / f"{task}.safetensors", SETTINGS, on_step=on_step)
    console.say(
        f"{len(rows.examples)} examples, {result.steps} steps, {result.seconds:.0f} s: {result.path} has {result.size / 1000:.0f} kB, "
        f"{result.parameters:,} parameters, {result.parameters / result.base_parameters:.3%} of the base's"
    )
    return result


def _export(folder: ModelFolder, output: Path, precision: str, console: "Screen") -> None:
    started = time.perf_counter()
    lines = nullcontext() if console.is_terminal else working_on(console, "exporting")
    with lines, console.working("exporting") as status:
        manifest = export_model(folder, output, precision, report=status.step)
    figures = manifest.verification
    console.say(
        f"exported in {time.perf_counter() - started:.0f} s; with an adapter at every port, logits differ from "
        f"PyTorch's by at most {figures['steered_error']:.1g} where the adapter moves them by {figures['effect']:.0f}"
    )


def _answer_all(
    runtime: SteeredModel, emoji: TrainResult, title: str, seconds: float, console: "Screen"
) -> None:
    count = 2 * len(QUESTIONS)
    console.say(f"{count} answers, {_about(count * seconds)}")
    table = Table(
        "question", "base model", f"with emoji.safetensors ({emoji.size / 1000:.0f} kB)", title=title
    )
    with progress_bar(console, "answers", count) as advance:
        for question in QUESTIONS:
            answers = []
            for name in (None, "emoji"):
                answers.append(printable(runtime.generate(question, name, max_tokens=MAX_TOKENS)))
                advance(1)
            table.add_row(question, *answers)
    console.print(table)


def _swap(runtime: SteeredModel, pirate: TrainResult, console: "Screen") -> float:
    """Print answers with one adapter after the other; gives the seconds in which the new one was loaded."""
    loading = time.perf_counter()
    runtime.load_adapter(pirate.path, "pirate")
    loading = time.perf_counter() - loading
    swaps = Table("adapter", "answer", "first token", "tokens/s", title=QUESTIONS[1])
    with progress_bar(console, "answers", len(SWAPS)) as advance:
        for name in SWAPS:
            answer = runtime.stream(QUESTIONS[1], name, max_tokens=MAX_TOKENS)
            text = printable(answer.text())
            first, speed = f"{answer.prefill_seconds * 1000:.0f} ms", f"{answer.tokens_per_second:.0f}"
            swaps.add_row(name or "none", text, first, speed)
            advance(1)
    console.print(swaps)
    return loading
