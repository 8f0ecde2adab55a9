"""The Python API: its names, its examples, and the whole path from a model to a device."""

import doctest
import functools
import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import reft_edge
from reft_edge import api
from reft_edge.errors import AdapterFileError, BaseMismatchError, ReftEdgeError
from tests.helpers.tiny import make_model
from tests.helpers.torch_reference import random_adapter

NAMES = [
    *("Engine", "FrozenModel", "ReftEdgeError", "SteeredEncoder", "SteeredModel"),
    *("convert", "evaluate", "export", "load", "merge", "pull", "push", "ray_map", "steered", "train"),
    "train_many",
    "tune",
]
ROWS = [{"prompt": f"Who are you, {name}?", "completion": f"I am {name}, arr!"} for name in "ABCD"]
QUESTIONS = [
    {"prompt": "2 and 2?", "choices": ["4", "5"], "answer": 0},
    {"prompt": "1?", "choices": ["1", "2"], "answer": 1},
]


@pytest.fixture(scope="module")
def base(device_folder):
    return reft_edge.load(device_folder / "hf")


def test_the_public_names_are_these():
    assert sorted(reft_edge.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(reft_edge))
    for name in NAMES:
        assert callable(getattr(reft_edge, name)), name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        reft_edge.lod  # noqa: B018


@pytest.mark.parametrize(
    ("used", "absent"),
    [
        ("", ("torch", "transformers", "onnxruntime", "numpy", "tokenizers", "typer")),
        (
            "; reft_edge.load; reft_edge.train; reft_edge.export",
            ("torch", "transformers", "onnxruntime", "numpy"),
        ),
        ("; reft_edge.SteeredModel; reft_edge.Engine; reft_edge.SteeredEncoder", ("torch", "transformers")),
        ("; reft_edge.ReftEdgeError", ("torch", "numpy")),
    ],
)
def test_a_name_imports_only_what_it_needs(used, absent):
    code = f"import sys, reft_edge{used}\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["export", "convert"])
def test_a_part_and_a_function_of_one_name_are_both_there(name, monkeypatch):
    part = importlib.import_module(f"reft_edge.{name}")
    monkeypatch.setattr(api, name, lambda *arguments, **options: (arguments, options))
    assert getattr(reft_edge, name) is part
    assert getattr(reft_edge, name)(1, a=2) == ((1,), {"a": 2})


@pytest.mark.parametrize(
    "name", [*(name for name in NAMES if name != "ReftEdgeError"), "FrozenModel.trainable"]
)
def test_every_public_name_has_an_example_that_runs(name, device_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pirate.safetensors").write_bytes((device_folder / "first.safetensors").read_bytes())
    (tmp_path / "labels.safetensors").write_bytes((device_folder / "labels.safetensors").read_bytes())
    Path("smol").symlink_to(device_folder / "export")
    Path("minilm").symlink_to(device_folder / "encoder")
    first, *rest = name.split(".")
    told = functools.reduce(getattr, rest, getattr(api, first, None) or getattr(reft_edge, first))
    text = inspect.getdoc(told).replace('"smollm2"', repr(str(device_folder / "hf")))
    example = doctest.DocTestParser().get_doctest(text, {"reft_edge": reft_edge}, name, None, None)
    assert example.examples, f"{name} has no example"
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)


def test_from_rows_to_a_device(base, tmp_path):
    before = base.generate("Who are you?", max_tokens=12)
    losses = []
    run = reft_edge.train(
        base,
        ROWS,
        tmp_path / "pirate.safetensors",
        evaluation=ROWS[:2],
        positions="f3+l3",
        max_steps=8,
        lr=0.05,
        on_step=lambda step: losses.append(step.loss),
    )
    assert run.adapter == tmp_path / "pirate.safetensors"
    assert run.adapter.is_file()
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert run.evaluation is not None
    with reft_edge.steered(base, run.adapter) as steered:
        assert steered is base
        answer = base.generate("Who are you?", max_tokens=12)
        assert base.generate([{"role": "user", "content": "Who are you?"}], max_tokens=12) == answer
    assert answer != before
    assert base.generate("Who are you?", max_tokens=12) == before
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    found = reft_edge.evaluate(base, str(tmp_path / "test.jsonl"), run.adapter)
    assert found.rows == 2
    manifest = reft_edge.export(base, tmp_path / "smol", layers="all")
    assert manifest.precision == "fp32"
    model = reft_edge.SteeredModel(tmp_path / "smol")
    model.load_adapter(run.adapter)
    assert model.generate("Who are you?", "pirate", max_tokens=12) == answer
    assert model.generate("Who are you?", max_tokens=12) == before
    on_device = reft_edge.evaluate(tmp_path / "smol", QUESTIONS, run.adapter)
    assert [record.answer for record in on_device.records] == [record.answer for record in found.records]


