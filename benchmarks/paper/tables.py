"""The tables and the plots of docs/paper.md, from the cells under results/.

    python benchmarks/paper/tables.py --page docs/paper.md

Learning rates are those that did best on dev rows with seed 0. Intervals are 95 % bootstrap intervals: questions are drawn
again, and seeds too, where a method has several. The plot needs matplotlib.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from breadth import BASE, DECODERS, ENCODERS, Comparison, Study
from run import RESULTS, dev_score, read_lines
from table import fill
from tasks import Task
from win_rate import Compared, controlled, plain
from win_rate import compared as held_against

Values = np.ndarray[Any, np.dtype[np.float64]]
DRAWS = 2000
AGAINST = "lora"
ALSO_AGAINST = "loreft"


@dataclass(frozen=True)
class Found:
    """A method's answers to one test: 1 or 0, or nats, `[seeds, questions]`."""

    values: Values
    lr: float
    parameters: int
    seeds: tuple[int, ...]


Cells = dict[tuple[str, str], Found]
"""By method and test."""


def chosen(lines: list[dict[str, Any]], study: Study, method: str) -> float | None:
    tried = {
        line["lr"]: dev_score(line)
        for line in lines
        if (line["study"], line["method"], line["seed"]) == (study.searched, method, 0)
    }
    return max(tried, key=lambda lr: tried[lr]) if tried else None


def values_of(score: dict[str, Any]) -> list[float]:
    return score["likelihood"] if "likelihood" in score else [float(right) for right in score["right"]]


