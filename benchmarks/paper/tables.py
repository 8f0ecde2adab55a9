"""The tables and the plots of docs/paper.md, from the cells under results/.

    python benchmarks/paper/tables.py --page docs/paper.md

Learning rates are those that did best on dev rows with seed 0. Intervals are 95 % bootstrap intervals: questions are drawn
again, and seeds too, where a method has several. The plot needs matplotlib.
"""

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from breadth import BASE, METHODS, STUDIES, Study
from run import RESULTS, dev_score, read_lines
from table import fill
from tasks import Task

Values = np.ndarray[Any, np.dtype[np.float64]]
DRAWS = 2000
AGAINST = "lora"


@dataclass(frozen=True)
class Found:
    """A method's answers to one test: 1 or 0, or nats, `[seeds, questions]`."""

    values: Values
    lr: float
    parameters: int
    seeds: tuple[int, ...]


def chosen(lines: list[dict[str, Any]], study: Study, method: str) -> float | None:
    tried = {
        line["lr"]: dev_score(line)
        for line in lines
        if (line["study"], line["method"], line["seed"]) == (study.searched, method, 0)
    }
    return max(tried, key=lambda lr: tried[lr]) if tried else None


def values_of(score: dict[str, Any]) -> list[float]:
    return score["likelihood"] if "likelihood" in score else [float(right) for right in score["right"]]


def collect(lines: list[dict[str, Any]]) -> dict[tuple[str, str], Found]:
    """By method and test."""
    found = {}
    for study in STUDIES.values():
        for method in (BASE.name, *METHODS):
            lr = chosen(lines, study, method)
            mine = {
                line["seed"]: line
                for line in lines
                if (line["study"], line["method"], line["lr"]) == (study.task.name, method, lr)
            }
            for test in study.tests if mine else ():
                rows = [values_of(mine[seed]["scores"][test.name]) for seed in sorted(mine)]
                parameters = next(iter(mine.values()))["parameters"]
                found[method, test.name] = Found(np.array(rows), lr or 0.0, parameters, tuple(sorted(mine)))
    return found


@cache
def drawn_again(questions: int) -> Values:
    """How often each question is drawn, `[draws, questions]`, as shares; the same for all that answered so many."""
    counts = np.random.default_rng(0).multinomial(questions, [1 / questions] * questions, size=DRAWS)
    return counts / questions


def interval(values: Values) -> tuple[float, float]:
    """95 % of the means of values drawn again, `[seeds, questions]`."""
    seeds, questions = values.shape
    by_seed = drawn_again(questions) @ values.T
    picked = np.random.default_rng(1).integers(seeds, size=by_seed.shape)
    low, high = np.quantile(np.take_along_axis(by_seed, picked, 1).mean(1), [0.025, 0.975])
    return float(low), float(high)


def told(values: Values, sign: str = "") -> str:
    low, high = interval(values)
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def rows(lines: list[list[str]]) -> str:
    ruled = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def scores(found: dict[tuple[str, str], Found], tests: list[Task]) -> str:
    lines = [["", "parameters", *(test.title for test in tests)]]
    for method in (BASE, *METHODS.values()):
        mine = {test.name: found.get((method.name, test.name)) for test in tests}
        known = next((cell for cell in mine.values() if cell), None)
        if known is None:
            continue
        parameters = f"{known.parameters:,}" if known.parameters else ""
        lines.append(
            [method.title, parameters, *(told(cell.values) if cell else "" for cell in mine.values())]
        )
    return rows(lines)


def gaps(found: dict[tuple[str, str], Found], tests: list[Task]) -> str:
    """Every method less LoRA, on the same questions and seeds."""
    lines = [[f"less {METHODS[AGAINST].title}", *(test.title for test in tests)]]
    for method in METHODS.values():
        line = [method.title]
        for test in tests:
            one, other = found.get((method.name, test.name)), found.get((AGAINST, test.name))
            if method.name == AGAINST or one is None or other is None:
                line.append("")
                continue
            both = [seed for seed in one.seeds if seed in other.seeds]
            pairs = [
                one.values[one.seeds.index(seed)] - other.values[other.seeds.index(seed)] for seed in both
            ]
            line.append(told(np.array(pairs), "+") if pairs else "")
        if any(line[1:]):
            lines.append(line)
    return rows(lines)


def seeds_and_rates(found: dict[tuple[str, str], Found]) -> str:
    lines = [["learning rate (seeds)", *(study.task.title for study in STUDIES.values())]]
    for method in METHODS.values():
        cells = [found.get((method.name, study.task.name)) for study in STUDIES.values()]
        if any(cells):
            told_of = (f"{cell.lr:g} ({len(cell.seeds)})" if cell else "" for cell in cells)
            lines.append([method.title, *told_of])
    return rows(lines)


def plot(found: dict[tuple[str, str], Found], tests: list[Task], path: Path) -> None:
    from plots import figure, finish, plt

    plt.rcParams.update({"svg.hashsalt": "reft-edge", "svg.fonttype": "none", "font.size": 9})
    fig, axes = figure(len(tests))
    colours = plt.get_cmap("tab10").colors
    for axis, test in zip(axes, tests, strict=True):
        for method, colour in zip(METHODS.values(), colours, strict=False):
            if cell := found.get((method.name, test.name)):
                mean = cell.values.mean()
                low, high = interval(cell.values)
                mark = "^" if method.library == "peft" else "o"
                error = [[mean - low], [high - mean]]
                axis.errorbar(
                    cell.parameters, mean, error, fmt=mark, color=colour, capsize=3, label=method.title
                )
        if base := found.get((BASE.name, test.name)):
            axis.axhline(base.values.mean(), color="#5b6472", linestyle=":", label=BASE.title)
        axis.set(title=test.title, xscale="log", xlabel="trained parameters", xlim=(1e4, 4e6))
    axes[0].set_ylabel("mean on test rows, 95 % interval")
    finish(fig, axes, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "smollm2.jsonl", help="a file of run.py's")
    parser.add_argument(
        "--page", type=Path, help="a file to put the tables into, between two lines <!-- trainings -->"
    )
    given = parser.parse_args()
    lines = read_lines(given.results)
    if not lines:
        raise SystemExit(f"{given.results} has no cells; make them with run.py")
    found = collect(lines)
    groups = {
        "arithmetic": [
            test
            for study in STUDIES.values()
            if study.searched == study.task.name != "sst2"
            for test in study.tests
        ],
        "choices": [study.task for study in STUDIES.values() if study.searched == "sst2"],
    }
    parts = []
    for tests in groups.values():
        parts += [scores(found, tests), gaps(found, tests)]
    table = "\n\n".join([*parts, seeds_and_rates(found)])
    print(table)
    if given.page:
        fill(given.page, f"{table}\n")
        for name, tests in groups.items():
            plot(found, tests, given.results.with_name(f"{name}.svg"))


if __name__ == "__main__":
    main()
