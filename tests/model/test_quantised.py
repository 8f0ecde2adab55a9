"""Frozen bases in 4 and 8 bits. bitsandbytes is optional: the tests that need it install it into a folder of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from reft_edge.adapter.file import load_adapter
from reft_edge.cli import app
from reft_edge.model.fingerprint import fingerprint


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"prompt": f"Question {i}?", "completion": "I am well, thank you."}) for i in range(8)
        )
    )
    return path


def arguments(model, rows, output, *options):
    return ["train", str(model), str(rows), "-o", str(output), "--positions", "f3+l3", *options]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load-in", "3bit"], "load_in is '3bit'; expected 4bit or 8bit"),
        (["--load-in", "4bit", "--base-weights", "."], "takes the place of --base-weights"),
        (["--load-in", "4bit"], "needs bitsandbytes; install it with: pip install 'reft-edge\\[bits\\]'"),
    ],
)
def test_what_cannot_be_is_refused(device_folder, rows, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("reft_edge.model.quantised.find_spec", lambda name: None)
    done = CliRunner().invoke(app, arguments(device_folder / "hf", rows, tmp_path / "a", *options))
    assert done.exit_code == 1
    assert message.replace("\\", "") in " ".join(done.output.split())
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def bitsandbytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bitsandbytes")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, "bitsandbytes>=0.46"], check=True, capture_output=True)
    return folder


def run(command, bitsandbytes):
    environment = {**os.environ, "PYTHONPATH": str(bitsandbytes), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reft_edge", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.real
@pytest.mark.parametrize(("load_in", "dtype"), [("4bit", "fp32"), ("8bit", "bf16")])
def test_an_adapter_is_trained_against_it(
    device_folder, tiny_model, rows, tmp_path, bitsandbytes, load_in, dtype
):
    """It learns, is bound to the base as it is stored, and differs from one trained on whole weights."""
    found = {}
    for name, options in (("whole", []), ("rounded", ["--load-in", load_in])):
        options += ["--max-steps", "30", "--lr", "0.02", "--dtype", dtype, "--device", "cpu", "--json"]
        done = run(arguments(device_folder / "hf", rows, tmp_path / name, *options), bitsandbytes)
        assert done.returncode == 0, done.stderr
        found[name] = load_adapter(tmp_path / name), json.loads(done.stdout)
    (whole, of_whole), (rounded, of_rounded) = found["whole"], found["rounded"]
    assert rounded.config.base_fingerprint == whole.config.base_fingerprint == fingerprint(tiny_model)
    assert rounded.config.training["load_in"] == load_in
    assert of_rounded["base_parameters"] == of_whole["base_parameters"]
    curve = rounded.config.training["curve"]
    assert curve[-1][1] < 0.95 * curve[0][1]
    assert not np.array_equal(rounded.tensors["W"], whole.tensors["W"])
