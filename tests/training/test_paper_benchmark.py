"""The paper's table: cells are planned, made one by one on one model, and become tables."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.steering.interventions import Interventions
from reft_edge.training.classification import LabelledText, LabelledTexts
from reft_edge.training.description import adapter_config
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import Trainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "breadth",
    "cells",
    "data_rows",
    "encoders",
    "glue",
    "likeness",
    "llm_adapters",
    "minilm",
    "run",
    "self_instruct",
)
MODULES += ("sst2_encoder", "table", "tables", "tasks", "win_rate", "worker")


@pytest.fixture
def paper(monkeypatch):
    """Imports modules of the benchmark, which are scripts with common names, for one test."""
    for folder in (".", "training", "paper"):
        monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


def line(study, method, lr, seed, right, **further):
    scores = {"dev": {"right": right}, study: {"right": right}}
    return {
        "study": study,
        "method": method,
        "lr": lr,
        "seed": seed,
        "scores": scores,
        "parameters": 7,
    } | further


def test_a_question_of_mawps_is_kept_where_its_equation_gives_its_answer(paper):
    read = paper("llm_adapters").arithmetic

    def row(equation, answer):
        return {"original_text": "How many?", "equation": equation, "ans": answer}

    kept = read(row("X=((22.0-14.0)/4.0)", 2.0))
    assert (kept["completion"], kept["answer"]) == ("(22 - 14) / 4 = 2", "2")
    assert read(row("x=0.25 + 0.5", 0.75))["completion"] == "0.25 + 0.5 = 0.75"
    for equation in ("X=7+8", "X=7/0", "X-7=15", "X=__import__('os')", "X=2**3", "X=(7", "X=7 8"):
        assert read(row(equation, 16)) is None


def test_the_data_of_a_checkout_holds_no_training_row_that_is_a_test(paper, tmp_path, monkeypatch, capsys):
    module = paper("llm_adapters")
    said = {"original_text": "Ann had 3 , then 4 ?", "equation": "X=3+4", "ans": 7}
    other = said | {"original_text": "Bob had 3 and 4 ?"}
    tested = said | {"original_text": "Cay had 3 , then 4 ?"}
    generic = {"instruction": " Cay had 3, then 4? ", "output": "seven", "answer": "7"}
    files = {
        "mawps/trainset": [said, said, other, tested],
        "mawps/validset": [other],
        "mawps/testset": [said | {"original_text": "Dan had 3 ?"}],
        "AddSub/test": [generic],
    }
    for folder, parts in module.COPIED.values():
        for part in parts:
            files.setdefault(f"{folder}/{part}", [generic])
    files["social_i_qa/test"] = [generic]
    for name, rows in files.items():
        path = tmp_path / "checkout/dataset" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "checkout"), str(tmp_path / "data")])
    module.main()
    kept = (tmp_path / "data/mawps/train.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in kept] == ["Ann had 3 , then 4 ?"]
    assert not list((tmp_path / "data").glob("openbookqa/test*"))


def test_instructions_are_short_each_its_own_and_answered(paper, tmp_path, monkeypatch, capsys):
    module = paper("self_instruct")

    def row(asked, given, answer):
        return {"instruction": asked, "instances": [{"input": given, "output": answer}]}

    rows = [row(f"Say {i} in words. ", f" {i}\n", f"the number {i}") for i in range(120)]
    refused = [row("Yes or no?", "", "Yes"), row("Too long?", "é" * 240, "It is too long.")]
    for source in module.SOURCES:
        path = tmp_path / "checkout" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *refused]), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "checkout"), str(tmp_path)])
    module.main()
    train, test = (
        [json.loads(line) for line in (tmp_path / f"instructions/{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == (20, 100)
    assert len({row["prompt"] for row in train + test}) == 120
    assert {"prompt": "Say 7 in words.\n\n7", "completion": "the number 7"} in train + test
    assert [row["prompt"] for row in test[:9]] != [f"Say {i} in words.\n\n{i}" for i in range(9)]


def answers(likeness, lengths):
    return {"likeness": likeness, "lengths": lengths}


def test_a_win_rate_is_freed_of_what_length_does_and_keeps_what_quality_does(paper):
    module, drawn = paper("win_rate"), np.random.default_rng(0)
    base = answers(np.full(400, 0.5), np.full(400, 100))
    longer = drawn.normal(40, 40, 400)
    once = np.ones((1, 400))

    def rates(better):
        found = module.compared(answers(0.5 + better, 100 + longer), base)
        return float(module.plain(found, once)[0]), float(module.controlled(found, once)[0])

    noise = drawn.logistic(0, 1, 400)
    raw, free = rates(2 * np.tanh(longer / longer.std()) + noise)  # only the longer answer wins
    assert raw > 0.7
    assert free == pytest.approx(0.5, abs=0.06)
    raw, free = rates(1 + noise)  # better by itself: sigmoid(1)
    assert raw == pytest.approx(0.731, abs=0.06)
    assert free == pytest.approx(0.731, abs=0.06)


def test_a_win_rate_stands_where_nothing_differs_or_all_win(paper):
    module, once = paper("win_rate"), np.ones((1, 20))
    base = answers([0.5] * 20, [80] * 20)
    same = module.compared(base, base)
    assert module.plain(same, once).tolist() == module.controlled(same, once).tolist() == [0.5]
    all_won = module.compared(answers([0.6] * 20, [*range(70, 90)]), base)
    assert module.plain(all_won, once)[0] == 1
    assert 0.95 < module.controlled(all_won, once)[0] < 1
    half = np.array([[1.0] * 10 + [0.0] * 10])
    mixed = module.compared(answers([0.6] * 10 + [0.4] * 10, [80] * 20), base)
    assert module.plain(mixed, half)[0] == 1
    assert module.controlled(mixed, half)[0] > 0.9 > 0.6 > module.controlled(mixed, once)[0]


def test_likeness_is_the_cosine_of_sentence_vectors(paper, device_folder, monkeypatch):
    module = paper("likeness")
    monkeypatch.setattr(module, "packaged_minilm", lambda: str(device_folder / "encoder-hf"))
    same, other, empty = module.likeness(["a good film", "a good film", ""], ["a good film", "bad", "bad"])
    assert same == pytest.approx(1, abs=1e-5)
    assert -1 <= other < 1
    assert -1 <= empty < 1


def test_learning_rates_are_chosen_before_other_seeds_and_tasks(paper):
    run, breadth = paper("run"), paper("breadth")
    method = breadth.METHODS["lora"]
    plan = run.Plan([], breadth.DECODERS, ["sst2", "boolq"], [method], 2)
    search = [cell for cell in plan.wanted() if cell.method == "lora"]
    assert {(cell.study, cell.lr, cell.seed) for cell in search} == {("sst2", lr, 0) for lr in method.rates}
    best = method.rates[1]
    lines = [line("sst2", "lora", lr, 0, "11" if lr == best else "01") for lr in method.rates]
    plan = run.Plan(lines, breadth.DECODERS, ["sst2", "boolq"], [method], 2)
    assert [(cell.study, cell.lr, cell.seed) for cell in plan.wanted() if cell.method == "lora"] == [
        ("boolq", best, 0),
        ("sst2", best, 1),
        ("boolq", best, 1),
    ]
    plan.failed = {run.Cell("boolq", "lora", best, 0)}
    assert run.Cell("boolq", "lora", best, 0) not in plan.wanted()


def test_a_method_of_the_same_formula_takes_the_rate_that_was_found(paper):
    run, breadth, tables = paper("run"), paper("breadth"), paper("tables")
    loreft, pyreft = (breadth.METHODS[name] for name in ("loreft", "pyreft"))
    first, best, last = loreft.rates
    lines = [line("sst2", "loreft", lr, 0, "11" if lr == best else "01") for lr in (first, best)]
    plan = run.Plan(lines, breadth.DECODERS, ["sst2"], [pyreft], 2)
    assert not [cell for cell in plan.wanted() if cell.method == "pyreft"]  # the search is not over
    lines += [line("sst2", "loreft", last, 0, "00"), line("sst2", "pyreft", best, 0, "10")]
    plan = run.Plan(lines, breadth.DECODERS, ["sst2"], [pyreft], 2)
    assert [(cell.lr, cell.seed) for cell in plan.wanted() if cell.method == "pyreft"] == [(best, 1)]
    assert tables.collect(lines)["pyreft", "sst2"].values.mean() == 0.5


def test_what_cannot_be_run_is_said(paper, monkeypatch):
    run, breadth = paper("run"), paper("breadth")
    with pytest.raises(SystemExit, match="boolq takes the learning rates of sst2: add it to --studies"):
        run.check_searches(breadth.DECODERS, ["boolq"], [], [])
    run.check_searches(breadth.DECODERS, ["boolq"], [], [line("sst2", "lora", 1e-3, 0, "1")])
    run.check_searches(breadth.DECODERS, ["boolq", "sst2"], [], [])
    with pytest.raises(SystemExit, match="pyreft takes the learning rates of loreft: add it to --methods"):
        run.check_searches(breadth.DECODERS, ["sst2"], [breadth.METHODS["pyreft"]], [])
    monkeypatch.setattr(breadth, "find_spec", lambda name: None)
    assert "pip install peft" in breadth.missing(breadth.METHODS["dora"])
    assert "give its Python with --pyreft" in breadth.missing(breadth.METHODS["pyreft"])
    assert (
        breadth.missing(breadth.METHODS["pyreft"], "python") == breadth.missing(breadth.METHODS["bias"]) == ""
    )
    unknown = dataclasses.replace(breadth.METHODS["bias"], settings={"intervention": "none"})
    assert "no intervention 'none'" in breadth.missing(unknown)


def test_a_line_that_was_cut_off_is_made_again(paper, tmp_path):
    run = paper("run")
    path = tmp_path / "cells.jsonl"
    assert run.read_lines(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert run.read_lines(path) == [{"a": 1}, {"a": 2}]
    run.append(path, {"a": 3})
    assert run.read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_what_lies_in_other_files_of_the_model_is_known(paper, tmp_path, monkeypatch):
    run = paper("run")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    own, part = tmp_path / "smollm2.jsonl", tmp_path / "smollm2-part.jsonl"
    run.append(own, line("gsm8k", "lora", 1e-3, 0, "1", model="smollm2", rows="g"))
    for model, rows in (("smollm2", "i"), ("smollm2", "fewer"), ("another", "i")):
        run.append(part, line("instructions", "lora", 1e-3, 0, "1", model=model, rows=rows))

    def told(path):
        found = run.elsewhere(path, "smollm2", {"instructions": {"rows": "i"}})
        return [(line["study"], line["rows"]) for line in found]

    assert told(own) == [("instructions", "i")]  # those cells are not made again
    assert told(part) == told(tmp_path / "new.jsonl") == [("gsm8k", "g")]  # learning rates


@pytest.fixture
def begun(paper, device_folder, tmp_path):
    """The module of cells with a model in memory and a study of four rows."""
    cells, tasks = paper("cells"), paper("tasks")
    rows = [{"text": f"a film of {i}", "label": i % 2} for i in range(20)]
    (tmp_path / "sst2").mkdir()
    for part in ("train", "dev", "test"):
        (tmp_path / "sst2" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dataclasses.replace(tasks.TASKS["sst2"], steps=3, batch_size=4, dev_rows=5, test_rows=9)
    folder = ModelFolder(device_folder / "hf", "tiny")
    study = cells.prepare(tmp_path, paper("breadth").Study(task, "sst2"), load_model_prompts(folder))
    prepared = tmp_path / "studies.json"
    prepared.write_text(json.dumps({"sst2": study}))
    cells.begin(str(folder.path), "cpu", "fp32", torch.get_num_threads(), str(prepared), str(tmp_path), 16)
    return cells


@pytest.mark.parametrize("method", ["post-block", "bias", "red"])
def test_a_cell_is_trained_tested_and_leaves_the_model_as_it_was(begun, device_folder, method):
    made = begun.make(begun.Cell("sst2", method, 5e-2, 0))
    again = begun.make(begun.Cell("sst2", method, 5e-2, 0))
    other = begun.make(begun.Cell("sst2", method, 5e-2, 1))
    assert made["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert abs(made["loss"] - other["loss"]) > 1e-4
    assert [len(made["scores"][name]["right"]) for name in ("dev", "sst2")] == [5, 9]
    ids = torch.arange(1, 9)[None]
    untouched = load_model(ModelFolder(device_folder / "hf", "tiny"))
    with torch.no_grad():
        assert torch.equal(begun._Process.model(ids).logits, untouched(ids).logits)


def test_a_cell_of_instructions_keeps_answers_their_likeness_and_length(
    paper, device_folder, tmp_path, monkeypatch
):
    cells, breadth, run = paper("cells"), paper("breadth"), paper("run")
    encoder = str(device_folder / "encoder-hf")
    monkeypatch.setattr(cells, "packaged_minilm", lambda: encoder)
    monkeypatch.setattr(sys.modules["likeness"], "packaged_minilm", lambda: encoder)
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(20)]
    (tmp_path / "instructions").mkdir()
    for part in ("train", "test"):
        path = tmp_path / f"instructions/{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = ModelFolder(device_folder / "hf", "tiny")
    prompts = load_model_prompts(folder)
    study = cells.prepare(tmp_path, run.small(breadth.STUDIES["instructions"]), prompts)
    assert study["rows"][0][0] == prompts.encode_prompt("Say 0.", "chat")
    prepared = tmp_path / "studies.json"
    prepared.write_text(json.dumps({"instructions": study}))
    cells.begin(str(folder.path), "cpu", "fp32", torch.get_num_threads(), str(prepared), str(tmp_path), 16)
    scores = cells.make(cells.Cell("instructions", "base", 0.0, 0))["scores"]
    assert {name: list(score) for name, score in scores.items()} == {
        "dev": ["likelihood"],
        "instructions": ["likelihood"],
        "instructions-answers": ["likeness", "lengths", "answers"],
    }
    told = scores["instructions-answers"]
    assert [len(text) for text in told["answers"]] == told["lengths"]
    assert len(told["likeness"]) == len(scores["instructions"]["likelihood"]) == 8


def test_a_cell_of_a_library_with_an_environment_of_its_own(begun, monkeypatch):
    """By worker.py in a process, here with PyTorch alone in place of pyreft."""
    python = sys.executable
    monkeypatch.setattr(begun._Process, "pyreft", python, raising=False)
    monkeypatch.setattr(begun, "made_by", lambda python, job, *rest: made_by(python, plain(job), *rest))
    made_by = sys.modules["elsewhere"].made_by

    def plain(job):
        return job | {"library": "reft-edge", "settings": {"rank": 2, "first": 1, "last": 1, "tied": True}}

    made = begun.make(begun.Cell("sst2", "pyreft", 5e-2, 0))
    assert [len(made["scores"][name]["right"]) for name in ("dev", "sst2")] == [5, 9]
    assert made["parameters"] > 0
    assert made["loss"] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'nowhere'"):
        made_by(python, {"library": "nowhere", "model": str(begun._Process.folder), "train": None}, {}, "cpu")


def test_an_instruction_to_a_model_without_a_template_ends_with_an_empty_line(paper):
    row = {"prompt": "Add 3 and 4.", "completion": "7"}
    without = SimpleNamespace(template=None)
    assert paper("cells").through_template(row, without) == row | {"prompt": "Add 3 and 4.\n\n"}


def test_answers_of_several_tests_are_asked_together(paper):
    together = paper("elsewhere").together
    one, other = ({"prompts": [[number]], "max_tokens": 3, "ends": [0]} for number in (1, 2))
    assert together({"a": one, "b": other}) == one | {"prompts": [[1], [2]]}
    assert together({}) is None
    with pytest.raises(ValueError, match="answers of a, b have different limits"):
        together({"a": one, "b": other | {"max_tokens": 4}})


def test_a_training_that_fails_gives_the_model_back(begun, monkeypatch):
    worker, given_back = sys.modules["worker"], []

    def opened(job, model):
        edit = torch.nn.Parameter(torch.zeros(1))
        return worker.Adapted(
            worker.plain(model), model, [edit], detach=lambda: given_back.append(job["settings"])
        )

    def fails(adapted, job, on_step):
        raise MemoryError("no room")

    monkeypatch.setitem(worker.OPEN, "peft", opened)
    monkeypatch.setattr(worker, "fit", fails)
    with pytest.raises(MemoryError):
        begun.make(begun.Cell("sst2", "lora", 1e-3, 0))
    assert [settings["r"] for settings in given_back] == [8]


@pytest.fixture
def begun_encoder(paper, device_folder, tmp_path):
    """The module of cells with an encoder in memory and a study of pairs."""
    cells, encoders, tasks = paper("cells"), paper("encoders"), paper("tasks")
    rows = [{"text": f"question {i}", "text2": "no. " * (i % 3 + 1), "label": i % 2} for i in range(40)]
    (tmp_path / "qnli").mkdir()
    (tmp_path / "qnli/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.Task("qnli", "QNLI", encoders.as_it_is, 3, 4, 5, 9, test_file="train")
    folder = ModelFolder(device_folder / "encoder-hf", "tiny")
    prepared = tmp_path / "studies.json"
    prepared.write_text(json.dumps({"qnli": encoders.prepare(tmp_path, task, folder)}))
    cells.begin(str(folder.path), "cpu", "fp32", torch.get_num_threads(), str(prepared), str(tmp_path), 16)
    return cells


@pytest.mark.parametrize("method", ["head", "post-block", "red", "lora"])
def test_a_cell_of_an_encoder_trains_a_head_beside_the_adapter(begun_encoder, device_folder, method):
    if method == "lora":
        pytest.importorskip("peft")
    model = begun_encoder._Process.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = begun_encoder.make(begun_encoder.Cell("qnli", method, 5e-2, 0))
    assert made["loss"] == pytest.approx(
        begun_encoder.make(begun_encoder.Cell("qnli", method, 5e-2, 0))["loss"], rel=1e-5
    )
    assert [len(made["scores"][name]["right"]) for name in ("dev", "qnli")] == [5, 9]
    head = 2 * (model.config.hidden_size + 1)
    assert made["parameters"] == head if method == "head" else made["parameters"] > head
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_s_batches_are_those_that_the_trainer_draws(begun_encoder):
    study = begun_encoder._Process.studies["qnli"] | {"steps": 9}
    module = sys.modules["encoders"]
    texts = zip(module.tokens_of(study["rows"]), (row[2] for row in study["rows"]), strict=True)
    data = LabelledTexts([LabelledText(*text) for text in texts], ("0", "1"), "")
    settings = TrainSettings(max_steps=9, batch_size=4, seed=3, group_by_length=True, pooling="cls")
    config = adapter_config(begun_encoder._Process.model, "tiny", settings, data.labels)
    trainer = Trainer(
        begun_encoder._Process.model, Interventions(config), settings, data, torch.device("cpu")
    )
    for step, numbers in enumerate(module.batches(study, 3)):
        assert trainer.rows(step) == [data.examples[number] for number in numbers]


def test_the_data_of_glue_is_read_as_it_stands(paper):
    glue = paper("glue")
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    assert list(glue.mrpc([header, ["1", "7", "8", 'The "car honked.', "It did."]])) == [
        {"text": 'The "car honked.', "text2": "It did.", "label": 1}
    ]
    pairs = [
        ["index", "question", "sentence", "label"],
        ["0", "Who?", "He.", "entailment"],
        ["1", "Who?", "x" * glue.LONGEST, "entailment"],
        ["2", "Who?", "Then.", "not_entailment"],
    ]
    assert [(row["text2"], row["label"]) for row in glue.qnli(pairs)] == [("He.", 1), ("Then.", 0)]


def test_tables_show_the_rate_that_did_best_and_gaps_on_the_same_seeds(paper):
    tables = paper("tables")
    lines = [
        line("sst2", "lora", 1e-3, 0, "1110"),
        line("sst2", "lora", 3e-4, 0, "1111"),
        line("sst2", "lora", 3e-4, 1, "1101"),
        line("sst2", "bias", 3e-3, 0, "1100"),
    ]
    found = tables.collect(lines)
    assert found["lora", "sst2"].lr == 3e-4
    assert found["lora", "sst2"].values.mean() == 7 / 8
    compared = tables.DECODERS
    tests = [compared.studies["sst2"].task]
    assert "| LoRA, rank 8 | 7 | 0.875 (" in tables.scores(compared, found, tests)
    (told,) = [
        row for row in tables.gaps(compared, found, tests, "lora").splitlines() if row.startswith("| bias")
    ]
    assert "| -0.500 (" in told  # seed 0 alone: 2 of 4 less than 4 of 4


def test_several_accuracies_have_a_mean_difference_where_a_method_has_all(paper):
    tables = paper("tables")
    lines = [
        line("sst2", "lora", 1e-3, 0, "1100"),
        line("boolq", "lora", 1e-3, 0, "1000"),
        line("sst2", "bias", 3e-3, 0, "1111"),
        line("boolq", "bias", 3e-3, 0, "1000"),
        line("sst2", "red", 3e-3, 0, "1111"),
    ]
    found = tables.collect(lines)
    compared = tables.DECODERS
    tests = [compared.studies[name].task for name in ("sst2", "boolq")]
    title, _, red, bias = tables.gaps(compared, found, tests, "lora").splitlines()
    assert title.endswith("| BoolQ | mean |")
    assert "| +0.250 (+" in bias  # half of the questions on one task, none on the other
    assert red.endswith("|  |  |")
    alone = tables.gaps(compared, found, tests[:1], "lora").splitlines()[0]
    assert "mean" not in alone


def test_a_file_of_an_encoder_becomes_tables_of_its_own(paper):
    tables = paper("tables")
    lines = [
        line("glue-sst2", "lora", 1e-3, 0, "1110"),
        line("glue-sst2", "head", 1e-2, 0, "1000"),
        line("mrpc", "head", 1e-2, 0, "11"),
    ]
    text = tables.tables("minilm", lines)
    assert text.startswith("### minilm\n\n|  | parameters | SST-2 | MRPC |\n")
    assert "QNLI" not in text
    assert "| the head alone | 7 | 0.250 (" in text
    assert "| the head alone | 0.01 (1) | 0.01 (1) |" in text


def test_answers_are_held_against_the_base_models(paper, tmp_path):
    tables = paper("tables")

    def told(method, lr, seed, likeness, lengths):
        test = {"instructions-answers": {"likeness": likeness, "lengths": lengths, "answers": []}}
        scores = {"dev": {"likelihood": [-1.0]}, "instructions": {"likelihood": [-2.0] * 4}}
        return line("instructions", method, lr, seed, "") | {"model": "m", "scores": scores | test}

    lines = [
        line("gsm8k", method, lr, 0, "1", model="m") for method, lr in {"base": 0.0, "lora": 1e-3}.items()
    ]
    lines += [line("gsm8k", "bias", lr, 0, right, model="m") for lr, right in {1e-2: "1", 3e-2: "0"}.items()]
    answers = [
        told("base", 0.0, 0, [0.5] * 4, [9] * 4),
        told("lora", 1e-3, 0, [0.6, 0.6, 0.4, 0.4], [5, 13, 5, 13]),
        told("bias", 1e-2, 0, [0.6, 0.6, 0.6, 0.5], [9] * 4),
        told("bias", 1e-2, 1, [0.6, 0.6, 0.6, 0.5], [9] * 4),
        told("bias", 3e-2, 0, [0.1] * 4, [9] * 4),
    ]
    paths = [tmp_path / "one.jsonl", tmp_path / "another.jsonl"]
    for path, mine in zip(paths, (lines, answers), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in mine))
    shown = tables.tables("m", tables.by_model(paths)["m"])
    rows = [row for row in shown.splitlines() if row.count("|") == 7]
    base, bias, lora = rows[-3:]
    assert base.startswith("| no adapter |  |  |  | 0.500 (")
    assert base.endswith("| 9 |")
    cells = bias.split(" | ")
    assert float(cells[1][:5]) == pytest.approx(0.835, abs=0.01)  # the ridge draws it to a half
    assert float(cells[2][:6]) == pytest.approx(0.335, abs=0.01)
    assert cells[3].startswith("0.875 (")
    assert lora.startswith("| LoRA, rank 8 | 0.500 (")
    assert " |  | 0.500 (" in lora


def test_the_committed_cells_make_the_tables_of_the_page(paper):
    """Means only: intervals are drawn."""
    tables = paper("tables")
    page = (BENCHMARKS.parent / "docs/paper.md").read_text(encoding="utf-8")
    _, shown, _ = page.split("<!-- trainings -->\n")
    models = tables.by_model(sorted(tables.RESULTS.glob("*.jsonl")))
    assert re.findall("^### (.*)", shown, re.MULTILINE) == list(models)
    for model, lines in models.items():
        (part,) = re.findall(rf"^### {model}\n(.*?)(?=^###|\Z)", shown, re.MULTILINE | re.DOTALL)
        for (method, _), cell in tables.collect(lines).items():
            if method in tables.compared_in(lines).methods:
                assert f"{cell.values.mean():.3f} (" in part
