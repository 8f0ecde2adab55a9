"""Accuracy on tasks: how rows are read and answers judged, and that PyTorch and ONNX Runtime answer alike."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from reft_edge.adapter.file import load_adapter
from reft_edge.cli import app
from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.evaluation.answering import (
    Continuations,
    batches,
    evaluate_classifier,
    evaluate_decoder,
    extract_answer,
    extract_number,
    judge,
)
from reft_edge.evaluation.onnx_answers import OnnxDecoder
from reft_edge.evaluation.results import (
    Record,
    bootstrap,
    compare_records,
    load_records,
    mcnemar,
    save_records,
    summarise,
)
from reft_edge.evaluation.run import EvalSettings, evaluate_folder, evaluate_model
from reft_edge.evaluation.tasks import Question, as_prompts, load_questions, parse_words
from reft_edge.evaluation.torch_answers import torch_decoder
from reft_edge.export import export_model
from reft_edge.model.encoders import load_encoder
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import choose_format, load_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from tests.commands.test_without_extras import run as run_without
from tests.export.test_encoder import random_classifier
from tests.helpers.tiny import make_encoder, make_model
from tests.helpers.torch_reference import greedy, logits, random_adapter

CPU = torch.device("cpu")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = {
    "choice": [
        {
            "prompt": f"Question {i}? " * (1 + i % 4),
            "choices": ["the lazy dog", "ice melts", "ice", "Who?"],
            "answer": i % 4,
        }
        for i in range(13)
    ],
    "number": [{"prompt": f"{i} and {i}?" * (1 + i % 3), "answer": f"{2 * i}"} for i in range(7)],
    "answer": [{"prompt": f"Is {i} odd?", "answer": "true" if i % 2 else "false"} for i in range(7)],
    "label": [{"text": f"I am {i}", "label": i % 2} for i in range(9)],
}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("adapter", [None, "first", "everywhere"])
def test_pytorch_and_onnx_give_the_same_answers(device_folder, tmp_path, task, adapter):
    questions = load_questions(write(tmp_path / "rows.jsonl", ROWS[task]))
    assert questions.task == task
    adapters = [(device_folder / f"{adapter}.safetensors", 0.7)] if adapter else []
    settings = EvalSettings(
        batch_size=3, max_tokens=12, template="Review: {text}", words={"0": "ice", "1": "dog"}
    )
    done = []
    torch_found = evaluate_model(str(device_folder / "hf"), questions, adapters, settings, done.append)
    onnx_found = evaluate_folder(device_folder / "export", questions, adapters, settings)
    assert sum(done) == len(ROWS[task]) == torch_found.rows
    for ours, theirs in zip(torch_found.records, onnx_found.records, strict=True):
        assert dataclasses.replace(ours, scores={}) == dataclasses.replace(theirs, scores={})
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-3)
    assert [record.row for record in onnx_found.records] == list(range(1, len(ROWS[task]) + 1))


@pytest.mark.parametrize("adapter", [None, "everywhere"])
def test_scores_and_answers_are_those_of_each_row_alone(device_folder, tiny_model, adapter, monkeypatch):
    """Batches, padding and shared passes against one plain pass a completion; a model's own penalties do not count."""
    monkeypatch.setattr(tiny_model.generation_config, "repetition_penalty", 3.0)
    prompts = load_prompts(device_folder / "hf")
    adapters = [(load_adapter(device_folder / f"{adapter}.safetensors"), 1.0)] if adapter else []
    graph = SteeredModel(device_folder / "export")
    names = [graph.load_adapter(device_folder / f"{adapter}.safetensors")] if adapter else []
    texts = ["Who are you?", "How?", "Water boils when it is hot; ice melts."]
    encoded = [tuple(prompts.encode_raw(text)) for text in texts]
    batch = [Continuations(ids, (40, 41)[:i], (50, 60)) for i, ids in enumerate(encoded)]
    with torch_decoder(tiny_model, prompts, "raw", adapters, CPU) as decoder:
        torch_scores, torch_tokens = decoder.log_likelihoods(batch), decoder.generate(encoded, 10)
        for item, scores in zip(batch, torch_scores, strict=True):
            with decoder.steering.prompts(torch.tensor([len(item.prompt)])):
                known = logits(tiny_model, list(item.ids)).log_softmax(dim=-1)[len(item.prompt) - 1 :]
            shared = sum(float(known[i, token]) for i, token in enumerate(item.shared))
            assert scores == pytest.approx(
                [shared + float(known[-1, token]) for token in item.last], abs=1e-4
            )
        alone = [greedy(tiny_model, list(ids), 10) for ids in encoded]
    assert torch_tokens == alone
    onnx = OnnxDecoder(graph, dict.fromkeys(names, 1.0), "raw")
    assert onnx.generate([*encoded, *encoded], 10) == alone * 2
    assert np.allclose(onnx.log_likelihoods(batch), torch_scores, atol=1e-3)


