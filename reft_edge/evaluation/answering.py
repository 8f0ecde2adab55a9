"""Asking a model the questions of a task, and judging its answers."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from reft_edge.errors import ReftEdgeError
from reft_edge.evaluation.results import Evaluation, Record, summarise
from reft_edge.evaluation.tasks import TRIGGER, Question, Questions
from reft_edge.model.prompts import Prompts
from reft_edge.model.texts import Text

MAX_TOKENS = {"number": 256, "answer": 32}
"""Most tokens of a generated answer, by task."""


AROUND = " \t\n\r:*\"'`"
_PADDED_TOKENS = 2048

Item = TypeVar("Item")
OnDone = Callable[[int], None]


@dataclass(frozen=True)
class Continuations:
    """Completions of one prompt that differ in their last token only, so that one pass scores them all."""

    prompt: tuple[int, ...]
    shared: tuple[int, ...]
    """Their tokens but the last."""
    last: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.prompt + self.shared


class Decoder(Protocol):
    """A language model with its adapters, as evaluation sees it."""

    @property
    def prompts(self) -> Prompts:
        """Its tokenizer and chat template."""

    @property
    def prompt_format(self) -> str:
        """`chat` or `raw`."""

    @property
    def context_length(self) -> int:
        """Tokens."""

    def log_likelihoods(self, batch: Sequence[Continuations]) -> list[list[float]]:
        """For each of its last tokens, the summed log-likelihood of a completion, in nats."""

    def generate(self, batch: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The greedy answer to each prompt, the end-of-sequence token left out."""


