"""`reft-edge export --exporter optimum`: a stand-in for Optimum where it is not installed, and Optimum itself where it is."""

import json
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import transformers
from typer.testing import CliRunner

import reft_edge
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.export import optimum
from reft_edge.export.optimum import export_with_optimum
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import load_manifest
from reft_edge.model.pretrained import rotary_for_4
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.torch_reference import logits, random_adapter

ROW = [5, 80, 33, 120, 7, 61, 19, 200, 44, 3, 99, 150, 12, 77, 23, 8]


class StandIn:
    """In place of `main_export`: what torch.onnx made, a graph of the same form."""

    def __init__(self, graph: Path) -> None:
        self.graph = graph
        self.fault: Exception | None = None
        self.config: dict = {}

    def __call__(self, model: str, output: str, **options: object) -> None:
        assert (options["task"], options["trust_remote_code"]) == ("text-generation-with-past", False)
        self.config = json.loads((Path(model) / "config.json").read_text())
        if self.fault:
            (Path(output)).mkdir()
            (Path(output) / "model.onnx").write_bytes(b"half")
            raise self.fault
        load_model(ModelFolder(Path(model), "tiny"))
        shutil.copytree(self.graph, output)


@pytest.fixture
def stand_in(monkeypatch, torch_onnx_folder):
    found = StandIn(torch_onnx_folder)
    names = ("optimum", "optimum.exporters", "optimum.exporters.onnx", "optimum.utils")
    modules = {name: ModuleType(name) for name in names}
    modules["optimum.exporters.onnx"].main_export = found
    modules["optimum.utils"].logging = type(
        "Logging", (), {"set_verbosity_error": staticmethod(lambda: None)}
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        optimum, "version", lambda name: {"optimum-onnx": "0.1.0", "transformers": "4.57.6"}[name]
    )
    monkeypatch.setattr(optimum, "transformers_4", lambda: True)
    return found


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "300"})


def test_export_and_ports_in_one_step(stand_in, device_folder, tmp_path):
    done = run(device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "out", "--layers", "0;2")
    assert done.exit_code == 0, done.output
    assert "ports at 2 layers; verified:" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stand_in.config["rope_theta"] == 10000.0  # transformers 4 looks for it there
    assert load_manifest(tmp_path / "out").base_name == "hf"
    model = SteeredModel(tmp_path / "out", "cpu")
    answer = model.stream("Who are you?", max_tokens=24)
    answer.text()
    assert answer.tokens == json.loads((device_folder / "expected.json").read_text())["base"]


def test_the_api_has_it_too(stand_in, device_folder, tmp_path):
    manifest = reft_edge.export(device_folder / "hf", tmp_path / "e", exporter="optimum", layers=[0, 2])
    assert list(manifest.layers) == [0, 2]
    assert SteeredModel(tmp_path / "e", device="cpu").manifest == manifest
    for choice in ({"precision": "int4"}, {"components": "mlp"}, {"context": 64}, {"block_size": 64}):
        with pytest.raises(reft_edge.ReftEdgeError, match="only layers goes with it"):
            reft_edge.export(device_folder / "hf", tmp_path / "e", exporter="optimum", **choice)
    with pytest.raises(
        reft_edge.ReftEdgeError, match="unknown exporter 'onnx'; choose one of genai, optimum"
    ):
        reft_edge.export(device_folder / "hf", tmp_path / "e", exporter="onnx")