def test_an_encoder_is_measured_in_both(device_folder, tmp_path):
    source = ModelFolder(make_encoder(tmp_path / "hf"), "tiny-bert")
    export_model(source, tmp_path / "export")
    random_classifier(load_encoder(source), tmp_path / "task.safetensors", labels=("no", "yes"))
    rows = [
        {"text": "I am well. " * (1 + i % 3), "text2": f"Who {i}?", "label": ("no", "yes")[i % 2]}
        for i in range(9)
    ]
    questions = load_questions(write(tmp_path / "rows.jsonl", rows))
    adapters = [(tmp_path / "task.safetensors", 0.5)]
    settings = EvalSettings(batch_size=4)
    torch_found = evaluate_model(str(tmp_path / "hf"), questions, adapters, settings)
    onnx_found = evaluate_folder(tmp_path / "export", questions, adapters, settings)
    assert torch_found.right == onnx_found.right
    rounded = evaluate_model(
        str(tmp_path / "hf"), questions, adapters, dataclasses.replace(settings, dtype="bf16")
    )
    pairs = zip(torch_found.records, rounded.records, strict=True)
    assert max(abs(ours.scores["no"] - theirs.scores["no"]) for ours, theirs in pairs) > 1e-5
    for ours, theirs in zip(torch_found.records, onnx_found.records, strict=True):
        assert ours.answer == theirs.answer
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
        assert sum(ours.scores.values()) == pytest.approx(1, abs=1e-4)
    for run, source in ((evaluate_model, "hf"), (evaluate_folder, "export")):
        path = str(tmp_path / source) if run is evaluate_model else tmp_path / source
        with pytest.raises(ReftEdgeError, match="one --adapter"):
            run(path, questions, [], settings)
        unknown = load_questions(write(tmp_path / "other.jsonl", [{"text": "a", "label": "maybe"}]))
        with pytest.raises(ReftEdgeError, match="maybe"):
            run(path, unknown, adapters, settings)


def test_the_mean_and_the_sum_choose_differently(device_folder, tmp_path):
    rows = [
        {
            "prompt": "Who are you?",
            "choices": ["e", "the quick brown fox jumps over the lazy dog"],
            "answer": 0,
        }
    ]
    questions = load_questions(write(tmp_path / "rows.jsonl", rows))
    means, sums = (
        evaluate_folder(device_folder / "export", questions, [], EvalSettings(normalise=normalise))
        .records[0]
        .scores
        for normalise in (True, False)
    )
    long = rows[0]["choices"][1]
    count = len(load_prompts(device_folder / "hf").encode_plain(long))
    assert sums[long] == pytest.approx(means[long] * count, rel=1e-3)
    assert sums["e"] == means["e"]


def test_a_folder_is_measured_without_torch(device_folder, tmp_path):
    rows, records = write(tmp_path / "rows.jsonl", ROWS["choice"]), tmp_path / "out.jsonl"
    blocked = ["torch", "transformers", "onnx", "onnx_ir", "accelerate", "huggingface_hub", "gguf"]
    done = run_without(blocked, "eval", device_folder / "export", rows, "--json", "--records", records)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 13
    assert len(load_records(records)) == 13
    needs_torch = run_without(["torch"], "eval", device_folder / "hf", rows)
    assert needs_torch.returncode == 1
    assert "reft-edge[train]" in needs_torch.stderr.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "number"),
    [("3 + 4 = 7.", 7), ("so $1,250.50", 1250.5), ("-2", -2), ("#### 72", 72), ("none", None), ("5-3", -3)],
)
def test_the_last_number(text, number):
    assert extract_number(text) == number