def test_rows_train_alike_from_a_file_a_list_and_a_dataset(base, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [*ROWS, {"prompt": "Hi", "completion": "Arr", "id": 7}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms = {"file": tmp_path / "rows.jsonl", "text": str(tmp_path / "rows.jsonl"), "list": rows}
    forms |= {"tuple": tuple(rows), "generator": (row for row in rows)}
    forms |= {"dataset": datasets.Dataset.from_list(ROWS), "list of the dataset's": ROWS}
    written = {}
    for form, given in forms.items():
        output = tmp_path / f"{form}.safetensors"
        written[form] = (reft_edge.train(base, given, output, max_steps=2, dtype="fp32"), output.read_bytes())
    assert len({content for form, (_, content) in written.items() if "dataset" not in form}) == 1
    assert written["dataset"][1] == written["list of the dataset's"][1]


def test_a_datasets_empty_fields_are_fields_left_out(device_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    mixed = datasets.Dataset.from_list(
        [{"text": "Good.", "label": "a", "text2": None}, {"text": "Bad.", "label": "b", "text2": "x"}]
    )
    assert mixed[0]["text2"] is None
    run = reft_edge.train(
        device_folder / "encoder-hf", mixed, tmp_path / "x.safetensors", positions="f1", max_steps=1
    )
    assert run.steps == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
            "row 2: the rows before are prompts and completions",
        ),
        ([{"prompt": "a", "completion": "b"}, "text"], "row 2 is a str; expected a dict"),
        ([{"prompt": "a", "completion": {1, 2}}], "row 1 holds what JSON has no value for"),
        ([{"prompt": "\ud800", "completion": "b"}], "row 1: "),
        ([], "the list of rows has no row to train on"),
        ({"train": [], "test": []}, r"with the parts \['test', 'train'\]; give one of them"),
        (5, "rows are a int; expected a file's name"),
        ("missing.jsonl", "missing.jsonl"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(base, tmp_path, rows, message):
    with pytest.raises(ReftEdgeError, match=message):
        reft_edge.train(base, rows, tmp_path / "x.safetensors", max_steps=1)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1}, "there is no setting learning_rate; expected one of .*lr"),
        ({"prompt_format": "raw"}, "there is no setting prompt_format"),
        ({"rank": 0}, "rank"),
        ({"positions": "x9"}, "positions"),
        ({"task": "classification"}, "is no encoder"),
        ({"recipe": "cooking"}, "unknown recipe"),
        ({"eval_every": 1}, "held-out rows"),
        ({"device": "nowhere"}, "nowhere"),
        ({"lr": -1}, "lr is -1"),
        ({"lr": "fast"}, "lr is 'fast'; expected a number"),
        ({"rank": 2.5}, "rank is 2.5; expected a whole number"),
        ({"max_steps": True}, "max_steps is True; expected a whole number"),
        ({"tied": "yes"}, "tied is 'yes'; expected True or False"),
        ({"positions": 7}, "positions is 7; expected a text"),
        ({"layers": [0, 99]}, "99"),
        ({"layers": ["a"]}, "layers"),
    ],
)
def test_settings_that_do_not_go_are_named(base, tmp_path, settings, message):
    with pytest.raises(ReftEdgeError, match=message):
        reft_edge.train(base, ROWS, tmp_path / "x.safetensors", **settings)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_recipe_gives_way_to_what_is_given(base, tmp_path):
    from reft_edge.adapter.file import read_config

    reft_edge.train(base, ROWS, tmp_path / "x.safetensors", recipe="math", rank=2, max_steps=1)
    config = read_config(tmp_path / "x.safetensors")
    assert (config.rank, config.tied, config.positions) == (2, True, "all+gen")


def test_layers_are_a_text_a_list_or_a_number_and_numbers_may_be_numpys(base, tmp_path):
    import numpy as np

    from reft_edge.adapter.file import read_config

    for layers, expected in (("0;2", (0, 2)), ([0, 2], (0, 2)), (range(2), (0, 1)), (1, (1,))):
        rank, lr = np.int64(2), np.float32(0.01)
        reft_edge.train(base, ROWS, tmp_path / "x.safetensors", layers=layers, rank=rank, lr=lr, max_steps=1)
        config = read_config(tmp_path / "x.safetensors")
        assert (config.layers, config.rank) == (expected, 2)


