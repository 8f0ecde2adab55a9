"""Training data: the rows of a file as the tokens of prompts and completions.

A loss is only taken on answers. What the user may not expect of the rows is told as notices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.adapter.positions import Span, active, group_names, parse_positions
from reft_edge.adapter.triggers import NEVER
from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Prompts
from reft_edge.rows.reading import load_rows
from reft_edge.rows.shapes import COMPLETIONS, Recognised, Recogniser, as_completion
from reft_edge.rows.source import RowSource
from reft_edge.training.answers import token_text
from reft_edge.training.turns import Example, View, view_turns


@dataclass(frozen=True)
class Dataset:
    """The rows of one file."""

    examples: list[Example]
    """One an answer that is trained."""
    left_out: int
    """Answers that are longer with their prompts than the limit, which are not trained on."""
    digest: str
    """SHA-256 of the file."""
    notices: tuple[str, ...] = ()
    """What of the rows is not trained, or not as it stands in the file."""
    read: Recognised | None = None
    """What the rows were read as."""


def load_dataset(
    source: RowSource, prompts: Prompts, prompt_format: str, max_length: int, last_turn: bool = False
) -> Dataset:
    """Read and tokenise a file, or rows in memory; `prompt_format` is `chat` or `raw`, `max_length` in tokens of an answer with
    its prompt.

    Raises ReftEdgeError that names the file and line, or the row, for anything that is not such a row.
    """
    recogniser = Recogniser(COMPLETIONS)

    def parse(row: Any) -> tuple[list[View], list[str]]:
        plain, start = as_completion(recogniser(row), row)
        return view_turns(plain, prompts, prompt_format, start, last_turn)

    examples, left_out, notes = [], 0, Counter[str]()
    rows, digest = load_rows(source, parse)
    for views, told in rows:
        notes.update(told)
        for view in views:
            if len(view.example.prompt) + len(view.example.completion) > max_length:
                left_out += 1
            else:
                examples.append(view.example)
                notes.update(view.notes)
    if not examples:
        why = "".join(f"; {note}" for note in notes)
        longer = (
            f": all {left_out} are longer than {max_length} tokens; raise --max-length" if left_out else why
        )
        raise ReftEdgeError(f"{source} has no row to train on{longer}")
    return Dataset(
        examples, left_out, digest, notices(notes, prompts, prompt_format), recogniser.recognised(source)
    )


def notices(notes: Counter[str], prompts: Prompts, prompt_format: str) -> tuple[str, ...]:
    """What is to be told of a file's rows, from the notes of them all."""
    told = [f"{note}: {count:,}" for note, count in notes.items()]
    if prompt_format == "raw" and prompts.template is None:
        told.append("the model has no chat template: prompts are trained as they stand, as with --raw")
    if prompt_format == "chat" and prompts.end_ids and prompts.turn_end not in (None, *prompts.end_ids):
        told.append(
            f"the chat template ends answers with {token_text(prompts, prompts.turn_end)}, at which the model's own "
            "configuration does not stop; `reft-edge export` adds it, other programs must be told"
        )
    return tuple(told)


def check_positions(rows: Sequence[Example], positions: str, tied: bool) -> tuple[str, ...]:
    """Notices on rows, and on positions, at which nothing is edited. Raises ReftEdgeError if no row has any to learn from."""
    spans = parse_positions(positions, tied)
    # The last token of a completion is predicted, but never read.
    shapes = Counter(
        (
            len(row.prompt),
            len(row.prompt) + len(row.completion) - 1,
            tuple(span.start(row.prompt) for span in spans),
        )
        for row in rows
    )
    open_at = {
        (n, end, starts): [
            any(bool(active(span, t, n, start)) for t in _edges(span, n, end, start))
            for span, start in zip(spans, starts, strict=True)
        ]
        for n, end, starts in shapes
    }
    idle = sum(count for key, count in shapes.items() if not any(open_at[key]))
    if idle == len(rows) and all(span.trigger for span in spans):
        raise ReftEdgeError(
            f"nothing can be learnt: in none of the {len(rows):,} rows does the prompt have the tokens of {positions} with "
            "something to edit behind them"
        )
    if idle == len(rows):
        raise ReftEdgeError(
            f"nothing can be learnt: in none of the {len(rows):,} rows do the positions {positions} edit a token; fN and lN "
            "reach over half of a prompt at most, and gen over tokens behind the answer's first: choose all, or longer prompts"
        )
    told = []
    if idle:
        told.append(
            f"rows in which the positions {positions} edit no token, so nothing is learnt from them: {idle:,}"
        )
    told += _rows_without_triggers(shapes, spans, idle)
    never = [
        name
        for name, column in zip(
            group_names(positions, tied), zip(*open_at.values(), strict=True), strict=True
        )
        if not any(column)
    ]
    if never:
        told.append(f"positions that edit no token in any row, so they learn nothing: {', '.join(never)}")
    return tuple(told)


def _rows_without_triggers(
    shapes: Mapping[tuple[int, int, tuple[int, ...]], int], spans: Sequence[Span], idle: int
) -> list[str]:
    """What is told of prompts that lack a trigger, `idle` of which were told of already."""
    told = []
    for number, span in enumerate(spans):
        lacking = sum(count for (_, _, starts), count in shapes.items() if starts[number] == NEVER)
        if idle < lacking < sum(shapes.values()):
            told.append(
                f"rows whose prompt lacks the tokens of {span.trigger}, so it learns nothing from them: {lacking:,}"
            )
    return told


def _edges(span: Span, n: int, end: int, start: int) -> Iterable[int]:
    """Tokens among which a gate that is open somewhere is open: the first and last of the prompt that are not left out, the
    next."""
    return [t for t in {max(span.skip_first, start), n - 1 - span.skip_last, n} if 0 <= t < end]