def test_answers_are_judged_by_the_rules():
    number = Question(1, "p", "576.0")
    assert judge("number", number, "24 * 24 = 576").right
    assert not judge("number", number, "576 tiles, in 2 rows").right
    assert judge("number", number, "no idea").answer == ""
    assert extract_answer("I think the correct answer is answer2.\n") == "answer2"
    assert extract_answer("answer2") == ""
    answer = Question(1, "p", "answer1")
    assert judge("answer", answer, "the correct answer is answer1").right
    assert not judge("answer", answer, "the correct answer is answer1 or answer2").right
    assert not judge("answer", answer, "answer1").right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The correct answer is answer4.", "answer4"),
        ("THE CORRECT ANSWER IS answer4", "answer4"),
        ("I say:\nThe correct answer is: **answer4**", "answer4"),
        ('the Correct Answer is "answer4".\n', "answer4"),
        ("the correct answer is Mount Everest.", "Mount Everest"),
        ("the correct answer is", ""),
        ("It is answer4.", ""),
        ("", ""),
    ],
)
def test_an_answer_behind_the_words_whatever_their_capitals(text, expected):
    assert extract_answer(text) == expected
    assert judge("answer", Question(1, "p", "answer4"), text).right == (expected == "answer4")


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        ("answer1/answer2/answer3/answer4", "The correct answer is answer4.", "answer4"),
        ("answer1/answer2/answer3/answer4", "It is answer4, not answer1.", "answer4"),
        ("answer1/answer2", "answer1 is wrong. The correct answer is Answer2 or answer1", "answer2"),
        ("answer1/answer2", "answer1: the correct answer is unknown", "answer1"),
        ("answer1/answer12", "answer12", "answer12"),
        ("true/false", "True. That is so", "true"),
        ("true/false", "That is untrue.", ""),
        ("A/B", "A dog? The correct answer is B", "B"),
        ("A/B", "a dog", ""),
        ("solution1/solution2", "", ""),
    ],
)
def test_the_first_of_the_stated_names(tmp_path, names, text, expected):
    """As LLM-Adapters reads the commonsense tasks; a name is a word of its own."""
    for answer in names.split("/"):
        rows = [{"prompt": f"Choose.\n\nAnswer format: {names}", "answer": answer}]
        (question,) = load_questions(write(tmp_path / "rows.jsonl", rows)).rows
        found = judge("answer", question, text)
        assert (found.answer, found.right) == (expected, expected == answer)


def test_answers_that_cannot_be_read_are_counted(device_folder, tmp_path):
    rows = [
        *({"prompt": f"Is {i} odd?\n\nAnswer format: true/false", "answer": "true"} for i in range(3)),
        {"prompt": "Which?", "answer": "Rome"},
    ]
    path, records = write(tmp_path / "rows.jsonl", rows), tmp_path / "records.jsonl"
    command = [
        "eval",
        str(device_folder / "export"),
        str(path),
        "--max-tokens",
        "4",
        "--records",
        str(records),
    ]
    done = CliRunner().invoke(app, command)
    assert "4 of 4 rows gave no answer that could be read; they count as wrong" in done.output
    assert [found.answer for found in load_records(records)] == [""] * 4
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["unread"] == 4
    numbers = [judge("number", Question(1, "p", "3"), text) for text in ("three", "3", "it is 4")]
    assert summarise("number", numbers, 1.0).unread == 1
    refused = CliRunner().invoke(app, [*command, "--records", str(path)])
    assert refused.exit_code == 1
    assert "would be replaced" in refused.output


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_choose_nothing(device_folder, tmp_path, bad):
    prompts = load_prompts(device_folder / "hf")

    class Broken:
        prompt_format, context_length = "raw", 999

        def __init__(self, scores):
            self.prompts, self.scores = prompts, scores

        def log_likelihoods(self, batch):
            return [[self.scores.pop(0) for _ in item.last] for item in batch]

    rows = [{"prompt": "Who?", "choices": ["a", "b", "c"], "answer": 0}]
    questions = load_questions(write(tmp_path / "rows.jsonl", rows))
    found = evaluate_decoder(Broken([-1.0, bad, -2.0]), questions)
    (record,) = found.records
    assert (record.answer, found.unread) == (("a", 0) if bad == -math.inf else ("", 1))
    assert record.scores == {"a": -1.0, "c": -2.0}
    assert evaluate_decoder(Broken([bad] * 3), questions).records[0].answer == ""
    save_records(found.records, tmp_path / "records.jsonl")
    assert json.loads((tmp_path / "records.jsonl").read_text(), parse_constant=pytest.fail)

    class BrokenClassifier:
        labels = ("0", "1")

        def probabilities(self, texts):
            return [{"0": bad, "1": bad} for _ in texts]

    labelled = load_questions(write(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}]))
    assert evaluate_classifier(BrokenClassifier(), labelled).unread == 1


