"""Adapters with activations and with diagonals, in a folder that has ports for them, beside linear ones."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

from reft_edge.adapter.algebra import ACTS
from reft_edge.adapter.config import AdapterConfig
from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.linear import fold
from reft_edge.cli import app
from reft_edge.convert.onnx_adapter import from_onnx_adapter, pack_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.export import export_model
from reft_edge.model.manifest import load_manifest
from reft_edge.model.places import PORT_KINDS
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.rows import SeparateRows
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.stock import stock_logits
from tests.helpers.tiny import make_model
from tests.helpers.torch_reference import logits, random_adapter

FIELDS = {
    "linear": {"intervention": "loreft", "rank": 2},
    "red": {"intervention": "red"},
    **{act: {"intervention": "nodireft", "act_fn": act, "rank": 4} for act in ACTS[1:]},
    "loreft_gelu": {"intervention": "loreft", "act_fn": "gelu", "rank": 3},
    "red_gen3": {"intervention": "red", "positions": "gen3"},
    "prompt_silu": {"intervention": "direft", "act_fn": "silu", "positions": "f3+l3"},
}
PROMPTS = ["Who are you?", "ice", "The quick brown fox jumps over the lazy dog."]
CHOICES = [None, *FIELDS, {"red": 0.5, "silu": -1.5, "linear": 0.5}, {"loreft_gelu": 0.5, "tanh": 1.0}]


@pytest.fixture(scope="module")
def folder(device_folder, tiny_model, tmp_path_factory):
    """An export with every kind of port, and adapters of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    source = ModelFolder(device_folder / "hf", "tiny-llama")
    export_model(source, folder / "export", port_kinds=PORT_KINDS)
    for seed, (name, fields) in enumerate(FIELDS.items()):
        settings = {"positions": "all+gen", **fields, "seed": seed, "strength": 4.0}
        random_adapter(tiny_model, path=folder / f"{name}.safetensors", **settings)
    return folder


@pytest.fixture(scope="module", params=["joined", "separate"])
def model(request, folder):
    model = SteeredModel(folder / "export", device="cpu")
    for name in FIELDS:
        model.load_adapter(folder / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        yield model


def test_every_row_of_a_mixed_batch_is_its_solo_run(model):
    rows = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]
    solo = [model.generate(prompt, choice, raw=False, max_tokens=10) for prompt, choice in rows]
    prompts, choices = [prompt for prompt, _ in rows], [choice for _, choice in rows]
    for size in (2, 7, len(rows)):
        assert model.generate_batch(prompts, choices, raw=False, max_tokens=10, batch_size=size) == solo
    assert len(set(solo)) > 2 * len(PROMPTS)


ON_PROMPTS = [choice for choice in CHOICES if choice not in (None, "red_gen3")]


@pytest.mark.parametrize("choice", ON_PROMPTS, ids=str)
def test_answers_are_pytorchs(model, folder, tiny_model, choice):
    ids = list(range(20, 41))
    scales = choice if isinstance(choice, dict) else {choice: 1.0}
    parts = [
        (Interventions.from_adapter(load_adapter(folder / f"{name}.safetensors")), factor)
        for name, factor in scales.items()
    ]
    with steered(tiny_model, *parts):
        expected = logits(tiny_model, ids).numpy()
    assert np.abs(model.logits([ids], choice)[0] - expected).max() <= 1e-3
    assert np.abs(expected - logits(tiny_model, ids).numpy()).max() > 0.05


def test_linear_adapters_are_the_same_bits_in_both_folders(model, device_folder):
    plain = SteeredModel(device_folder / "export", device="cpu")
    ids = [list(range(20, 41))]
    for name in ("first", "everywhere"):
        plain.load_adapter(device_folder / f"{name}.safetensors")
        model.load_adapter(device_folder / f"{name}.safetensors")
        assert np.array_equal(model.logits(ids, name)[0], plain.logits(ids, name)[0])
        model.unload_adapter(name)
    assert np.array_equal(model.logits(ids)[0], plain.logits(ids)[0])


