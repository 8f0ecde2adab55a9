"""Training a classifier: labelled texts, and the loss of a head on an encoder's pooled hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.model.texts import TextTokens, Tokens, parse_row
from reft_edge.rows.reading import load_rows
from reft_edge.rows.shapes import LABELLED, Recognised, Recogniser
from reft_edge.rows.source import RowSource


@dataclass(frozen=True)
class LabelledText:
    """One row as tokens, and the index of its label."""

    tokens: Tokens
    label: int


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of one file."""

    examples: list[LabelledText]
    labels: tuple[str, ...]
    digest: str
    """SHA-256 of the file."""
    read: Recognised | None = None
    """What the rows were read as."""


def load_labelled(
    source: RowSource, tokens: TextTokens, labels: Sequence[str] | None = None
) -> LabelledTexts:
    """Read rows of the columns `text` and `label`, with `text2` for pairs; a label is text or a whole number.

    `labels` are the ones allowed, by default all that the file holds, in alphabetical order. Raises ReftEdgeError
    that names the file and line, or the row, for anything that is not such a row.
    """

    recogniser = Recogniser((LABELLED,))

    def parse(row: Any) -> tuple[Tokens, str]:
        recogniser(row)
        text, label = parse_row(row)
        if labels is not None and label not in labels:
            raise ReftEdgeError(f"no training row has its label {label!r}")
        return tokens(text), label

    rows, digest = load_rows(source, parse)
    found = tuple(labels) if labels is not None else tuple(sorted({label for _, label in rows}))
    if not rows or len(found) < 2:
        raise ReftEdgeError(
            f"{source} has {len(rows)} rows and the labels {list(found)}; a classifier needs two labels or more"
        )
    index = {label: i for i, label in enumerate(found)}
    return LabelledTexts(
        [LabelledText(row, index[label]) for row, label in rows],
        found,
        digest,
        recogniser.recognised(source),
    )
