"""Trains and tests every method on every task with three seeds: each cell is a line of a file, made if it is not there.

    python benchmarks/paper/run.py DATA_FOLDER

DATA_FOLDER holds sst2/ and gsm8k/ as they are published, as JSON lines, and what llm_adapters.py and self_instruct.py write.
Learning rates are chosen on dev rows with seed 0; with --results those of studies that are not asked for come from
results/MODEL.jsonl. The process may be ended at any time: started again, it goes on with the cells that are
missing. tables.py makes the tables.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from breadth import BASE, METHODS, STUDIES, Method, Study, missing
from cells import Cell, begin, make, prepare

from reft_edge.model.loading import load_model_prompts
from reft_edge.model.source import resolve_model

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]


class Plan:
    """The cells that are wanted, the most valuable first, and the lines of those that are there."""

    def __init__(self, lines: list[Line], studies: list[str], methods: list[Method], seeds: int) -> None:
        self.done = {cell_of(line): line for line in lines}
        self.studies, self.methods, self.seeds = studies, methods, seeds
        self.failed: set[Cell] = set()

    def rates(self, study: str, method: Method) -> tuple[float, ...]:
        """Those to train with: the chosen one, where its search is over or was made on another study; none yet if not."""
        searched = STUDIES[study].searched
        tried = {rate: Cell(searched, method.name, rate, 0) for rate in method.rates}
        open_ones = [
            rate for rate, cell in tried.items() if cell not in self.done and cell not in self.failed
        ]
        if open_ones or method is BASE:
            return method.rates if study == searched else ()
        found = {rate: dev_score(self.done[cell]) for rate, cell in tried.items() if cell in self.done}
        return (max(found, key=lambda rate: found[rate]),) if found else ()

    def wanted(self) -> list[Cell]:
        """Cells that can be made now."""
        searches = [name for name in self.studies if STUDIES[name].searched == name]
        rounds = [(name, 0) for name in searches]
        rounds += [(name, 0) for name in self.studies if name not in searches]
        rounds += [(name, seed) for seed in range(1, self.seeds) for name in self.studies]
        cells = [Cell(name, BASE.name, 0.0, 0) for name in self.studies]
        for name, seed in rounds:
            for method in self.methods:
                rates = self.rates(name, method)
                if seed and len(rates) > 1:
                    continue
                cells += [Cell(name, method.name, rate, seed) for rate in rates]
        return [cell for cell in cells if cell not in self.done and cell not in self.failed]


def cell_of(line: Line) -> Cell:
    return Cell(line["study"], line["method"], line["lr"], line["seed"])


def dev_score(line: Line) -> float:
    found = line["scores"]["dev"]
    return statistics.fmean(found["likelihood"] if "likelihood" in found else map(int, found["right"]))


def small(study: Study) -> Study:
    """The same with a few steps and rows."""
    few = {"steps": 3, "batch_size": 4, "dev_rows": 6, "test_rows": 8}
    also = tuple(dataclasses.replace(task, test_rows=8) for task in study.also)
    compared = study.compared and dataclasses.replace(study.compared, test_rows=8, max_tokens=8)
    task = dataclasses.replace(study.task, **few)
    return dataclasses.replace(study, task=task, also=also, compared=compared)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> list[Line]:
    """Whole lines of a results file; a last one that was cut off is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def results_of(model: str) -> Path:
    return RESULTS / f"{model.replace('/', '-')}.jsonl"


def searches(path: Path, model: str, studies: list[str]) -> list[Line]:
    """Lines of the model's own results file, where another is written: those of studies not asked for, whose learning rates
    may be wanted.
    """
    own = results_of(model)
    if path.resolve() == own.resolve():
        return []
    return [line for line in read_lines(own) if line["study"] not in studies]


def check_searches(studies: list[str], lines: list[Line]) -> None:
    """Raise SystemExit if a study takes its learning rates from one that is neither asked for nor in the file."""
    there = {*studies, *(line["study"] for line in lines)}
    for name in studies:
        if (searched := STUDIES[name].searched) not in there:
            raise SystemExit(f"{name} takes the learning rates of {searched}: add it to --studies")


def append(path: Path, line: Line) -> None:
    """Behind the whole lines of a results file; one that was cut off is dropped."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    with path.open("r+" if text else "w", encoding="utf-8") as file:
        file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        file.seek(0, 2)
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def run(plan: Plan, pool: ProcessPoolExecutor, workers: int, said: dict[str, Line], path: Path) -> None:
    """Make cells until none is wanted, each written as soon as it is there."""
    running: dict[Future[Line], Cell] = {}
    while True:
        for cell in plan.wanted():
            if len(running) == workers:
                break
            if cell not in running.values():
                running[pool.submit(make, cell)] = cell
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            try:
                line = vars(cell) | said[cell.study] | future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:
                plan.failed.add(cell)
                print(f"{cell}: {type(error).__name__}: {error}", flush=True)
                continue
            plan.done[cell] = line
            append(path, line)
            print(
                f"{time.strftime('%H:%M:%S')} {cell}: dev {dev_score(line):.4f}, {line['seconds']:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--results", type=Path, help="a file of lines; by default results/MODEL.jsonl beside this script"
    )
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="of the trainings' base")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model in memory")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--batch", type=int, default=16, help="rows of a test's forward pass")
    parser.add_argument("--smoke", action="store_true", help="a few steps and rows of everything")
    given = parser.parse_args()

    methods = [METHODS[name] for name in given.methods]
    for method in methods:
        if why := missing(method):
            print(f"{method.title} is left out: {why}", flush=True)
    methods = [method for method in methods if not missing(method)]
    folder = resolve_model(given.model)
    path = given.results or results_of(given.model)
    prompts = load_model_prompts(folder)
    tasks = {name: small(STUDIES[name]) if given.smoke else STUDIES[name] for name in given.studies}
    studies = {name: prepare(given.data, study, prompts) for name, study in tasks.items()}
    said: dict[str, Line] = {
        name: {
            "model": given.model,
            "rows": digest(study),
            "device": given.device.split(":")[0],
            "dtype": given.dtype,
        }
        for name, study in studies.items()
    }
    lines = read_lines(path)
    for line in lines:
        if line["study"] in said and line["rows"] != said[line["study"]]["rows"]:
            raise SystemExit(
                f"{path} has cells of {line['study']} from other rows; give another file with --results"
            )
    lines += searches(path, given.model, given.studies)
    check_searches(given.studies, lines)
    plan = Plan(lines, given.studies, methods, given.seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        prepared = Path(work) / "studies.json"
        prepared.write_text(json.dumps(studies), encoding="utf-8")
        start = (str(folder.path), given.device, given.dtype, given.threads, str(prepared), work, given.batch)
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
        with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"), begin, start) as pool:
            run(plan, pool, given.workers, said, path)
    if plan.failed:
        raise SystemExit(f"{len(plan.failed)} cells failed: {sorted(plan.failed, key=str)}")


if __name__ == "__main__":
    main()
