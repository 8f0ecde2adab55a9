"""Rows apart in those that are trained and those that are held out."""

import json
from collections import defaultdict
from typing import Any

import numpy as np

from reft_edge.errors import ReftEdgeError
from reft_edge.rows.reading import read_rows
from reft_edge.rows.source import RowsInMemory, RowSource

SHARE = 0.2
MOST = 500
"""Rows that are held out at most: more take time and tell little more."""
FEWEST = 20
"""Rows from which some can be held out."""


def split_rows(source: RowSource, seed: int, share: float = SHARE) -> tuple[RowsInMemory, RowsInMemory]:
    """The rows that are trained, and those that are held out; rows keep their numbers in messages.

    Rows of the same text are on the same side, and of each label a share is held out. Raises ReftEdgeError for too few rows.
    """
    if not 0 < share < 1:
        raise ReftEdgeError(f"the share of held-out rows is {share:g}; expected more than 0 and less than 1")
    lines: dict[int, str] = {}
    kinds: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, row in read_rows(source, lambda row: row):
        lines[place.number] = text = json.dumps(row, default=str)
        kinds[_label(row)][text].append(place.number)
    if len(lines) < FEWEST:
        raise ReftEdgeError(
            f"{source} has {len(lines)} rows; to hold some out, expected {FEWEST} or more: give more rows, or a file of "
            "held-out rows with --dev"
        )
    random = np.random.default_rng(seed)
    share = min(share, MOST / len(lines))
    held = {number for texts in kinds.values() for number in _drawn([*texts.values()], share, random)}
    if not held or len(held) == len(lines):
        raise ReftEdgeError(
            f"{source} cannot be split: its rows are too much alike; give held-out rows with --dev"
        )
    numbers = range(1, max(lines) + 1)
    return (
        RowsInMemory(
            tuple("" if number in held else lines.get(number, "") for number in numbers), str(source)
        ),
        RowsInMemory(tuple(lines[number] if number in held else "" for number in numbers), str(source)),
    )


def _label(row: Any) -> str:
    return json.dumps(row["label"], default=str) if isinstance(row, dict) and "label" in row else ""


def _drawn(groups: list[list[int]], share: float, random: np.random.Generator) -> list[int]:
    """Numbers of whole groups, about a share of all; one group stays at least."""
    wanted = round(share * sum(map(len, groups)))
    drawn: list[int] = []
    for index in random.permutation(len(groups))[1:]:
        if len(drawn) + len(groups[index]) <= wanted:
            drawn += groups[index]
    return drawn