def test_tokens_beyond_the_embedding_are_refused(device_folder, tiny_model):
    prompts = load_prompts(device_folder / "hf")
    with torch_decoder(tiny_model, prompts, "raw", [], CPU) as decoder:
        for call in (
            lambda: decoder.generate([(5, 320)], 2),
            lambda: decoder.log_likelihoods([Continuations((5, 999), (), (1, 2))]),
            lambda: decoder.log_likelihoods([Continuations((5,), (400,), (1,))]),
            lambda: decoder.log_likelihoods([Continuations((5,), (), (1, 320))]),
        ):
            with pytest.raises(ReftEdgeError, match=r"a row has the token .* the model has 320"):
                call()


def test_choices_come_from_the_stated_answer_format(tmp_path):
    rows = [{"prompt": "Choose.\n\nAnswer format: answer1/answer2", "completion": "-", "answer": "answer2"}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert load_questions(path).task == "answer"
    (question,) = load_questions(path, "choice").rows
    assert question.choices == ("the correct answer is answer1", "the correct answer is answer2")
    assert (question.names, question.expected) == (("answer1", "answer2"), "answer2")


def test_labelled_texts_become_prompts(tmp_path):
    rows = [
        {"text": "It rains {text2}.", "text2": "It is wet.", "label": "yes"},
        {"text": "a", "label": "no"},
    ]
    questions = load_questions(write(tmp_path / "rows.jsonl", rows))
    first, second = as_prompts(questions, "{text} So: {text2}", {"yes": " y", "no": " n"}).rows
    assert first.prompt == "It rains {text2}. So: It is wet."
    assert second.prompt == "a So: "
    assert (first.choices, first.names, first.expected) == ((" y", " n"), ("yes", "no"), "yes")
    with pytest.raises(ReftEdgeError, match="text2"):
        as_prompts(questions, "{text}", {})
    with pytest.raises(ReftEdgeError, match="no word for the labels"):
        as_prompts(questions, "{text}{text2}", {"yes": "y"})
    assert parse_words(["0= no", "1=a=b"]) == {"0": " no", "1": "a=b"}
    for bad in (["0"], ["0="], ["0=a", "0=b"]):
        with pytest.raises(ReftEdgeError, match="LABEL=WORD"):
            parse_words(bad)


@pytest.mark.parametrize(
    ("line", "task", "message"),
    [
        ("{", None, "line 2: not valid JSON"),
        ('{"prompt": "a"}', None, "line 2: .*this one has the columns 'prompt'"),
        ('{"prompt": "a", "answer": "7", "choices": ["7"]}', "choice", "two or more choices"),
        ('{"prompt": "a", "answer": 2, "choices": ["b", "c"]}', "choice", "none of the choices"),
        ('{"prompt": "a", "answer": "b", "choices": "bc"}', "choice", "list of texts"),
        ('{"prompt": "a", "answer": "b"}', "choice", "Answer format"),
        ('{"prompt": "a", "answer": 0, "choices": []}', None, "two or more choices"),
        ('{"prompt": "a", "answer": 0, "choices": ["", "b"]}', None, "line 2: a choice is empty"),
        ('{"prompt": "a", "answer": "b"}', "number", "not a number"),
        ('{"prompt": "a", "answer": NaN}', "number", "not a number"),
        ('{"text": "a", "label": 1}', None, "the rows before are questions .*this one is labelled texts"),
        ('{"prompt": "a", "answer": "b"}', None, "mixes rows of the tasks answer, choice; give one"),
        ('{"text": "a", "label": 1.5}', "label", "line 1|line 2"),
        ("[]", "number", "line 2"),
        ("[" * 100_000, None, "line 2: not valid JSON"),
        (
            json.dumps({"prompt": "Answer format: " + "a/" * 200 + "a b", "answer": "a"}),
            "choice",
            "Answer format",
        ),
        ('{"prompt": "a", "answer": "b"}', "multiple", "unknown task"),
        *(
            (row, task, "line 2: `[a-z0-9]+`: character 1 of the text is half of one")
            for row, task in (
                ('{"prompt": "\\ud83d", "answer": "7", "choices": ["7", "8"]}', None),
                ('{"prompt": "a", "answer": 0, "choices": ["\\udc00", "8"]}', None),
                ('{"prompt": "a", "answer": "\\ud83d"}', "answer"),
                ('{"text": "\\ud83d", "text2": "b", "label": 1}', "label"),
                ('{"text": "a", "text2": "\\ud83d", "label": 1}', "label"),
            )
        ),
    ],
)
def test_rows_of_other_forms_are_refused(tmp_path, line, task, message):
    path = tmp_path / "rows.jsonl"
    first = '{"prompt": "q", "answer": "7", "choices": ["7", "8"], "text": "a", "label": 0}'
    path.write_text(f"{first}\n{line}\n")
    with pytest.raises(ReftEdgeError, match=message):
        load_questions(path, task)


def test_limits_and_bounds(device_folder, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS["number"])
    assert len(load_questions(path, limit=3).rows) == 3
    with pytest.raises(ReftEdgeError, match="limit is 0"):
        load_questions(path, limit=0)
    with pytest.raises(ReftEdgeError, match="no rows"):
        load_questions(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ReftEdgeError, match="batch_size is 0"):
        EvalSettings(batch_size=0)
    with pytest.raises(ReftEdgeError, match="seed is -1"):
        EvalSettings(seed=-1)
    with pytest.raises(ReftEdgeError, match="seed is -1"):
        compare_records([record(1, True)], [record(1, True)], seed=-1)
    with pytest.raises(ReftEdgeError, match="dtype is 'fp16'; expected one of auto, fp32, bf16"):
        evaluate_model(str(device_folder / "hf"), load_questions(path), [], EvalSettings(dtype="fp16"))
    with pytest.raises(ReftEdgeError, match="line 1 needs"):
        evaluate_folder(device_folder / "export", load_questions(path), [], EvalSettings(max_tokens=999))
    long = write(tmp_path / "long.jsonl", [{"prompt": "Who? " * 300, "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(ReftEdgeError, match="line 1 needs"):
        evaluate_folder(device_folder / "export", load_questions(long), [], EvalSettings())


def test_an_adapter_of_another_base_is_refused_in_both(device_folder, tmp_path):
    other = load_model(ModelFolder(make_model(tmp_path / "other", seed=9), "other"))
    random_adapter(other, path=tmp_path / "other.safetensors")
    questions = load_questions(write(tmp_path / "rows.jsonl", ROWS["answer"]))
    adapters = [(tmp_path / "other.safetensors", 1.0)]
    with pytest.raises(BaseMismatchError):
        evaluate_model(str(device_folder / "hf"), questions, adapters, EvalSettings())
    with pytest.raises(BaseMismatchError):
        evaluate_folder(device_folder / "export", questions, adapters, EvalSettings())


def test_the_prompt_format_follows_the_adapters():
    assert choose_format(None, [], True) == "chat"
    assert choose_format(None, [], False) == "raw"
    assert choose_format(None, ["raw", "raw"], True) == "raw"
    assert choose_format(True, ["chat"], True) == "raw"
    with pytest.raises(ReftEdgeError, match="--raw or --chat"):
        choose_format(None, ["raw", "chat"], True)


@given(
    st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 200))
)
def test_batches_hold_every_item_once_within_their_bounds(lengths, size, padded):
    found = list(batches(lengths, size, lambda length: length, padded))
    assert sorted(item for batch in found for item in batch) == sorted(lengths)
    assert all(len(batch) <= size for batch in found)
    assert padded is None or all(len(batch) == 1 or max(batch) * len(batch) <= padded for batch in found)


def test_the_interval_is_that_of_resampled_rows():
    """Against resampling the rows themselves, and the normal approximation."""
    low, high = bootstrap(160, 200, seed=0)
    assert bootstrap(160, 200, seed=0) == (low, high)
    rows = np.repeat([1, 0], [160, 40])
    means = np.random.default_rng(1).choice(rows, (5000, 200)).mean(axis=1)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.011)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 200), rel=0.1)
    assert bootstrap(5, 5, seed=0) == (1.0, 1.0)


