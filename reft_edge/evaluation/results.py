"""Accuracy with its interval, two runs compared, records on disk."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically
from reft_edge.jsonl import read_lines

RESAMPLES = 10_000


@dataclass(frozen=True)
class Record:
    """What became of one question."""

    row: int
    id: str
    expected: str
    answer: str
    """Empty where none could be read: the generated text holds no answer, or a score is not a number."""
    right: bool
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the choices were compared by, or the labels' probabilities."""
    text: str = ""
    """What was generated."""


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a task."""

    task: str
    rows: int
    right: int
    accuracy: float
    low: float
    high: float
    """The 95 % interval of the accuracy: percentiles of bootstrap resamples of the rows."""
    seconds: float
    records: list[Record]
    unread: int = 0
    """Rows whose answer could not be read; they count as wrong."""


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same questions."""

    rows: int
    both: int
    only_a: int
    only_b: int
    neither: int
    accuracy_a: float
    accuracy_b: float
    low: float
    high: float
    """The 95 % interval of accuracy B − A: percentiles of paired bootstrap resamples."""
    p_value: float
    """Of McNemar's exact test, two-sided: how likely such unequal changes are if neither run is better."""


def summarise(task: str, records: Sequence[Record], seconds: float, seed: int = 0) -> Evaluation:
    """Accuracy and its interval, records in the file's order."""
    ordered = sorted(records, key=lambda record: record.row)
    right, rows = sum(record.right for record in ordered), len(ordered)
    low, high = bootstrap(right, rows, seed)
    unread = sum(not record.answer for record in ordered)
    return Evaluation(task, rows, right, right / rows, low, high, seconds, ordered, unread)


def bootstrap(right: int, rows: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of an accuracy; a resample's count of right rows is a binomial draw."""
    resampled = np.random.default_rng(seed).binomial(rows, right / rows, RESAMPLES) / rows
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def compare_records(a: Sequence[Record], b: Sequence[Record], seed: int = 0) -> Comparison:
    """Pair two runs by row. Raises ReftEdgeError if they do not answer the same questions."""
    check_seed(seed)
    ids_a, ids_b = ({record.row: record.id for record in run} for run in (a, b))
    if ids_a != ids_b:
        unlike = sum(ids_a.get(row) != ids_b.get(row) for row in ids_a | ids_b)
        raise ReftEdgeError(
            f"the two runs do not answer the same questions: {unlike} of {len(ids_a | ids_b)} rows differ; "
            "run both on the same file with the same --limit"
        )
    rights = {record.row: record.right for record in b}
    counts = {
        pair: sum((record.right, rights[record.row]) == pair for record in a)
        for pair in ((True, True), (True, False), (False, True), (False, False))
    }
    both, only_a, only_b, neither = counts.values()
    rows = len(a)
    drawn = np.random.default_rng(seed).multinomial(rows, np.array([*counts.values()]) / rows, RESAMPLES)
    low, high = np.percentile((drawn[:, 2] - drawn[:, 1]) / rows, [2.5, 97.5])
    return Comparison(
        rows,
        both,
        only_a,
        only_b,
        neither,
        (both + only_a) / rows,
        (both + only_b) / rows,
        float(low),
        float(high),
        mcnemar(only_a, only_b),
    )


def check_seed(seed: int) -> None:
    """Raise ReftEdgeError for a seed that numpy's generators do not take."""
    if seed < 0:
        raise ReftEdgeError(f"seed is {seed}; expected 0 or more")


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value: rows on which the runs differ fall to either side like a fair coin."""
    count, fewer = only_a + only_b, min(only_a, only_b)
    ways = tail = 1
    for k in range(1, fewer + 1):
        ways = ways * (count - k + 1) // k
        tail += ways
    return min(1.0, float(2 * tail / 2**count))


def save_records(records: Sequence[Record], path: Path) -> None:
    """One JSON object a line. Raises ReftEdgeError if the file cannot be written."""
    lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n" for record in records]
    # a lone surrogate becomes its escape, which in JSON is the same text
    write_atomically(path, "".join(lines).encode(errors="backslashreplace"))


def load_records(path: Path) -> list[Record]:
    """Read what `save_records` wrote. Raises ReftEdgeError that names the line for anything else."""
    records = []
    for number, line in read_lines(path):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            record = None
        if record is None or not isinstance(record.row, int) or not isinstance(record.right, bool):
            raise ReftEdgeError(
                f"{path} line {number} is not a record; write such files with `reft-edge eval --records`"
            )
        records.append(record)
    if not records:
        raise ReftEdgeError(f"{path} has no records")
    return records
