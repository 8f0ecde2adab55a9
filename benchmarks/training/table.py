"""LoReFT of reft-edge against pyreft and PEFT's LoRA: the same rows, order, schedule and test questions for each.

    sh benchmarks/training/environments.sh ENVIRONMENTS
    python benchmarks/training/table.py DATA_FOLDER ENVIRONMENTS

DATA_FOLDER holds sst2/, arc-easy/, boolq/ and gsm8k/, each with train.jsonl and test.jsonl (sst2 also dev.jsonl). Every
training and every test is one process and one file under `results/`; what is there is not done again, so that an
interrupted run goes on. Learning rates are chosen on dev rows of the first task. Then steps/s and memory are measured with the methods
taking turns, and the table and the plots are made. Tests ask for the likeliest choice, by its mean a token, or generate
greedily and take the last number, by the rules of `reft-edge eval`.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tasks import TASKS, Task, completion, load

from reft_edge.evaluation.answering import judge
from reft_edge.evaluation.results import Record, compare_records, summarise
from reft_edge.evaluation.tasks import Question, Questions, load_questions
from reft_edge.model.loading import load_model_prompts
from reft_edge.model.prompts import Prompts
from reft_edge.model.source import resolve_model
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import grouped, rate
from reft_edge.training.turns import encode_row

HERE = Path(__file__).parent
MARK = "<!-- trainings -->"


@dataclass(frozen=True)
class Method:
    """A library with its settings, and the learning rates to choose from."""

    name: str
    title: str
    library: str
    settings: dict[str, Any]
    rates: tuple[float, ...] = ()
    follows: str = ""
    """Another method of the same formula, whose chosen learning rate is used."""
    only: tuple[str, ...] = tuple(TASKS)
    """Tasks it is tried on."""
    dtype: str = ""
    """In place of --dtype."""


def loreft(rank: int, tied: bool = True) -> dict[str, Any]:
    return {"rank": rank, "first": 3, "last": 3, "tied": tied}


def lora(rank: int) -> dict[str, Any]:
    """The modules that LLM-Adapters adapts, alpha twice the rank."""
    return {
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    }


LOREFT_RATES = (2e-3,)
LORA_RATES = (3e-4, 1e-3)
METHODS = {
    method.name: method
    for method in (
        Method("base", "no adapter", "base", {}),
        Method("loreft", "LoReFT, rank 4, reft-edge", "reft-edge", loreft(4), LOREFT_RATES),
        Method("lora", "LoRA, rank 8, PEFT", "peft", lora(8), LORA_RATES),
        Method("pyreft", "LoReFT, rank 4, pyreft", "pyreft", loreft(4), follows="loreft"),
        Method(
            "pyreft-fp32",
            "LoReFT, rank 4, pyreft, fp32",
            "pyreft",
            loreft(4),
            follows="loreft",
            only=("sst2",),
            dtype="fp32",
        ),
        Method(
            "pyreft-reflections",
            "the same, R's base completed by reflections",
            "pyreft",
            loreft(4) | {"completion": "reflections"},
            follows="loreft",
            only=("sst2",),
            dtype="fp32",
        ),
        Method(
            "loreft-r1",
            "LoReFT, rank 1, reft-edge",
            "reft-edge",
            loreft(1),
            follows="loreft",
            only=("sst2",),
        ),
        Method("lora-r1", "LoRA, rank 1, PEFT", "peft", lora(1), follows="lora", only=("sst2",)),
    )
}
COMPARED = ("loreft", "pyreft", "lora")


@dataclass(frozen=True)
class Prepared:
    """The token ids of a task's rows, the same for every library."""

    task: Task
    rows: list[tuple[list[int], list[int]]]
    dev: list[dict[str, Any]]
    dev_answers: list[int] | None
    """Which option of each dev question is right; None where there are no choices."""
    questions: Questions
    test: dict[str, list[dict[str, Any]]]
    """`test`: the questions with options, if there are choices."""
    asked: dict[str, Any] | None