def test_rows_in_memory_that_cannot_be_answered_are_named(base):
    with pytest.raises(ReftEdgeError, match=r"^row 2 needs"):
        reft_edge.evaluate(base, [QUESTIONS[0], {**QUESTIONS[0], "prompt": "many words " * 500}])
    with pytest.raises(ReftEdgeError, match=r"^row 1: "):
        reft_edge.evaluate(base, [{"prompt": "2?", "choices": ["4", "5"], "answer": 9}])
    with pytest.raises(ReftEdgeError, match="the list of rows has no rows"):
        reft_edge.evaluate(base, [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_training_that_breaks_off_leaves_the_base_as_it_was(base, tmp_path, error):
    before = base.generate("Who are you?", max_tokens=6)
    asked = [parameter.requires_grad for parameter in base.model.parameters()]

    def stop(step):
        raise error

    for options in ({"dtype": "bf16"}, {"checkpointing": True}):
        with pytest.raises(error):
            reft_edge.train(base, ROWS, tmp_path / "x.safetensors", max_steps=2, on_step=stop, **options)
        assert base.generate("Who are you?", max_tokens=6) == before
    assert [parameter.requires_grad for parameter in base.model.parameters()] == asked
    assert not (tmp_path / "x.safetensors").exists()


def test_an_exports_rounded_weights_are_not_put_into_the_loaded_base(base, tmp_path):
    reft_edge.export(base, tmp_path / "rounded", precision="int8", layers=[0])
    before = [parameter.clone() for parameter in base.model.parameters()]
    reft_edge.train(base, ROWS, tmp_path / "x.safetensors", base_weights=tmp_path / "rounded", max_steps=1)
    assert all((now == then).all() for now, then in zip(base.model.parameters(), before, strict=True))


def test_preferences_and_labels_are_trained_too(base, device_folder, tmp_path):
    pairs = [{"prompt": "Hi", "chosen": "Arr!", "rejected": "Hello."}] * 2
    run = reft_edge.train(
        base, pairs, tmp_path / "p.safetensors", task="preference", evaluation=pairs, max_steps=1
    )
    assert run.accuracy is not None
    encoder = reft_edge.load(device_folder / "encoder-hf")
    texts = [{"text": "Good.", "label": "yes"}, {"text": "Bad.", "label": "no"}]
    run = reft_edge.train(encoder, texts, tmp_path / "c.safetensors", positions="f1", max_steps=1)
    with reft_edge.steered(encoder, run.adapter):
        shares = encoder.classify("Good.")
    assert set(shares) == {"yes", "no"}
    assert sum(shares.values()) == pytest.approx(1)
    assert reft_edge.evaluate(encoder, texts, run.adapter).rows == 2
    with pytest.raises(ReftEdgeError, match="encoder"):
        encoder.generate("Good.")
    with pytest.raises(ReftEdgeError, match="to classify"):
        encoder.classify("Good.")


def test_what_steers_wrongly_is_refused_and_the_base_stays_as_it_is(base, device_folder, tmp_path):
    first = device_folder / "first.safetensors"
    before = base.generate("Who are you?", max_tokens=6)
    other = reft_edge.load(make_model(tmp_path / "other", seed=5))
    random_adapter(other.model, path=tmp_path / "other.safetensors")
    for given, kind in (
        ((tmp_path / "other.safetensors",), BaseMismatchError),
        ((device_folder / "expected.json",), AdapterFileError),
        ((tmp_path / "absent.safetensors",), AdapterFileError),
        (((first, float("nan")),), ReftEdgeError),
        (((first, 1, 2),), ReftEdgeError),
        ((7,), ReftEdgeError),
    ):
        with pytest.raises(kind), reft_edge.steered(base, *given):
            pytest.fail("it is steered")
        assert base.generate("Who are you?", max_tokens=6) == before
    with reft_edge.steered(base, first), pytest.raises(ReftEdgeError, match="steered already"):
        reft_edge.train(base, ROWS, tmp_path / "x.safetensors")
    with reft_edge.steered(base, first), pytest.raises(ReftEdgeError, match="steered already"):
        reft_edge.evaluate(base, QUESTIONS)
    with (
        reft_edge.steered(base, first),
        pytest.raises(ReftEdgeError, match="steered already"),
        reft_edge.steered(base, first),
    ):
        pass
    with pytest.raises(ZeroDivisionError), reft_edge.steered(base, first):
        1 / 0  # noqa: B018
    assert base.generate("Who are you?", max_tokens=6) == before


def test_scales_and_several_adapters_are_those_of_the_runtime(base, device_folder):
    files = [device_folder / f"{name}.safetensors" for name in ("first", "everywhere")]
    model = reft_edge.SteeredModel(device_folder / "export")
    for file in files:
        model.load_adapter(file)
    with reft_edge.steered(base, (files[0], 0.5), (str(files[1]), 2)):
        answer = base.generate("Who are you?", max_tokens=8, raw=True)
    assert model.generate("Who are you?", {"first": 0.5, "everywhere": 2.0}, max_tokens=8, raw=True) == answer


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {"raw": True}, "the prompt has 0 tokens"),
        ("many words " * 500, {}, "so that there is room"),
        ("Hi", {"max_tokens": 0}, "max_tokens is 0"),
        ([{"role": "user", "content": "Hi"}], {"raw": True}, "raw=True give a text"),
        ("\ud800", {}, r"U\+D800"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(base, prompt, options, message):
    with pytest.raises(ReftEdgeError, match=message):
        base.generate(prompt, **options)


def test_an_answer_ends_where_the_context_does(base):
    limit = base.model.config.max_position_embeddings
    prompt = "Who are you? " * 10
    length = len(base.prompts.encode_prompt(prompt, "raw"))
    base.generate(prompt, max_tokens=limit + 1 - length + 50, raw=True)


@pytest.mark.parametrize("model", ["no/such/model/here", "missing.gguf", "./nowhere"])
def test_a_model_that_is_not_there_is_named(model):
    for use in (reft_edge.load, lambda given: reft_edge.evaluate(given, QUESTIONS)):
        with pytest.raises(ReftEdgeError, match=model.rpartition("/")[2]):
            use(model)


def test_files_that_are_no_adapters_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_text("nothing")
    with pytest.raises(ReftEdgeError):
        reft_edge.merge([tmp_path / "x.safetensors"], tmp_path / "y.safetensors")
    with pytest.raises(ReftEdgeError):
        reft_edge.merge([], tmp_path / "y.safetensors")
    with pytest.raises(ReftEdgeError):
        reft_edge.push(tmp_path / "x.safetensors", tmp_path / "repository")
    with pytest.raises(ReftEdgeError):
        reft_edge.pull(tmp_path / "repository", tmp_path / "store", "x")
    with pytest.raises(ReftEdgeError):
        reft_edge.convert(tmp_path / "x.safetensors", tmp_path / "y.gguf")


def test_a_missing_package_is_named_with_its_extra():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import reft_edge\n"
        "try: reft_edge.load('x')\n"
        "except reft_edge.ReftEdgeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "reft-edge[train]" in done.stdout


def test_the_documented_settings_are_those_there_are():
    from reft_edge.training.settings import TrainSettings

    known = {field.name for field in fields(TrainSettings)} - {"prompt_format", "add_bias"}
    assert not [name for name in known if name not in api.train.__doc__]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: reft_edge.load(5), "model is 5; expected a text or a path"),
        (lambda: reft_edge.load("x", dtype=16), "dtype is 16; expected a text"),
        (
            lambda: reft_edge.train("x", [], "y", save_every="often"),
            "save_every is 'often'; expected a whole number",
        ),
        (lambda: reft_edge.train("x", [], "y", resume=1), "resume is 1; expected True or False"),
        (lambda: reft_edge.evaluate("x", [], limit=2.5), "limit is 2.5; expected a whole number or None"),
        (lambda: reft_edge.evaluate("x", [], words=["a"]), r"words is \['a'\]; expected a dict or None"),
        (
            lambda: reft_edge.export("x", "y", block_size=True),
            "block_size is True; expected a whole number or None",
        ),
        (lambda: reft_edge.export("x", "y", components=3), "components is 3; expected a list"),
        (lambda: reft_edge.convert("x.gguf", None), "output is None; expected a text or a path"),
        (lambda: reft_edge.merge(5, "y"), "adapters is 5; expected a list"),
        (lambda: reft_edge.merge(["a"], "y", rank="2"), "rank is '2'; expected a whole number or None"),
        (lambda: reft_edge.push(5, "y"), "files is 5; expected a text or a path or a list"),
        (
            lambda: reft_edge.pull("x", "y", version="new"),
            "version is 'new'; expected a whole number or None",
        ),
    ],
)
def test_arguments_of_another_type_are_named(use, message):
    with pytest.raises(ReftEdgeError, match=message):
        use()


def test_arguments_of_methods_are_checked_too(base):
    with pytest.raises(ReftEdgeError, match="max_tokens is '5'; expected a whole number"):
        base.generate("Hi", max_tokens="5")
    with pytest.raises(ReftEdgeError, match="dropout is None; expected a number"):
        base.trainable(dropout=None)
    with pytest.raises(ReftEdgeError, match="require_signed is 5"), reft_edge.steered(base, require_signed=5):
        pass
    with pytest.raises(TypeError, match="max_token"):
        base.generate("Hi", max_token=5)
