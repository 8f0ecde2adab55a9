"""Training equals pyreft's, run in an environment of its own (a few minutes to make)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ["torch==2.13.0", "transformers==4.45.1", "accelerate", "datasets", "evaluate", "scikit-learn"]


@pytest.fixture(scope="module")
def pyreft(tmp_path_factory) -> Path:
    """$REFT_EDGE_PYREFT, or an environment made as benchmarks/runtime/environments.sh makes it."""
    if given := os.environ.get("REFT_EDGE_PYREFT"):
        return Path(given)
    folder = tmp_path_factory.mktemp("pyreft")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/pip"), "install", "-q"]
    subprocess.run([*pip, *VERSIONS], check=True)
    subprocess.run([*pip, "--no-deps", "pyreft==0.1.0", "pyvene==0.1.8"], check=True)
    return folder


@pytest.mark.peers
def test_loss_curves_equal_pyrefts(pyreft, device_folder):
    """LoReFT and DiReFT, tied and untied, 50 steps, prompts shorter than the 14 edited tokens: within 1e-3, or it exits with 1."""
    script = ROOT / "benchmarks/training/exactness.py"
    command = [sys.executable, str(script), str(pyreft), "--model", str(device_folder / "hf")]
    options = ["--batch-size", "4", "--rank", "3", "--lr", "0.01", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 4, done.stderr
