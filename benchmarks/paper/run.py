"""Trains and tests every method on every task with three seeds: each cell is a line of a file, made if it is not there.

    python benchmarks/paper/run.py DATA_FOLDER

DATA_FOLDER holds sst2/ and gsm8k/ as they are published, as JSON lines, and what llm_adapters.py and self_instruct.py write.
Learning rates are chosen on dev rows with seed 0; with --results those of studies that are not asked for come from results/.
The process may be ended at any time: started again, it goes on with the cells that are missing. tables.py makes the tables.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import encoders
from breadth import DECODERS, ENCODERS, Comparison, Method, Study, missing
from cells import Cell, begin, make, prepare
from minilm import packaged_minilm

from reft_edge.model.encoders import is_encoder
from reft_edge.model.loading import load_model_prompts
from reft_edge.model.source import ModelFolder, resolve_model

RESULTS = Path(__file__).parent / "results"
MINILM = "minilm"
Line = dict[str, Any]


class Plan:
    """The cells that are wanted, the most valuable first, and the lines of those that are there."""

    def __init__(
        self,
        lines: list[Line],
        compared: Comparison,
        studies: list[str],
        methods: list[Method],
        seeds: int,
    ) -> None:
        self.done = {cell_of(line): line for line in lines}
        self.compared, self.studies, self.methods, self.seeds = compared, studies, methods, seeds
        self.failed: set[Cell] = set()

    def rates(self, study: str, method: Method) -> tuple[float, ...]:
        """Those to train with: the chosen one, where its search is over or was made on another study; none yet if not."""
        searched = self.compared.studies[study].searched
        leader = self.compared.methods[method.follows] if method.follows else method
        tried = {rate: Cell(searched, leader.name, rate, 0) for rate in leader.rates}
        open_ones = [
            rate for rate, cell in tried.items() if cell not in self.done and cell not in self.failed
        ]
        if open_ones or method is self.compared.base:
            return method.rates if study == searched else ()
        found = {rate: dev_score(self.done[cell]) for rate, cell in tried.items() if cell in self.done}
        return (max(found, key=lambda rate: found[rate]),) if found else ()

    def wanted(self) -> list[Cell]:
        """Cells that can be made now."""
        searches = [name for name in self.studies if self.compared.studies[name].searched == name]
        rounds = [(name, 0) for name in searches]
        rounds += [(name, 0) for name in self.studies if name not in searches]
        rounds += [(name, seed) for seed in range(1, self.seeds) for name in self.studies]
        base = self.compared.base
        cells = [Cell(name, base.name, 0.0, 0) for name in self.studies] if base else []
        for name, seed in rounds:
            by_method = []
            for method in self.methods:
                rates = self.rates(name, method)
                if not seed or len(rates) == 1:
                    by_method.append([Cell(name, method.name, rate, seed) for rate in rates])
            # the likeliest rate of every method before any second one
            cells += [cell for row in zip_longest(*by_method) for cell in row if cell]
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


def elsewhere(path: Path, model: str, said: dict[str, Line]) -> list[Line]:
    """Lines of the model in other files of the results: of studies not asked for, whose learning rates may be wanted, and of
    those asked for where the model's own file is written, so that no cell is made twice.
    """
    own = path.resolve() == results_of(model).resolve()
    others = [file for file in sorted(RESULTS.glob("*.jsonl")) if file.resolve() != path.resolve()]
    return [
        line
        for line in (line for file in others for line in read_lines(file) if line["model"] == model)
        if line["study"] not in said or (own and line["rows"] == said[line["study"]]["rows"])
    ]


def check_searches(
    compared: Comparison, studies: list[str], methods: list[Method], lines: list[Line]
) -> None:
    """Raise SystemExit if a study or method takes its learning rates from one neither asked for nor in the file."""
    methods_there = {*(method.name for method in methods), *(line["method"] for line in lines)}
    for method in methods:
        if method.follows and method.follows not in methods_there:
            raise SystemExit(
                f"{method.name} takes the learning rates of {method.follows}: add it to --methods"
            )
    there = {*studies, *(line["study"] for line in lines)}
    for name in studies:
        if (searched := compared.studies[name].searched) not in there:
            raise SystemExit(f"{name} takes the learning rates of {searched}: add it to --studies")


def named(kind: str, given: list[str] | None, known: Collection[str]) -> list[str]:
    """Those that are asked for. Raises SystemExit for one that this kind of model does not have."""
    for name in given or ():
        if name not in known:
            raise SystemExit(f"{name} is none of this model's {kind}: {', '.join(known)}")
    return list(given or known)


def prepared(data: Path, studies: dict[str, Study], folder: ModelFolder) -> dict[str, Any]:
    """Rows as token ids, by study."""
    if is_encoder(folder):
        return {name: encoders.prepare(data, study.task, folder) for name, study in studies.items()}
    prompts = load_model_prompts(folder)
    return {name: prepare(data, study, prompts) for name, study in studies.items()}


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
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, gemma3-270m, minilm (an encoder), or another's folder"
    )
    parser.add_argument(
        "--results", type=Path, help="a file of lines; by default results/MODEL.jsonl beside this script"
    )
    parser.add_argument("--studies", nargs="+", help="by default all of the model's kind")
    parser.add_argument("--methods", nargs="+", help="by default all of the model's kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pyreft", default="", help="the Python of an environment with pyreft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="of the trainings' base")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model in memory")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--batch", type=int, default=16, help="rows of a test's forward pass")
    parser.add_argument("--smoke", action="store_true", help="a few steps and rows of everything")
    given = parser.parse_args()

    folder = resolve_model(packaged_minilm() if given.model == MINILM else given.model)
    compared = ENCODERS if is_encoder(folder) else DECODERS
    names = named("studies", given.studies, compared.studies)
    methods = [compared.methods[name] for name in named("methods", given.methods, compared.methods)]
    for method in methods:
        if why := missing(method, given.pyreft):
            print(f"{method.title} is left out: {why}", flush=True)
    methods = [method for method in methods if not missing(method, given.pyreft)]
    path = given.results or results_of(given.model)
    tasks = {name: small(compared.studies[name]) if given.smoke else compared.studies[name] for name in names}
    studies = prepared(given.data, tasks, folder)
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
    lines += elsewhere(path, given.model, said)
    check_searches(compared, names, methods, lines)
    plan = Plan(lines, compared, names, methods, given.seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "studies.json"
        rows.write_text(json.dumps(studies), encoding="utf-8")
        start = (
            str(folder.path),
            given.device,
            given.dtype,
            given.threads,
            str(rows),
            work,
            given.batch,
            given.pyreft,
        )
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
        with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"), begin, start) as pool:
            run(plan, pool, given.workers, said, path)
    if plan.failed:
        raise SystemExit(f"{len(plan.failed)} cells failed: {sorted(plan.failed, key=str)}")


if __name__ == "__main__":
    main()