@dataclass
class Bench:
    """Where things are."""

    environments: Path
    work: Path
    results: Path
    model: Path
    prompts: Prompts
    threads: int
    dtype: str
    seed: int
    chosen: dict[str, float]
    """Learning rates by method, as chosen so far."""

    def python(self, library: str) -> str:
        if library in ("peft", "pyreft"):
            return str(self.environments / library / "bin" / "python")
        return sys.executable

    def job(self, prepared: Prepared, method: Method, lr: float, **given: Any) -> dict[str, Any]:
        place = self.work / prepared.task.name / f"{method.name}-{lr:g}"
        adapter = place.with_suffix(place.suffix + ".safetensors") if method.library == "reft-edge" else place
        common = {
            "library": method.library,
            "settings": method.settings,
            "model": str(self.model),
            "adapter": str(adapter),
            "threads": self.threads,
            "dtype": method.dtype or self.dtype,
            "seed": self.seed,
            "lr": lr,
            "train": None,
            "questions": {},
            "asked": None,
            "paced": False,
        }
        return common | given

    def training(self, prepared: Prepared, lr: float, steps: int) -> dict[str, Any]:
        """The batches that reft-edge's trainer draws from its file, as row numbers, and each step's learning rate."""
        task = prepared.task
        settings = TrainSettings(lr=lr, max_steps=steps, batch_size=task.batch_size, seed=self.seed)
        return {
            "rows": prepared.rows,
            "batches": drawn(self.seed, len(prepared.rows), task.batch_size, steps),
            "rates": [lr * rate(settings, step, steps) for step in range(steps)],
        }

    def start(self, job: dict[str, Any], result: Path, **pipes: Any) -> "subprocess.Popen[str]":
        path = self.work / f"{result.stem}.job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        command = [self.python(job["library"]), str(HERE / "worker.py"), str(path), str(result)]
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def cell(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """The result of this name, made if it is not there."""
        path = self.results / f"{name}.json"
        kept = {key: job[key] for key in ("library", "settings", "dtype", "seed", "lr")}
        kept["sha256"] = digest(job)
        if not path.is_file() or (job["train"] and not Path(job["adapter"]).exists()):
            print(name, flush=True)
            done = self.work / f"{name}.done.json"
            process = self.start(job, done)
            if process.wait():
                raise SystemExit(f"{name}: the worker ended with status {process.returncode}")
            found = kept | json.loads(done.read_text(encoding="utf-8"))
            path.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        if different := [key for key, value in kept.items() if found.get(key) != value]:
            raise SystemExit(f"{path} has another {', '.join(different)}; delete it to have it made again")
        return found


def drawn(
    seed: int, rows: int, size: int, steps: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches that reft-edge's trainer draws, as row numbers; with `lengths`, as it groups rows by length."""
    batches = []
    for step in range(steps):
        epoch, index = divmod(step, math.ceil(rows / size))
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(rows)
        if lengths is not None:
            order = grouped(order, np.array(lengths), size, random)
        batches.append(order[index * size : (index + 1) * size].tolist())
    return batches


def encoded(prompts: Prompts, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """A row's prompt and completion as token ids."""
    example = encode_row({"prompt": row["prompt"], "completion": completion(row)}, prompts, "raw")
    return list(example.prompt), list(example.completion)


def options(prompts: Prompts, prompt: str, choices: Iterable[str]) -> dict[str, Any]:
    return {
        "prompt": prompts.encode_raw(prompt),
        "options": [prompts.encode_after(prompt, choice) for choice in choices],
    }


def generated(prompts: Prompts, questions: Iterable[str], max_tokens: int) -> dict[str, Any]:
    """What `greedy` is asked."""
    ends = prompts.encode_plain(prompts.special_tokens["eos_token"])
    return {
        "prompts": [prompts.encode_raw(question) for question in questions],
        "max_tokens": max_tokens,
        "ends": ends,
    }


def digest(job: dict[str, Any]) -> str:
    """Of all that a result follows from: settings, batches, learning rates, questions."""
    told = {key: value for key, value in job.items() if key not in ("model", "adapter", "threads", "paced")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def prepare(bench: Bench, data: Path, task: Task) -> Prepared:
    parts = load(data, task)
    folder = bench.work / task.name
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: Iterable[dict[str, Any]]) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    prompts = bench.prompts
    questions = load_questions(write("test", parts["test"]))
    asked = None
    if task.max_tokens:
        asked = generated(prompts, (str(question.prompt) for question in questions.rows), task.max_tokens)
    chosen = "choices" in parts["dev"][0]
    return Prepared(
        task,
        [encoded(prompts, row) for row in parts["train"]],
        [options(prompts, row["prompt"], row.get("choices") or [completion(row)]) for row in parts["dev"]],
        [row["answer"] for row in parts["dev"]] if chosen else None,
        questions,
        {} if asked else {"test": [options(prompts, str(q.prompt), q.choices) for q in questions.rows]},
        asked,
    )


def dev_score(prepared: Prepared, scores: list[list[float]]) -> float:
    """Accuracy, or the mean log-likelihood of the completions where there are no choices."""
    if prepared.dev_answers is None:
        return statistics.fmean(score for (score,) in scores)
    right = [int(np.argmax(row)) == answer for row, answer in zip(scores, prepared.dev_answers, strict=True)]
    return statistics.fmean(right)


def records(bench: Bench, prepared: Prepared, found: dict[str, Any]) -> list[Record]:
    """Each test question's answer and whether it is right."""
    rows = prepared.questions.rows
    if "answers" in found:
        return [
            judge(prepared.questions.task, question, bench.prompts.decode(tokens))
            for question, tokens in zip(rows, found["answers"], strict=True)
        ]

    def record(question: Question, scores: list[float]) -> Record:
        answer = question.names[int(np.argmax(scores))]
        return Record(question.row, question.id, question.expected, answer, answer == question.expected)

    return [record(question, scores) for question, scores in zip(rows, found["test"], strict=True)]


def trainings(bench: Bench, prepared: Prepared, method: Method) -> dict[float, dict[str, Any]]:
    """A method's training cells, each with its scores on the dev rows: at every learning rate on the first task, at the
    one chosen there on the others.
    """
    task = prepared.task
    known = bench.chosen.get(method.follows or method.name)
    rates = (known,) if known else method.rates
    if not rates:
        raise SystemExit(f"{method.name} takes the learning rate of {method.follows}: add it to --methods")
    given: dict[str, Any] = {"questions": {"dev": prepared.dev}}
    if method.library == "pyreft":  # tested at once: it cannot read back what it saves
        given = {"questions": {"dev": prepared.dev, **prepared.test}, "asked": prepared.asked}
    return {
        lr: bench.cell(
            f"{task.name}.{method.name}.{lr:g}",
            bench.job(prepared, method, lr, train=bench.training(prepared, lr, task.steps), **given),
        )
        for lr in rates
    }


def choose(prepared: Prepared, cells: dict[float, dict[str, Any]]) -> float:
    """The learning rate that does best on the dev rows."""
    return max(cells, key=lambda lr: dev_score(prepared, cells[lr]["dev"]))


def run(bench: Bench, prepared: Prepared, method: Method) -> tuple[dict[str, Any], list[Record]]:
    """Train where needed, test once; what table and plots need to know, and what became of every test question."""
    task = prepared.task
    cells = trainings(bench, prepared, method) if method.library != "base" else {}
    lr = choose(prepared, cells) if cells else 0.0
    if method.rates:
        bench.chosen[method.name] = lr
    if method.library == "pyreft":
        tested = cells[lr]
    else:
        job = bench.job(prepared, method, lr, questions=prepared.test, asked=prepared.asked)
        tested = bench.cell(f"{task.name}.{method.name}.test", job)
    answered = summarise(prepared.questions.task, records(bench, prepared, tested), 0.0)
    figures: dict[str, Any] = {"task": task.title, "method": method.name, "title": method.title}
    figures |= {name: getattr(answered, name) for name in ("rows", "right", "accuracy", "low", "high")}
    if cells:
        dev = {f"{lr:g}": round(dev_score(prepared, cell["dev"]), 4) for lr, cell in cells.items()}
        figures |= {"lr": lr, "dev": dev, "losses": [round(loss, 4) for loss in cells[lr]["losses"]]}
        figures |= {name: cells[lr][name] for name in ("parameters", "bytes")}
    return figures, answered.records


def speed(bench: Bench, prepared: Prepared, rounds: int) -> dict[str, Any]:
    """Seconds of `rounds` training steps of every compared method, taking turns, after a first that does not count."""
    path = bench.results / f"speed.{bench.dtype}.json"
    if not path.is_file():
        workers, done = {}, {}
        for name in COMPARED:
            done[name] = bench.work / f"speed.{name}.json"
            train = bench.training(prepared, 1e-3, rounds + 1)
            job = bench.job(prepared, METHODS[name], 1e-3, train=train, paced=True)
            job["adapter"] = str(bench.work / f"speed-{Path(job['adapter']).name}")
            workers[name] = bench.start(job, done[name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for worker in workers.values():
            next_figure(worker)
        for _ in range(rounds):
            for name, worker in workers.items():
                assert worker.stdin
                worker.stdin.write("\n")
                worker.stdin.flush()
                seconds[name].append(next_figure(worker))
        for worker in workers.values():
            worker.communicate()
        found = {
            name: {"seconds": seconds[name], "peak_bytes": json.loads(done[name].read_text())["peak_bytes"]}
            for name in workers
        }
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return measured


def next_figure(worker: "subprocess.Popen[str]") -> float:
    """The next line that is a number; libraries may print lines of their own."""
    assert worker.stdout
    for line in worker.stdout:
        try:
            return float(line)
        except ValueError:
            continue
    raise SystemExit(f"a worker ended early: {worker.args!r}")


def markdown(cells: list[dict[str, Any]], speeds: dict[str, dict[str, Any]], base_parameters: int) -> str:
    """The table: a line a method, a column a task."""
    found = {(cell["method"], cell["task"]): cell for cell in cells}
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    head = ["", "parameters", "file, kB", *tasks]
    for dtype in speeds:
        head += [f"steps/s, {dtype}", f"peak GB, {dtype}"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for method in METHODS.values():
        mine = {task: found[method.name, task] for task in tasks if (method.name, task) in found}
        if not mine:
            continue
        any_cell = next(iter(mine.values()))
        line = [method.title, "", ""]
        if "parameters" in any_cell:
            share = any_cell["parameters"] / base_parameters
            line[1:] = [f"{any_cell['parameters']:,} ({share:.2%})", f"{any_cell['bytes'] / 1000:,.0f}"]
        for task in tasks:
            cell = mine.get(task)
            line.append(f"{cell['accuracy']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})" if cell else "")
        for measured in speeds.values():
            timed = measured.get(method.name)
            line += (
                [f"{1 / statistics.median(timed['seconds']):.2f}", f"{timed['peak_bytes'] / 1e9:.2f}"]
                if timed
                else ["", ""]
            )
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(answered: dict[tuple[str, str], list[Record]]) -> str:
    """LoReFT's accuracy less that of the others, question by question."""
    lines = ["| LoReFT of reft-edge less | task | difference | p (McNemar) |", "|---|---|---:|---:|"]
    for other in ("lora", "pyreft", "pyreft-fp32", "pyreft-reflections"):
        for task in (task.title for task in TASKS.values()):
            if ("loreft", task) in answered and (other, task) in answered:
                pair = compare_records(answered[other, task], answered["loreft", task])
                gap = f"{pair.accuracy_b - pair.accuracy_a:+.3f} ({pair.low:+.3f} to {pair.high:+.3f})"
                lines.append(f"| {METHODS[other].title} | {task} | {gap} | {pair.p_value:.2g} |")
    return "\n".join(lines)


def fill(readme: Path, table: str) -> None:
    """Put the table between the two marks of a file."""
    parts = readme.read_text(encoding="utf-8").split(f"{MARK}\n")
    if len(parts) != 3:
        raise SystemExit(f"{readme} must have two lines {MARK}, found {len(parts) - 1}")
    readme.write_text(f"{MARK}\n".join([parts[0], f"\n{table}\n", parts[2]]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("environments", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("training-work"), help="adapters and jobs go here")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="of the trainings' base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of every method; 0: none")
    parser.add_argument("--speed-only", action="store_true", help="only measure steps/s and memory")
    parser.add_argument("--readme", type=Path, help=f"a file to put the table into, between two lines {MARK}")
    parser.add_argument("--smoke", action="store_true", help="a few steps and rows of everything")
    options = parser.parse_args()

    tasks = {name: TASKS[name] for name in options.tasks}
    if options.smoke:
        small = {"steps": 3, "batch_size": 4, "dev_rows": 6, "test_rows": 8}
        tasks = {
            name: dataclasses.replace(task, **small, max_tokens=min(task.max_tokens, 12))
            for name, task in tasks.items()
        }
    for folder in (options.results, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    folder = resolve_model(options.model)
    work = options.work.resolve()
    bench = Bench(
        options.environments.resolve(),
        work,
        options.results,
        folder.path,
        load_model_prompts(folder),
        options.threads,
        options.dtype,
        options.seed,
        {},
    )
    cells, answered = [], {}
    for task in tasks.values():
        prepared = prepare(bench, options.data, task)
        for name in options.methods if not options.speed_only else ():
            if task.name in METHODS[name].only:
                figures, answered[name, task.title] = run(bench, prepared, METHODS[name])
                cells.append(figures)
    speeds = {}
    if options.rounds:
        timed = prepare(bench, options.data, next(iter(tasks.values())))
        for dtype in ("fp32", "bf16"):
            speeds[dtype] = speed(dataclasses.replace(bench, dtype=dtype), timed, options.rounds)
    if options.speed_only:
        return
    written = {"cells": cells, "speed": speeds}
    (options.results / "summary.json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    base_parameters = parameters_of(folder.path)
    table = markdown(cells, speeds, base_parameters) + "\n\n" + differences(answered) + "\n"
    print(table)
    if options.readme:
        fill(options.readme, table)
    subprocess.run([bench.python("peft"), str(HERE / "plots.py"), str(options.results)], check=True)


def parameters_of(folder: Path) -> int:
    """Of the model, by the shapes in its safetensors files."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


if __name__ == "__main__":
    main()