def by_model(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The lines of results files, of which several may be of one model. Raises SystemExit for one without lines."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        lines = read_lines(path)
        if not lines:
            raise SystemExit(f"{path} has no cells; make them with run.py")
        for line in lines:
            found.setdefault(line["model"], []).append(line)
    return found


def compared_in(lines: list[dict[str, Any]]) -> Comparison:
    """What a model's lines are about."""
    return ENCODERS if lines[0]["study"] in ENCODERS.studies else DECODERS


def collect(lines: list[dict[str, Any]]) -> Cells:
    """By method and test."""
    found = {}
    compared = compared_in(lines)
    for study in compared.studies.values():
        for method in compared.all_methods:
            lr = chosen(lines, study, compared.all_methods[method].follows or method)
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
    return shares(questions, np.random.default_rng(0))


def shares(questions: int, random: np.random.Generator) -> Values:
    return random.multinomial(questions, [1 / questions] * questions, size=DRAWS) / questions


def interval(values: Values) -> tuple[float, float]:
    """95 % of the means of values drawn again, `[seeds, questions]`."""
    return seeds_drawn_again(drawn_again(values.shape[1]) @ values.T)


def seeds_drawn_again(by_seed: Values) -> tuple[float, float]:
    """95 % of the means over seeds drawn again, of `[draws, seeds]`."""
    return middle(means_of_seeds(by_seed, np.random.default_rng(1)))


def means_of_seeds(by_seed: Values, random: np.random.Generator) -> Values:
    """`[draws]`: the mean over seeds drawn again, of `[draws, seeds]`."""
    picked = random.integers(by_seed.shape[1], size=by_seed.shape)
    means: Values = np.take_along_axis(by_seed, picked, 1).mean(1)
    return means


def middle(means: Values) -> tuple[float, float]:
    """Between which 95 % of them are."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def told(values: Values, sign: str = "") -> str:
    return shown(values.mean(), interval(values), sign)


def shown(mean: float, bounds: tuple[float, float], sign: str = "") -> str:
    low, high = bounds
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def rows(lines: list[list[str]]) -> str:
    ruled = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def scores(compared: Comparison, found: Cells, tests: list[Task]) -> str:
    lines = [["", "parameters", *(test.title for test in tests)]]
    for method in compared.all_methods.values():
        mine = {test.name: found.get((method.name, test.name)) for test in tests}
        known = next((cell for cell in mine.values() if cell), None)
        if known is None:
            continue
        parameters = f"{known.parameters:,}" if known.parameters else ""
        lines.append(
            [method.title, parameters, *(told(cell.values) if cell else "" for cell in mine.values())]
        )
    return rows(lines)


def gaps(compared: Comparison, found: Cells, tests: list[Task], against: str) -> str:
    """Every method less another, on the same questions and seeds; of several accuracies their mean, too."""
    alike = len(tests) > 1 and all(found_in_ones(found, against, test) for test in tests)
    titles = [*(test.title for test in tests), *(["mean"] if alike else [])]
    lines = [[f"less {compared.methods[against].title}", *titles]]
    for method in compared.methods.values():
        if method.name == against:
            continue
        pairs = [
            paired(found.get((method.name, test.name)), found.get((against, test.name))) for test in tests
        ]
        line = [method.title, *("" if pair is None else told(pair, "+") for pair in pairs)]
        known = [pair for pair in pairs if pair is not None]
        if alike:
            line.append(told_of_mean(known) if len(known) == len(tests) else "")
        if known:
            lines.append(line)
    return rows(lines)


def found_in_ones(found: Cells, method: str, test: Task) -> bool:
    """Whether a method's answers are right or wrong, and not likelihoods."""
    cell = found.get((method, test.name))
    return cell is None or bool(np.isin(cell.values, (0, 1)).all())


def paired(one: Found | None, other: Found | None) -> Values | None:
    """The difference with the same questions, of the seeds that both have, `[seeds, questions]`; None where there are none."""
    if one is None or other is None:
        return None
    pairs = [
        one.values[one.seeds.index(seed)] - other.values[other.seeds.index(seed)]
        for seed in one.seeds
        if seed in other.seeds
    ]
    return np.array(pairs) if pairs else None


def told_of_mean(tests: list[Values]) -> str:
    """The mean of several tests' means, each test's questions and seeds drawn again by themselves."""
    drawn = np.zeros(DRAWS)
    for number, values in enumerate(tests):
        random = np.random.default_rng([2, number])
        by_seed = shares(values.shape[1], random) @ values.T
        drawn += means_of_seeds(by_seed, random) / len(tests)
    return shown(float(np.mean([values.mean() for values in tests])), middle(drawn), "+")


@dataclass(frozen=True)
class Rate:
    """A win rate against the base model by seed, `[seeds]`, and of questions drawn again, `[draws, seeds]`."""

    seeds: tuple[int, ...]
    means: Values
    drawn: Values

    @classmethod
    def of(cls, by_seed: dict[int, Compared], formula: Callable[[Compared, Values], Values]) -> "Rate":
        questions = len(next(iter(by_seed.values())).wins)
        means = [formula(found, np.ones((1, questions)))[0] for found in by_seed.values()]
        drawn = [formula(found, drawn_again(questions) * questions) for found in by_seed.values()]
        return cls(tuple(by_seed), np.array(means), np.array(drawn).T)

    def less(self, other: "Rate") -> "Rate":
        """The difference with the same questions, of the seeds that both have."""
        both = tuple(seed for seed in self.seeds if seed in other.seeds)
        mine, theirs = ([rate.seeds.index(seed) for seed in both] for rate in (self, other))
        return Rate(
            both, self.means[mine] - other.means[theirs], self.drawn[:, mine] - other.drawn[:, theirs]
        )

    def told(self, sign: str = "") -> str:
        return shown(self.means.mean(), seeds_drawn_again(self.drawn), sign) if self.seeds else ""


def against_base(lines: list[dict[str, Any]], compared: Comparison, found: Cells, study: Study) -> str:
    """Answers held against those of the model without an adapter (win_rate.py); empty without cells."""
    assert study.compared is not None
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        cell = found.get((line["method"], study.task.name))
        if cell and (line["study"], line["lr"]) == (study.task.name, cell.lr):
            by_method.setdefault(line["method"], {})[line["seed"]] = line["scores"][study.compared.name]
    if BASE.name not in by_method:
        return ""
    base = by_method[BASE.name][0]
    pairs = {
        method: {seed: held_against(score, base) for seed, score in scores.items()}
        for method, scores in by_method.items()
        if method != BASE.name
    }
    controlled_rates = {method: Rate.of(by_seed, controlled) for method, by_seed in pairs.items()}
    lora = controlled_rates.get(AGAINST)
    titles = ["length-controlled win rate", f"less {compared.methods[AGAINST].title}", "win rate"]
    table = [["answers against the base model's", *titles, "likeness", "characters"]]
    for name, method in compared.all_methods.items():
        if name not in by_method:
            continue
        rates = ["", "", ""]
        if name in pairs:
            rate = controlled_rates[name]
            gap = rate.less(lora).told("+") if lora and name != AGAINST else ""
            rates = [rate.told(), gap, Rate.of(pairs[name], plain).told()]
        scored = by_method[name].values()
        alike = told(np.array([score["likeness"] for score in scored]))
        characters = np.mean([score["lengths"] for score in scored])
        table.append([method.title, *rates, alike, f"{characters:.0f}"])
    return rows(table)


def seeds_and_rates(compared: Comparison, found: Cells) -> str:
    studies = [
        study
        for study in compared.studies.values()
        if any((name, study.task.name) in found for name in compared.methods)
    ]
    lines = [["learning rate (seeds)", *(study.task.title for study in studies)]]
    for method in compared.methods.values():
        cells = [found.get((method.name, study.task.name)) for study in studies]
        if any(cells):
            told_of = (f"{cell.lr:g} ({len(cell.seeds)})" if cell else "" for cell in cells)
            lines.append([method.title, *told_of])
    return rows(lines)


def plot(compared: Comparison, found: Cells, tests: list[Task], path: Path) -> None:
    from plots import figure, finish, plt

    plt.rcParams.update({"svg.hashsalt": "reft-edge", "svg.fonttype": "none", "font.size": 9})
    fig, axes = figure(len(tests))
    colours = plt.get_cmap("tab20").colors
    for axis, test in zip(axes, tests, strict=True):
        for method, colour in zip(compared.methods.values(), colours, strict=False):
            if cell := found.get((method.name, test.name)):
                mean = cell.values.mean()
                low, high = interval(cell.values)
                mark = "^" if method.library == "peft" else "o"
                error = [[mean - low], [high - mean]]
                axis.errorbar(
                    cell.parameters, mean, error, fmt=mark, color=colour, capsize=3, label=method.title
                )
        base = compared.base
        if base and (cell := found.get((base.name, test.name))):
            axis.axhline(cell.values.mean(), color="#5b6472", linestyle=":", label=base.title)
        axis.set(title=test.title, xscale="log", xlabel="trained parameters", xlim=compared.parameters)
    axes[0].set_ylabel("mean on test rows, 95 % interval")
    finish(fig, axes, path)


def groups_of(compared: Comparison, found: Cells) -> dict[str, list[Task]]:
    """Tests that share a table and a plot, by its name; those without cells are left out."""
    if compared is ENCODERS:
        groups = {"encoder": [study.task for study in compared.studies.values()]}
    else:
        groups = {
            "arithmetic": [
                test
                for study in compared.studies.values()
                if study.searched == study.task.name != "sst2"
                for test in study.tests
            ],
            "choices": [study.task for study in compared.studies.values() if study.searched == "sst2"],
            "instructions": [study.task for study in compared.studies.values() if study.compared],
        }
    there = {test for _, test in found}
    kept = {name: [test for test in tests if test.name in there] for name, tests in groups.items()}
    return {name: tests for name, tests in kept.items() if tests}


def tables(model: str, lines: list[dict[str, Any]]) -> str:
    """All tables of one model, under its name."""
    compared, found = compared_in(lines), collect(lines)
    parts = [f"### {model}"]
    for tests in groups_of(compared, found).values():
        parts.append(scores(compared, found, tests))
        parts += [gaps(compared, found, tests, other) for other in (AGAINST, ALSO_AGAINST)]
    for study in compared.studies.values():
        if study.compared and (table := against_base(lines, compared, found, study)):
            parts.append(table)
    return "\n\n".join([*parts, seeds_and_rates(compared, found)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", help="files of run.py's; by default all beside this script"
    )
    parser.add_argument(
        "--page", type=Path, help="a file to put the tables into, between two lines <!-- trainings -->"
    )
    given = parser.parse_args()
    paths = given.results or sorted(RESULTS.glob("*.jsonl"))
    models = by_model(paths)
    table = "\n\n".join(tables(model, lines) for model, lines in models.items())
    print(table)
    if given.page:
        fill(given.page, f"{table}\n")
        for model, lines in models.items():
            compared, found = compared_in(lines), collect(lines)
            for name, tests in groups_of(compared, found).items():
                plot(compared, found, tests, paths[0].with_name(f"{model}-{name}.svg"))


if __name__ == "__main__":
    main()
