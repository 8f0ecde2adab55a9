"""`export --report`: what each precision costs and gives."""

import json

import pytest
from typer.testing import CliRunner

from reft_edge.cli import app
from tests.helpers.tiny import make_model


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "hf"
    return make_model(folder, hidden_size=128, intermediate_size=256, max_position_embeddings=128)


def test_every_precision_is_measured(wide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", str(wide), "--report", "--json"])
    assert result.exit_code == 0, result.output
    choices = {choice.pop("name"): choice for choice in json.loads(result.stdout)}
    assert list(choices) == [
        "fp32",
        "fp16",
        "int8 rtn",
        "int8 k_quant",
        "int4 rtn",
        "int4 k_quant",
        "int4 k_quant_mixed",
    ]
    assert choices["fp32"]["agreement"] == choices["fp32"]["steered_agreement"] == 1
    assert choices["int4 rtn"]["agreement"] < choices["fp16"]["agreement"]
    assert choices["int4 k_quant"]["size"] < choices["int8 k_quant"]["size"] < choices["fp32"]["size"]
    for choice in choices.values():
        assert choice["perplexity"] > 1
        assert choice["decode"] > 0 < choice["steered_decode"]
    assert list(tmp_path.iterdir()) == []


def test_the_table(wide, monkeypatch):
    monkeypatch.setattr("reft_edge.export.report._ways", lambda model, device: iter([("fp32", "fp32", None)]))
    result = CliRunner().invoke(app, ["export", str(wide), "--report"])
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "100.0%" in result.stdout


def test_a_report_writes_no_folder(wide, tmp_path):
    result = CliRunner().invoke(app, ["export", str(wide), "--report", "-o", str(tmp_path / "e")])
    assert (result.exit_code, "leave -o away" in result.stderr) == (1, True)
    result = CliRunner().invoke(app, ["export", str(wide)])
    assert (result.exit_code, "give the folder to write with -o DIR" in result.stderr) == (1, True)
