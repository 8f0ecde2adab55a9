"""Accuracy on a JSONL task: rows to questions, answers to right or wrong, a bootstrap interval, two runs side by side.

Kinds of rows and how each is answered (`TASKS`):

    choice   {"prompt", "choices": [...], "answer": index or text}: the likeliest choice, by its mean log-likelihood a
             token or by the sum. Also {"prompt", "answer"} whose prompt says `Answer format: a/b`; the choices are then
             "the correct answer is a" and so on.
    number   {"prompt", "answer"}: the last number of a generated text, right within 0.001 (GSM8K, SVAMP, AddSub)
    answer   {"prompt", "answer"}: what a generated text says after "the correct answer is", or, where the prompt says
             `Answer format: a/b`, the first of these names (ARC, BoolQ)
    label    {"text", "label"}: the label of an encoder's head, or the likeliest label word of a decoder

The rules for generated text are those of LLM-Adapters and of pyreft's examples (`examples/loreft/compute_metrics.py`).
Needs neither torch nor transformers: whatever answers is a `Decoder` or a `Classifier`.
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from reft_edge.encoders import Text, parse_row
from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically
from reft_edge.jsonl import at_line, read_lines, read_rows
from reft_edge.prompts import Prompts, check_text, choose_format
from reft_edge.signing import TrustedKeys, load_verified

TASKS = ("choice", "number", "answer", "label")
MAX_TOKENS = {"number": 256, "answer": 32}
"""Most tokens of a generated answer, by task."""
TRIGGER = "the correct answer is"
RESAMPLES = 10_000
_AROUND = " \t\n\r:*\"'`"
_PADDED_TOKENS = 2048

Item = TypeVar("Item")
OnDone = Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """One row; `choices` are the completions to compare, `names` what each stands for."""

    row: int
    """Its line in the file, from 1."""
    prompt: Text
    expected: str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A digest of prompt and expected answer: the same question has the same in every run."""
        return hashlib.sha256(json.dumps([self.prompt, self.expected]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Questions:
    """The rows of one file."""

    task: str
    rows: list[Question]


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


def load_questions(path: Path, task: str | None = None, limit: int | None = None) -> Questions:
    """Read a JSONL file; the rows tell the task unless it is given. Of a longer file, the first `limit` rows.

    Raises ReftEdgeError that names the file and line for rows of another form, or of unlike tasks.
    """
    if task is not None and task not in TASKS:
        raise ReftEdgeError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ReftEdgeError(f"limit is {limit}; expected 1 or more")
    parsed: list[tuple[int, dict[str, Any]]] = []
    found: set[str] = set()
    for number, (row, kind) in read_rows(path, lambda row: (row, task or _task_of(row))):
        found.add(kind)
        parsed.append((number, row))
        if len(parsed) == limit:
            break
    if not parsed:
        raise ReftEdgeError(f"{path} has no rows to answer")
    if found == {"number", "answer"}:
        found = {"answer"}
    if len(found) > 1:
        raise ReftEdgeError(
            f"{path} mixes rows of the tasks {', '.join(sorted(found))}; give one of them with --task"
        )
    (kind,) = found
    rows = []
    for number, row in parsed:
        with at_line(path, number):
            rows.append(_question(kind, number, row))
    return Questions(kind, rows)


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
            records[question.row] = _likeliest(question, shares)
        on_done(len(batch))
    return summarise(questions.task, list(records.values()), time.perf_counter() - started, seed)


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


def compare(a: Sequence[Record], b: Sequence[Record], seed: int = 0) -> Comparison:
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
        return _first_name(rest, names) or _first_name(text, names)
    return rest.strip(_AROUND).removesuffix(".").strip(_AROUND) if trigger else ""


def _first_name(text: str, names: Sequence[str]) -> str:
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
            raise ReftEdgeError(f"line {question.row}: a choice is empty")
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
        records.append(_likeliest(question, named))
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


def _likeliest(question: Question, scores: dict[str, float]) -> Record:
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
        raise ReftEdgeError(f"line {question.row}: the prompt is empty")
    return text, ids


def _check_fits(decoder: Decoder, question: Question, tokens: int) -> None:
    if tokens > decoder.context_length:
        raise ReftEdgeError(
            f"line {question.row} needs {tokens} tokens with its answer; the model's context is "
            f"{decoder.context_length}: leave the row out, or lower --max-tokens"
        )


def _task_of(row: Any) -> str:
    if isinstance(row, dict):
        if "choices" in row:
            return "choice"
        if "text" in row and "label" in row:
            return "label"
        if "prompt" in row and "answer" in row:
            return "number" if _is_number(row["answer"]) else "answer"
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ReftEdgeError(
        'expected "prompt" and "answer" (with "choices" for multiple choice), or "text" and "label"; '
        f"found {found}"
    )


def _question(task: str, number: int, row: Any) -> Question:
    if isinstance(row, dict):
        choices = row.get("choices")
        for text in (*row.values(), *(choices if isinstance(choices, list) else ())):
            if isinstance(text, str):
                check_text(text)
    if task == "label":
        text, label = parse_row(row)
        return Question(number, text, label)
    if not isinstance(row, dict):
        raise ReftEdgeError(f"expected an object, found {type(row).__name__}")
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
    names = _stated_names(prompt)
    return Question(number, prompt, answer.strip(), names=names if answer.strip() in names else ())


def _stated_names(prompt: str) -> tuple[str, ...]:
    """The names of a prompt that ends `Answer format: a/b`."""
    stated = re.search(r"Answer format: *(\S+/\S+)\s*$", prompt)
    return tuple(name for name in stated[1].split("/") if name) if stated else ()


def _multiple_choice(number: int, prompt: str, answer: Any, choices: Any) -> Question:
    if choices is None:
        names = _stated_names(prompt)
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
    return Questions(questions.task, rows)


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


@dataclass(frozen=True)
class EvalSettings:
    """How questions are answered."""

    raw: bool | None = None
    """Prompts as they stand; None does what the adapters were trained with."""
    template: str = "{text}"
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    batch_size: int = 8
    max_tokens: int | None = None
    normalise: bool = True
    seed: int = 0
    device: str | None = None
    dtype: str = "fp32"
    threads: int | None = None
    trusted: TrustedKeys | None = None
    """Only adapters that one of these keys signed are used."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ReftEdgeError(f"{name} is {value}; expected 1 or more")
        check_seed(self.seed)


def evaluate_folder(
    folder: Path,
    questions: Questions,
    adapters: Sequence[tuple[Path, float]],
    settings: EvalSettings,
    on_done: OnDone = lambda count: None,
) -> Evaluation:
    """Answer with an exported folder in ONNX Runtime; neither torch nor transformers is imported.

    Raises ReftEdgeError for a folder, adapters or questions that do not go together.
    """
    from reft_edge.manifest import load_manifest
    from reft_edge.runtime import SteeredEncoder, SteeredModel
    from reft_edge.runtime.answers import OnnxClassifier, OnnxDecoder

    device = settings.device or "auto"
    if load_manifest(folder).kind == "encoder":
        encoder = SteeredEncoder(folder, device, settings.threads, settings.trusted)
        path, scale = _only(adapters)
        classifier = OnnxClassifier(encoder, encoder.load_adapter(path), scale)
        return evaluate_classifier(classifier, questions, settings.batch_size, settings.seed, on_done)
    model = SteeredModel(folder, device, settings.threads, settings.trusted)
    scales = {
        model.load_adapter(path, name=f"{number}:{path}"): scale
        for number, (path, scale) in enumerate(adapters)
    }
    formats = [config.prompt_format for config in model.adapters.values()]
    decoder = OnnxDecoder(
        model, scales, choose_format(settings.raw, formats, model.prompts.template is not None)
    )
    return _evaluate_decoder(decoder, questions, settings, on_done)


def evaluate_model(
    model: str,
    questions: Questions,
    adapters: Sequence[tuple[Path, float]],
    settings: EvalSettings,
    on_done: OnDone = lambda count: None,
    report: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Answer with a PyTorch model, named as on the command line.

    Raises ReftEdgeError for a model, adapters or questions that do not go together.
    """
    import torch

    from reft_edge.encoders import is_encoder, load_encoder, load_text_tokens
    from reft_edge.models import load_model, load_model_prompts, resolve_model
    from reft_edge.torch_answers import torch_classifier, torch_decoder
    from reft_edge.training import chosen_dtype, torch_device

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch_device(settings.device)
    autocast = chosen_dtype(settings.dtype, device) == torch.bfloat16
    folder = resolve_model(model, report)
    loaded = [(load_verified(path, settings.trusted)[0], scale) for path, scale in adapters]
    if is_encoder(folder):
        with torch_classifier(
            load_encoder(folder), load_text_tokens(folder), *_only(loaded), device, autocast
        ) as classifier:
            return evaluate_classifier(classifier, questions, settings.batch_size, settings.seed, on_done)
    prompts = load_model_prompts(folder)
    formats = [adapter.config.prompt_format for adapter, _ in loaded]
    prompt_format = choose_format(settings.raw, formats, prompts.template is not None)
    with torch_decoder(load_model(folder), prompts, prompt_format, loaded, device, autocast) as decoder:
        return _evaluate_decoder(decoder, questions, settings, on_done)


def _evaluate_decoder(
    decoder: Decoder, questions: Questions, settings: EvalSettings, on_done: OnDone
) -> Evaluation:
    prompted = as_prompts(questions, settings.template, settings.words)
    return evaluate_decoder(
        decoder,
        prompted,
        settings.batch_size,
        settings.max_tokens,
        settings.normalise,
        settings.seed,
        on_done,
    )


def _only(adapters: Sequence[Item]) -> Item:
    if len(adapters) != 1:
        raise ReftEdgeError(f"an encoder classifies with one --adapter; {len(adapters)} were given")
    return adapters[0]
