"""Encoders and classification: export, training and running, on a tiny random encoder of every supported architecture."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from reft_edge.adapter.config import INTERVENTIONS, Adapter, AdapterConfig
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.adapter.linear import fold
from reft_edge.cli import app
from reft_edge.convert.onnx_adapter import pack_adapter
from reft_edge.errors import AdapterFileError, BaseMismatchError, ReftEdgeError
from reft_edge.export import export_model
from reft_edge.export.check_encoder import torch_hidden_states
from reft_edge.model.encoders import default_pooling, load_encoder, load_text_tokens
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.manifest import load_manifest
from reft_edge.model.places import PORT_KINDS, Place
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredEncoder, SteeredModel
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.encoder import EncoderSession
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.classification import load_labelled
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings
from tests.helpers.tiny import ENCODERS, LAYERS, make_encoder
from tests.helpers.torch_reference import random_classifier, torch_probabilities

TOLERANCE = 1e-3
TEXTS = [
    "I am well, thank you.",
    "ice",
    ("Who are you?", "The quick brown fox jumps over the lazy dog."),
    "Water boils when it is hot; ice melts when it is warm. " * 3,
]
ROWS = [
    {"text": "I am well, thank you", "label": "good"},
    {"text": "The quick brown fox", "label": "good"},
    {"text": "ice melts when it is warm", "text2": "Who are you?", "label": "bad"},
    {"text": "lazy dog", "label": "bad"},
]


@pytest.fixture(scope="module", params=list(ENCODERS))
def encoder(request, tmp_path_factory):
    """The model folder, the PyTorch encoder and the exported folder."""
    folder = tmp_path_factory.mktemp(request.param)
    source = ModelFolder(make_encoder(folder / "hf", request.param, pooling="mean"), request.param)
    export_model(source, folder / "export")
    return source, load_encoder(source), folder / "export"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    source = ModelFolder(make_encoder(folder / "hf", "bert"), "bert")
    export_model(source, folder / "export")
    return source, load_encoder(source), folder / "export"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("positions", ["f3+l3", "all", "all-f1", "f3+l3-f1-l1"])
def test_probabilities_of_a_ragged_batch_are_pytorchs(encoder, tmp_path, pooling, positions):
    source, model, folder = encoder
    adapter = random_classifier(model, tmp_path / "task.safetensors", pooling=pooling, positions=positions)
    expected = torch_probabilities(source, model, adapter, TEXTS)
    runner = SteeredEncoder(folder, "cpu")
    name = runner.load_adapter(tmp_path / "task.safetensors")
    found = runner.classify(TEXTS, name)
    for answer, row in zip(found, expected, strict=True):
        assert list(answer.probabilities) == ["no", "yes", "?"]
        assert np.abs(np.array(list(answer.probabilities.values())) - row).max() <= TOLERANCE
        assert answer.label == ("no", "yes", "?")[int(row.argmax())]
    unedited = runner.classify(TEXTS, name, factor=0)
    assert (
        max(
            abs(a.probabilities["yes"] - b.probabilities["yes"]) for a, b in zip(found, unedited, strict=True)
        )
        > TOLERANCE
    )


@pytest.mark.parametrize("intervention", [kind for kind in INTERVENTIONS if kind != "red"])
def test_every_intervention_at_every_port(bert, intervention):
    source, model, folder = bert
    adapter = random_classifier(model, intervention=intervention)
    row = load_text_tokens(source)(TEXTS[2])
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected = torch_hidden_states(model, row)
    session = EncoderSession(folder / "model.onnx", "cpu")
    manifest = load_manifest(folder)
    (found,) = session.hidden_states([row], port_inputs(fold(adapter), manifest, np.dtype(np.float32)))
    assert np.abs(found - expected).max() <= TOLERANCE
    assert np.abs(expected - torch_hidden_states(model, row)).max() > 0.1


def test_further_kinds_of_ports_are_checked_and_classify(bert, tmp_path):
    source, model, _ = bert
    manifest = export_model(source, tmp_path / "export", port_kinds=PORT_KINDS)
    assert manifest.verification["rank0_bitwise"]
    runner = SteeredEncoder(tmp_path / "export", "cpu")
    row = load_text_tokens(source)(TEXTS[2])
    session = EncoderSession(tmp_path / "export/model.onnx", "cpu")
    for fields in ({"intervention": "red"}, {"intervention": "nodireft", "act_fn": "silu"}):
        adapter = random_classifier(model, **fields)
        with steered(model, (Interventions.from_adapter(adapter), 1.0)):
            expected = torch_hidden_states(model, row)
        ports = port_inputs(fold(adapter), manifest, np.dtype(np.float32))
        assert np.abs(session.hidden_states([row], ports)[0] - expected).max() <= TOLERANCE
        assert np.abs(session.hidden_states([row], {})[0] - expected).max() > 0.01
        save_adapter(adapter, tmp_path / "a.safetensors")
        assert runner.classify([TEXTS[2]], runner.load_adapter(tmp_path / "a.safetensors"))


def test_the_export_checked_itself(encoder):
    manifest = load_manifest(encoder[2])
    figures = manifest.verification
    assert manifest.kind == "encoder"
    assert manifest.layers == tuple(range(LAYERS))
    assert figures["rank0_bitwise"] is True
    assert max(figures["base_error"], figures["steered_error"], figures["batch_error"]) <= TOLERANCE
    assert figures["effect"] > 0.1


def test_a_port_in_the_wrong_place_fails_the_check(bert, tmp_path, monkeypatch):
    from reft_edge.export import encoder as module

    found = module.block_sites

    def shifted(graph, blocks, layers):
        sites = found(graph, blocks, layers)
        return [replace(site, place=Place((site.place.layer + 1) % LAYERS)) for site in sites]

    monkeypatch.setattr(module, "block_sites", shifted)
    with pytest.raises(ReftEdgeError, match="hidden states differ from PyTorch's"):
        export_model(bert[0], tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_ports_only_where_asked_and_fp32_only(bert, tmp_path):
    manifest = export_model(bert[0], tmp_path / "export", layers="1")
    assert [name for name in manifest.ports if name.startswith("reft.layers.")] == [
        f"reft.layers.1.{part}" for part in ("A", "b", "B", "columns")
    ]
    random_classifier(bert[1], tmp_path / "task.safetensors")
    with pytest.raises(ReftEdgeError, match=r"layers 0, 2, which have no port"):
        SteeredEncoder(tmp_path / "export", "cpu").load_adapter(tmp_path / "task.safetensors")
    with pytest.raises(ReftEdgeError, match="fp32 only, not int4"):
        export_model(bert[0], tmp_path / "other", "int4")


def test_train_export_and_run_from_the_command_line(encoder, tmp_path):
    source, _, folder = encoder
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    output = tmp_path / "task.safetensors"
    where = [str(source.path), str(rows), "-o", str(output), "--eval", str(rows), "--json"]
    how = ["--task", "classification", "--max-steps", "60", "--lr", "1e-2", "--dtype", "fp32"]
    done = CliRunner().invoke(app, ["train", *where, *how])
    assert done.exit_code == 0, done.output
    adapter = load_adapter(output)
    assert json.loads(done.stdout)["accuracy"] == 1
    assert adapter.config.training["evaluation_accuracy"] == 1
    assert (adapter.config.labels, adapter.config.pooling) == (("bad", "good"), "mean")

    arguments = ["run", str(folder), "-", "--adapter", str(output), "--json"]
    done = CliRunner().invoke(app, arguments, input="lazy dog\n\nThe quick brown fox\n")
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["bad", "good"]
    pair = ["run", str(folder), ROWS[2]["text"], "--text2", ROWS[2]["text2"], "--adapter", str(output)]
    done = CliRunner().invoke(app, pair)
    assert done.stdout.startswith("bad\tbad ")


def test_a_resumed_training_ends_at_the_same_adapter(bert, tmp_path):
    source, model, _ = bert
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    data = load_labelled(rows, load_text_tokens(source))
    settings = TrainSettings(max_steps=6, batch_size=2, dtype="fp32", prompt_format="raw", pooling="cls")
    train(model, "bert", data, tmp_path / "whole.safetensors", settings)

    def interrupt(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, "bert", data, tmp_path / "cut.safetensors", settings, on_step=interrupt)
    train(model, "bert", data, tmp_path / "cut.safetensors", settings, resume=True)
    whole, cut = (load_adapter(tmp_path / f"{name}.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(tensor, cut.tensors[name])


def test_long_texts_are_cut_to_the_context(bert, tmp_path):
    source, model, folder = bert
    tokens = load_text_tokens(source)("ice melts " * 2000)
    assert len(tokens.ids) == load_manifest(folder).context_length == 256
    random_classifier(model, tmp_path / "task.safetensors")
    runner = SteeredEncoder(folder, "cpu")
    runner.load_adapter(tmp_path / "task.safetensors")
    assert len(runner.classify(["ice melts " * 2000], "task")) == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_texts_cannot_be_cut_to_nothing(bert, limit):
    with pytest.raises(ReftEdgeError, match=f"cut to {limit} tokens; expected 1 or more"):
        load_text_tokens(bert[0], limit)


def test_default_pooling_follows_sentence_transformers(encoder, bert):
    assert default_pooling(encoder[0]) == "mean"
    assert default_pooling(bert[0]) == "cls"


@pytest.mark.parametrize("option", [["--max-tokens", "5"], ["--stop", "x"], ["--chat"], ["--stats"]])
def test_options_for_generation_are_refused(bert, option):
    result = CliRunner().invoke(app, ["run", str(bert[2]), "A", *option])
    assert result.exit_code == 1
    assert "is for models that continue text; this folder holds an encoder" in result.stderr


def test_what_does_not_fit_is_refused(bert, device_folder, tmp_path):
    _, model, folder = bert
    headless, task = tmp_path / "headless.safetensors", tmp_path / "task.safetensors"
    random_classifier(model, headless, labels=())
    adapter = random_classifier(model, task)
    runner = SteeredEncoder(folder, "cpu")
    with pytest.raises(ReftEdgeError, match="has no classification head; train one with"):
        runner.load_adapter(headless)
    with pytest.raises(BaseMismatchError, match="another base model"):
        runner.load_adapter(device_folder / "first.safetensors")
    with pytest.raises(ReftEdgeError, match="no adapter 'task' is loaded"):
        runner.classify(["ice"], "task")
    with pytest.raises(ReftEdgeError, match="holds the encoder bert; use SteeredEncoder"):
        SteeredModel(folder, "cpu")
    with pytest.raises(ReftEdgeError, match="holds the decoder"):
        SteeredEncoder(device_folder / "export", "cpu")
    with pytest.raises(ReftEdgeError, match="cannot carry"):
        pack_adapter(task, folder, tmp_path / "task.onnx_adapter")
    decoder = load_manifest(device_folder / "export")
    config = replace(adapter.config, base_fingerprint=decoder.base_fingerprint)
    save_adapter(Adapter(config, adapter.tensors), task)
    with pytest.raises(ReftEdgeError, match="classifies texts with a head of its own"):
        SteeredModel(device_folder / "export", "cpu").load_adapter(task)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("only",)}, "there are 1 labels; expected 2 to 1,000"),
        ({"labels": tuple(map(str, range(1001)))}, "there are 1001 labels"),
        ({"labels": ("a", "a")}, "a label is named twice"),
        ({"labels": ("a", "b\x1b[2J")}, "is not plain text"),
        ({"labels": ("a", "b" * 201)}, "is not plain text of 1 to 200"),
        ({"labels": ("a", 1)}, "expected a list of texts"),
        ({"labels": (), "pooling": "cls"}, "no labels to tell apart"),
        ({"pooling": "max"}, "pooling is 'max'; expected one of cls, mean"),
        ({"positions": "all+gen"}, "drop the part `gen`"),
    ],
)
def test_a_bad_head_is_refused(fields, message):
    good = {"positions": "all", "labels": ("a", "b"), "pooling": "cls"}
    with pytest.raises(AdapterFileError, match=message):
        AdapterConfig("loreft", "tiny", "0" * 16, 8, 2, (0,), 1, **{**good, **fields})


@pytest.mark.parametrize("missing", ["head.weight", "head.bias"])
def test_the_file_must_hold_the_head(bert, tmp_path, missing):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "task.safetensors"
    tensors = dict(random_classifier(bert[1], path).tensors)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors.pop(missing)
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=rf"missing: \['{missing}'\]"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}',
            "line 1: its shape is not known: it has the columns 'text'; expected .* text, label",
        ),
        ('{"text": "a", "label": 0.5}', "line 1: expected text under"),
        ('{"text": "a", "text2": 1, "label": "x"}', "line 1: expected text under"),
        ("[3]", "row 1: expected an object"),
        ("{", "line 1: not valid JSON"),
        ('{"text": "a", "label": "x"}', r"1 rows and the labels \['x'\]"),
        ("", "0 rows"),
    ],
)
def test_bad_rows_are_named(bert, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ReftEdgeError, match=message):
        load_labelled(path, load_text_tokens(bert[0]))


def test_a_new_label_in_the_held_out_rows_is_refused(bert, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}')
    assert load_labelled(path, load_text_tokens(bert[0])).labels == ("1", "2")
    with pytest.raises(ReftEdgeError, match="line 2: no training row has its label '2'"):
        load_labelled(path, load_text_tokens(bert[0]), ("0", "1"))


def test_tasks_and_models_must_match(bert, device_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    for model, task, message in (
        (bert[0].path, "completion", "--task classification"),
        (device_folder / "hf", "classification", "--task completion"),
        (bert[0].path, "ranking", "unknown task"),
    ):
        done = CliRunner().invoke(
            app, ["train", str(model), str(rows), "-o", str(tmp_path / "x.safetensors"), "--task", task]
        )
        assert done.exit_code == 1
        assert message in done.output


def test_missing_weights_are_refused_and_a_pooler_does_not_matter(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert[0].path, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert fingerprint(load_encoder(ModelFolder(tmp_path / "hf", "x"))) == fingerprint(bert[1])
    kept.pop("encoder.layer.1.output.dense.weight")
    save_file(kept, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(ReftEdgeError, match="lacks 1 of its weights"):
        load_encoder(ModelFolder(tmp_path / "hf", "x"))
