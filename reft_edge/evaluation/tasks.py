"""Rows of a file as questions."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.jsonl import Place
from reft_edge.model.texts import Text, parse_row
from reft_edge.rows.reading import read_rows
from reft_edge.rows.shapes import COMPLETIONS, LABELLED, PAIRS, QUESTIONS, Recognised, Recogniser, as_question
from reft_edge.rows.source import RowSource

TASKS = ("choice", "number", "answer", "label")
TRIGGER = "the correct answer is"
_SHAPES = (QUESTIONS, LABELLED, PAIRS, *COMPLETIONS)


@dataclass(frozen=True)
class Question:
    """One row; `choices` are the completions to compare, `names` what each stands for."""

    row: int
    """Its line in the file, or its number among rows in memory, from 1."""
    prompt: Text
    expected: str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    unit: str = "line"
    """What `row` counts: `line`, or `row` for rows in memory."""

    @property
    def id(self) -> str:
        """A digest of prompt and expected answer: the same question has the same in every run."""
        return hashlib.sha256(json.dumps([self.prompt, self.expected]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Questions:
    """The rows of one file."""

    task: str
    rows: list[Question]
    read: Recognised | None = None
    """What the rows were read as."""


def load_questions(source: RowSource, task: str | None = None, limit: int | None = None) -> Questions:
    """Read a file, or rows in memory; the rows tell the task unless it is given. Of a longer file, the first `limit` rows.

    Raises ReftEdgeError that names the file and line, or the row, for rows of another form, or of different tasks.
    """
    if task is not None and task not in TASKS:
        raise ReftEdgeError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ReftEdgeError(f"limit is {limit}; expected 1 or more")
    parsed: list[tuple[Place, dict[str, Any]]] = []
    found: set[str] = set()
    recogniser = Recogniser((LABELLED,) if task == "label" else _SHAPES)

    def parse(row: Any) -> tuple[dict[str, Any], str]:
        plain = as_question(recogniser(row), row)
        return plain, task or _task_of(plain)

    for place, (row, kind) in read_rows(source, parse):
        found.add(kind)
        parsed.append((place, row))
        if len(parsed) == limit:
            break
    if not parsed:
        raise ReftEdgeError(f"{source} has no rows to answer")
    if found == {"number", "answer"}:
        found = {"answer"}
    if len(found) > 1:
        raise ReftEdgeError(
            f"{source} mixes rows of the tasks {', '.join(sorted(found))}; give one of them with --task"
        )
    (kind,) = found
    rows = []
    for place, row in parsed:
        with place.named():
            rows.append(dataclasses.replace(_question(kind, place.number, row), unit=place.unit))
    return Questions(kind, rows, recogniser.recognised(source))


def _task_of(row: dict[str, Any]) -> str:
    if "choices" in row:
        return "choice"
    if "label" in row:
        return "label"
    return "number" if _is_number(row["answer"]) else "answer"


def _question(task: str, number: int, row: dict[str, Any]) -> Question:
    if task == "label":
        text, label = parse_row(row)
        return Question(number, text, label)
    prompt, answer = row.get("prompt"), row.get("answer")
    if not isinstance(prompt, str):
        raise ReftEdgeError(f'expected text under "prompt"; found the fields {sorted(row)}')
    if task == "choice":
        return _multiple_choice(number, prompt, answer, row.get("choices"))
    if task == "number":
        if not _is_number(answer):
            raise ReftEdgeError(f"the answer {answer!r} is not a number")
        return Question(number, prompt, str(answer).replace(",", ""))
    if not isinstance(answer, str) or not answer.strip():
        raise ReftEdgeError(f'expected text under "answer", found {answer!r}')
    names = stated_names(prompt)
    return Question(number, prompt, answer.strip(), names=names if answer.strip() in names else ())


def stated_names(prompt: str) -> tuple[str, ...]:
    """The names of a prompt that ends `Answer format: a/b`."""
    stated = re.search(r"Answer format: *(\S+/\S+)\s*$", prompt)
    return tuple(name for name in stated[1].split("/") if name) if stated else ()


def _multiple_choice(number: int, prompt: str, answer: Any, choices: Any) -> Question:
    if choices is None:
        names = stated_names(prompt)
        if not names:
            raise ReftEdgeError('expected a list under "choices", or a prompt that ends `Answer format: a/b`')
        completions = tuple(f"{TRIGGER} {name}" for name in names)
    else:
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ReftEdgeError(f'expected a list of texts under "choices", found {choices!r:.80}')
        names = completions = tuple(choices)
        if not all(names):
            raise ReftEdgeError("a choice is empty")
    if len(set(names)) != len(names) or len(names) < 2:
        raise ReftEdgeError("expected two or more choices that differ")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(names):
        answer = names[answer]
    if answer not in names:
        raise ReftEdgeError(
            f"the answer {answer!r} is none of the choices {list(names)}, nor the index of one"
        )
    return Question(number, prompt, answer, completions, names)


def as_prompts(questions: Questions, template: str, words: dict[str, str]) -> Questions:
    """Labelled texts as prompts for a decoder, other questions as they are.

    `template` holds `{text}`, and `{text2}` for pairs; `words` says how a completion names a label, by default by the
    label itself. Raises ReftEdgeError for a template that leaves a text out, or labels without a word.
    """
    if questions.task != "label":
        return questions
    found = {question.expected for question in questions.rows}
    labels = tuple(words) or tuple(sorted(found))
    if unnamed := sorted(found - set(labels)):
        raise ReftEdgeError(
            f"there is no word for the labels {unnamed}; give one a label with --word LABEL=WORD"
        )
    if len(labels) < 2:
        raise ReftEdgeError(f"there is one label, {labels[0]!r}; name all with --word LABEL=WORD")
    completions = tuple(words.get(label, label) for label in labels)
    rows = []
    for question in questions.rows:
        texts = (question.prompt,) if isinstance(question.prompt, str) else question.prompt
        given = dict(zip(("{text}", "{text2}"), texts, strict=False))
        if left_out := [name for name in given if name not in template]:
            raise ReftEdgeError(f"the template {template!r} does not hold {' and '.join(left_out)}")
        parts = re.split(r"(\{text2?\})", template)
        prompt = "".join(given.get(part, "" if part == "{text2}" else part) for part in parts)
        rows.append(dataclasses.replace(question, prompt=prompt, choices=completions, names=labels))
    return dataclasses.replace(questions, rows=rows)


def parse_words(given: Sequence[str]) -> dict[str, str]:
    """`label=word` pairs, the word as it stands behind the first `=`. Raises ReftEdgeError for anything else."""
    words = {}
    for pair in given:
        label, equals, word = pair.partition("=")
        if not equals or not word or label in words:
            raise ReftEdgeError(f"cannot read the label word {pair!r}; write --word LABEL=WORD, once a label")
        words[label] = word
    return words


def _is_number(answer: Any) -> bool:
    try:
        return not isinstance(answer, bool) and math.isfinite(float(str(answer).replace(",", "")))
    except ValueError:
        return False