class Classifier(Protocol):
    """An encoder with a head."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What it tells apart."""

    def probabilities(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """Of every label, for each text."""


def evaluate_decoder(
    decoder: Decoder,
    questions: Questions,
    batch_size: int = 8,
    max_tokens: int | None = None,
    normalise: bool = True,
    seed: int = 0,
    on_done: OnDone = lambda count: None,
) -> Evaluation:
    """Answer every question with a language model. `normalise`: compare choices by their mean a token, not the sum.

    Raises ReftEdgeError for a prompt that the model's context does not hold, or an empty one.
    """
    started = time.perf_counter()
    if questions.task in MAX_TOKENS:
        limit = max_tokens or MAX_TOKENS[questions.task]
        records = _generate(decoder, questions, batch_size, limit, on_done)
    else:
        records = _choose(decoder, questions, batch_size, normalise, on_done)
    return summarise(questions.task, records, time.perf_counter() - started, seed)


def evaluate_classifier(
    classifier: Classifier,
    questions: Questions,
    batch_size: int = 32,
    seed: int = 0,
    on_done: OnDone = lambda count: None,
) -> Evaluation:
    """Label every text with an encoder. Raises ReftEdgeError for rows without labels, or labels it does not know."""
    if questions.task != "label":
        raise ReftEdgeError(
            f'an encoder answers rows like {{"text": ..., "label": ...}}; these are of the task `{questions.task}`'
        )
    known = classifier.labels
    if unknown := sorted({question.expected for question in questions.rows} - set(known)):
        raise ReftEdgeError(
            f"the rows have labels {unknown} that the adapter does not know; it tells {list(known)} apart"
        )
    started = time.perf_counter()
    records: dict[int, Record] = {}
    for batch in batches(questions.rows, batch_size, lambda question: len("".join(question.prompt))):
        found = classifier.probabilities([question.prompt for question in batch])
        for question, shares in zip(batch, found, strict=True):
            records[question.row] = likeliest(question, shares)
        on_done(len(batch))
    return summarise(questions.task, list(records.values()), time.perf_counter() - started, seed)


def extract_number(text: str) -> float | None:
    """The last number of a text, commas left out."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def extract_answer(text: str, names: Sequence[str] = ()) -> str:
    """What a text answers; empty if that cannot be read.

    That is what it says after "the correct answer is", up to its end, as in pyreft's examples: a full stop, quotes and
    the like around it are left out. Where the answers have `names`, it is the first of them after these words, or
    anywhere in a text without them, as LLM-Adapters reads it. Capitals make no difference to these words, nor to names of
    more than one letter.
    """
    trigger = re.search(TRIGGER, text, re.IGNORECASE)
    rest = text[trigger.end() :] if trigger else text
    if names:
        return first_name(rest, names) or first_name(text, names)
    return rest.strip(AROUND).removesuffix(".").strip(AROUND) if trigger else ""


def first_name(text: str, names: Sequence[str]) -> str:
    """The name that comes first as a word of its own; of two at one place, the longer one."""
    found = []
    for name in names:
        flags = re.IGNORECASE if len(name) > 1 else 0
        if match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags):
            found.append((match.start(), -len(name), name))
    return min(found)[2] if found else ""


def batches(
    items: Sequence[Item], batch_size: int, length: Callable[[Item], int], padded: int | None = None
) -> Iterator[list[Item]]:
    """Items of like length together, longest first, so that little is padding; `padded`: most tokens of a batch."""
    batch: list[Item] = []
    for item in sorted(items, key=length, reverse=True):
        full = padded is not None and batch and (len(batch) + 1) * length(batch[0]) > padded
        if len(batch) == batch_size or full:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _choose(
    decoder: Decoder, questions: Questions, batch_size: int, normalise: bool, on_done: OnDone
) -> list[Record]:
    """Completions that are one pass for the model are scored in one; a question is done when all its passes are."""
    passes: list[tuple[int, tuple[int, ...], Continuations]] = []
    for index, question in enumerate(questions.rows):
        text, prompt = _encode(decoder, question)
        completions = [tuple(decoder.prompts.encode_after(text, choice)) for choice in question.choices]
        if not all(completions):
            raise ReftEdgeError(f"{question.unit} {question.row}: a choice is empty")
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, completion in enumerate(completions):
            shared.setdefault(completion[:-1], []).append(number)
        for prefix, numbers in shared.items():
            last = tuple(completions[number][-1] for number in numbers)
            item = Continuations(prompt, prefix, last)
            _check_fits(decoder, question, len(item.ids))
            passes.append((index, tuple(numbers), item))
    scores: list[dict[int, float]] = [{} for _ in questions.rows]
    for batch in batches(passes, batch_size, lambda entry: len(entry[2].ids), _PADDED_TOKENS):
        found = decoder.log_likelihoods([item for _, _, item in batch])
        for (index, scored, item), likelihoods in zip(batch, found, strict=True):
            tokens = len(item.shared) + 1 if normalise else 1
            scores[index].update({n: value / tokens for n, value in zip(scored, likelihoods, strict=True)})
            if len(scores[index]) == len(questions.rows[index].choices):
                on_done(1)
    records = []
    for question, by_number in zip(questions.rows, scores, strict=True):
        named = {name: by_number[number] for number, name in enumerate(question.names)}
        records.append(likeliest(question, named))
    return records


def _generate(
    decoder: Decoder, questions: Questions, batch_size: int, max_tokens: int, on_done: OnDone
) -> list[Record]:
    encoded = [(question, _encode(decoder, question)[1]) for question in questions.rows]
    for question, prompt in encoded:
        _check_fits(decoder, question, len(prompt) + max_tokens)
    records = []
    for batch in batches(encoded, batch_size, lambda entry: len(entry[1])):
        answers = decoder.generate([ids for _, ids in batch], max_tokens)
        for (question, _), tokens in zip(batch, answers, strict=True):
            text = decoder.prompts.decode(tokens)
            records.append(judge(questions.task, question, text))
        on_done(len(batch))
    return records


def judge(task: str, question: Question, text: str) -> Record:
    """A generated text's answer, and whether it is right, by the task's rule."""
    if task == "number":
        number = extract_number(text)
        right = number is not None and abs(number - float(question.expected)) <= 0.001
        answer = "" if number is None else f"{number:g}"
    else:
        answer = extract_answer(text, question.names)
        right = answer == question.expected.strip()
    return Record(question.row, question.id, question.expected, answer, right, text=text)


def likeliest(question: Question, scores: dict[str, float]) -> Record:
    """The name of the highest score; none where a score is not a number, or none is finite."""
    finite = {name: round(score, 5) for name, score in scores.items() if math.isfinite(score)}
    sound = bool(finite) and not any(math.isnan(score) or score == math.inf for score in scores.values())
    answer = max(scores, key=lambda name: scores[name]) if sound else ""
    return Record(question.row, question.id, question.expected, answer, answer == question.expected, finite)


def _encode(decoder: Decoder, question: Question) -> tuple[str, tuple[int, ...]]:
    """The prompt as the model gets it: its text and its tokens."""
    assert isinstance(question.prompt, str)  # pairs of texts are for encoders
    text = decoder.prompts.prompt_text(question.prompt, decoder.prompt_format)
    ids = tuple(decoder.prompts.encode_text(text, decoder.prompt_format))
    if not ids:
        raise ReftEdgeError(f"{question.unit} {question.row}: the prompt is empty")
    return text, ids


def _check_fits(decoder: Decoder, question: Question, tokens: int) -> None:
    if tokens > decoder.context_length:
        raise ReftEdgeError(
            f"{question.unit} {question.row} needs {tokens} tokens with its answer; the model's context is "
            f"{decoder.context_length}: leave the row out, or lower --max-tokens"
        )