@pytest.mark.parametrize("name", ["red", "silu", "loreft_gelu", "linear"])
def test_stock_onnxruntime_gives_the_same_logits_and_the_packed_file_comes_back(folder, tmp_path, name):
    packed = tmp_path / "task.onnx_adapter"
    pack_adapter(folder / f"{name}.safetensors", folder / "export", packed)
    model = SteeredModel(folder / "export", device="cpu")
    model.load_adapter(folder / f"{name}.safetensors")
    ids = np.random.default_rng(0).integers(2, 320, 21).tolist()
    found = stock_logits(folder / "export", packed, ids, model.manifest.head_size)
    assert np.array_equal(found, model.logits([ids], name)[0])
    if name != "loreft_gelu":
        back = from_onnx_adapter(packed, model.manifest, raw=False)
        original = load_adapter(folder / f"{name}.safetensors")
        assert (back.config.act_fn, back.config.rank) == (original.config.act_fn, original.config.rank)
        assert (back.config.intervention == "red") == (name == "red")
        assert fold(back).digest == fold(original).digest


def test_a_folder_without_such_ports_says_what_to_do(device_folder, folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    with pytest.raises(ReftEdgeError, match=r"act_fn is 'silu', for which .* --ports affine,act"):
        model.load_adapter(folder / "silu.safetensors")
    with pytest.raises(ReftEdgeError, match=r"elementwise, for which .* --ports affine,diagonal"):
        model.load_adapter(folder / "red.safetensors")
    with pytest.raises(ReftEdgeError, match="--ports affine,diagonal"):
        pack_adapter(folder / "red.safetensors", device_folder / "export", folder / "red.onnx_adapter")


@pytest.mark.parametrize("kinds", [("affine", "act"), ("affine", "diagonal")])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_other_precisions(tmp_path, kinds, precision):
    source = ModelFolder(make_model(tmp_path / "hf", hidden_size=128, intermediate_size=128), "tiny")
    manifest = export_model(source, tmp_path / "export", precision, port_kinds=kinds)
    assert manifest.port_kinds == load_manifest(tmp_path / "export").port_kinds == kinds
    assert manifest.verification["rank0_bitwise"]
    ops = {
        node.op_type for node in ir.load(tmp_path / "export/model.onnx").graph if "/reft." in str(node.name)
    }
    assert ("Gelu" in ops) == ("act" in kinds)


def test_training_finds_a_diagonal_that_explains_the_data():
    """RED can learn what it is: from no edit to h' = 1.5 h + 1 in one place."""
    config = AdapterConfig("red", "base", "0" * 16, 8, 1, (0,), 1, "all")
    module = Interventions(config)
    assert not any(tensor.any() for tensor in module.tensors().values())
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    h = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(300):
        optimiser.zero_grad()
        loss = ((h + module.weights().delta(h, 0, 0, module.act) - (1.5 * h + 1)) ** 2).mean()
        loss.backward()
        optimiser.step()
    adapter = module.to_adapter()
    np.testing.assert_allclose(adapter.tensors["s"], 0.5, atol=1e-2)
    np.testing.assert_allclose(adapter.tensors["v"], 1, atol=1e-2)


def test_the_command_line_trains_exports_and_runs_them(tmp_path, device_folder):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who are you?", "completion": "I am well."}) + "\n")

    def done(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    hf, exported = device_folder / "hf", tmp_path / "export"
    made = json.loads(done("export", hf, "-o", exported, "--ports", "affine,act,diagonal", "--json"))
    assert made["port_kinds"] == ["affine", "act", "diagonal"]
    for name, options in {
        "red": ("--intervention", "red", "--rank", "1"),
        "silu": ("--intervention", "nodireft", "--act-fn", "silu"),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        done("train", hf, rows, "-o", path, *options, "--positions", "all+gen", "--max-steps", "2")
        done("run", exported, "Who are you?", "--adapter", path, "--max-tokens", "2")