def record(row, right, id="x"):
    return Record(row, id, "a", "a" if right else "b", right)


def test_two_runs_are_compared_row_by_row(tmp_path):
    a = [record(i, right) for i, right in enumerate([True] * 30 + [True] * 2 + [False] * 12 + [False] * 6)]
    b = [record(i, right) for i, right in enumerate([True] * 30 + [False] * 2 + [True] * 12 + [False] * 6)]
    save_records(b[::-1], tmp_path / "b.jsonl")
    found = compare_records(a, load_records(tmp_path / "b.jsonl"))
    assert (found.both, found.only_a, found.only_b, found.neither) == (30, 2, 12, 6)
    assert found.accuracy_b - found.accuracy_a == pytest.approx(0.2)
    assert 0 < found.low < 0.2 < found.high
    assert found.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert mcnemar(0, 0) == 1.0
    many = math.erfc(
        (200 - 1) / math.sqrt(20_000) / math.sqrt(2)
    )  # the normal approximation, continuity corrected
    assert mcnemar(9_900, 10_100) == mcnemar(10_100, 9_900) == pytest.approx(many, rel=1e-3)
    assert mcnemar(5, 5) == 1.0
    with pytest.raises(ReftEdgeError, match="same questions: 1 of 50"):
        compare_records(a, [record(0, True, "y"), *b[1:]])
    with pytest.raises(ReftEdgeError, match="same questions: 10 of 50"):
        compare_records(a, b[:40])