def test_json(stand_in, device_folder, tmp_path):
    done = run(device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "out", "--json")
    found = json.loads(done.stdout)
    assert (found["precision"], found["layers"], len(found["blocks"])) == ("fp32", [0, 1, 2], 3)
    assert found["verification"]["rank0_bitwise"] is True


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--precision", "int4"], "--precision: not for --exporter optimum"),
        (["--algorithm", "rtn", "--block-size", "64"], "--algorithm, --block-size: not for"),
        (["--device", "cuda"], "--device: not for"),
        (["--components", "block,mlp"], "--components: not for"),
        (["--accuracy-level", "1"], "--accuracy-level: not for"),
        (["--report"], "--report: not for"),
    ],
)
def test_what_does_not_go_is_refused_by_name(stand_in, device_folder, tmp_path, options, refused):
    done = run(device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "out", *options)
    assert done.exit_code == 1
    assert refused in done.output
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(stand_in, device_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("text")
    for arguments, because in (
        ((device_folder / "hf", "--exporter", "olive", "-o", tmp_path / "out"), "unknown exporter 'olive'"),
        ((device_folder / "hf", "--exporter", "optimum"), "give the folder to write with -o DIR"),
        ((device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "mine"), "is not empty"),
        ((device_folder / "encoder-hf", "--exporter", "optimum", "-o", tmp_path / "out"), "is an encoder"),
        ((tmp_path / "none", "--exporter", "optimum", "-o", tmp_path / "out"), "there is no model at"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1
        assert because in done.output
        assert stand_in.config == {}, "nothing was exported before"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("fault", [ValueError("mamba is not supported yet"), RuntimeError()])
def test_what_optimum_says_is_told_and_its_folder_removed(stand_in, device_folder, tmp_path, fault):
    stand_in.fault = fault
    done = run(device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert f"Optimum could not export hf: {fault or 'RuntimeError'}" in done.output
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(stand_in, device_folder, tmp_path):
    stand_in.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        export_with_optimum(ModelFolder(device_folder / "hf", "tiny"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_optimum_names_what_installs_it(device_folder, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(optimum, "version", missing)
    done = run(device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "needs the package 'optimum-onnx'" in done.output
    assert "pip install 'reft-edge[optimum]'" in done.output


def test_a_newer_transformers_is_named(stand_in, device_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(optimum, "transformers_4", lambda: False)
    with pytest.raises(
        ReftEdgeError, match=r"needs transformers below 4.58, and this environment has 4.57.6"
    ):
        export_with_optimum(ModelFolder(device_folder / "hf", "tiny"), tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"rope_theta": 5e5}, {}),
        ({"model_type": "gpt2"}, {}),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, {}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        (
            {"model_type": "gemma3", "text_config": {"a": 1, "rope_parameters": {"rope_theta": 5e5}}},
            {"text_config": {"a": 1, "rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5}},
        ),
    ],
)
def test_what_transformers_4_is_told_of_rotary_settings(config, told):
    assert rotary_for_4(config, "m") == told


def test_rotary_settings_that_transformers_4_cannot_hold():
    kinds = {"full_attention": {"rope_theta": 1e6}, "chunked_attention": {"rope_theta": 1e4}}
    with pytest.raises(
        ReftEdgeError, match=r"m has rotary settings for each kind of layer .* install transformers 5"
    ):
        rotary_for_4({"rope_parameters": kinds}, "m")


with_optimum = pytest.mark.skipif(
    not (find_spec("optimum") and transformers.__version__ < "5" and "REFT_EDGE_TEST_FOLDER" in os.environ),
    reason="needs an environment with reft-edge[optimum], and REFT_EDGE_TEST_FOLDER with what tests/helpers/tiny.py wrote",
)


@pytest.mark.real
@with_optimum
def test_optimum_itself(device_folder, tmp_path):
    """The answers are those of PyTorch with transformers 5, for which the adapters were made."""
    done = run(device_folder / "hf", "--exporter", "optimum", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    blocks = json.loads(done.stdout)["blocks"]
    assert [block["node"] for block in blocks] == [f"Add /model/layers.{i}/Add_1" for i in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = SteeredModel(tmp_path / "out", "cpu")
    expected = json.loads((device_folder / "expected.json").read_text())
    for name in ("base", "first", "everywhere"):
        chosen = None if name == "base" else model.load_adapter(device_folder / f"{name}.safetensors")
        answer = model.stream("Who are you?", chosen, max_tokens=24)
        answer.text()
        assert answer.tokens == expected[name]


@pytest.mark.real
@with_optimum
def test_optimum_sees_the_rotary_base_of_transformers_5(device_folder, tmp_path):
    """The same model in both layouts of config.json gives the same logits, and they differ from the default base's."""
    config = json.loads((device_folder / "hf/config.json").read_text())
    for name, change in (
        ("of-5", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("of-4", {"rope_parameters": None, "rope_theta": 500.0}),
    ):
        shutil.copytree(device_folder / "hf", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    export_with_optimum(ModelFolder(tmp_path / "of-5", "tiny"), tmp_path / "out")
    model = load_model(ModelFolder(tmp_path / "of-4", "tiny"))
    adapter = random_adapter(model, positions="f3+l3", path=tmp_path / "a.safetensors")
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected = logits(model, ROW).numpy()
    runtime = SteeredModel(tmp_path / "out", "cpu")
    runtime.load_adapter(tmp_path / "a.safetensors", "a")
    assert np.abs(runtime.logits([ROW], "a")[0] - expected).max() <= 1e-3
    default = load_model(ModelFolder(device_folder / "hf", "tiny"))
    assert np.abs(logits(default, ROW).numpy() - logits(model, ROW).numpy()).max() > 0.1