def test_records_keep_odd_text_and_others_are_refused(tmp_path):
    odd = Record(1, "x", "a", "", False, text="line\u2028separator\x85 and\nnewline é")
    save_records([odd], tmp_path / "r.jsonl")
    assert load_records(tmp_path / "r.jsonl") == [odd]
    for content in (
        '{"row": 1}',
        "[]",
        "[" * 100_000,
        '{"row": "1", "id": "", "expected": "", "answer": "", "right": true}',
        "x",
    ):
        (tmp_path / "r.jsonl").write_text(content)
        with pytest.raises(ReftEdgeError, match="line 1 is not a record"):
            load_records(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ReftEdgeError, match="no records"):
        load_records(tmp_path / "r.jsonl")


def test_the_command_line(device_folder, tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROWS["choice"])

    def call(*arguments):
        command = [sys.executable, "-m", "reft_edge", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")

    for name, extra in (("a", []), ("b", ["-a", f"{device_folder / 'first.safetensors'}:0.5"])):
        done = call("eval", device_folder / "export", rows, "--records", tmp_path / f"{name}.jsonl", *extra)
        assert done.returncode == 0, done.stderr
        assert "of 13 rows right, task choice" in done.stdout
    done = call("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert done.returncode == 0, done.stderr
    assert "McNemar" in done.stdout
    for options, message in (
        (["--task", "number"], "line 1 needs"),
        (["--records", tmp_path], "is a folder"),
    ):
        failed = call("eval", device_folder / "export", rows, *options)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
