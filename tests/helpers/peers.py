"""Other libraries in environments of their own, and how far their logits are from ours."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.torch_reference import logits

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4


def peer(name: str, folder: Path) -> Path:
    """The Python of a peer's environment, which is made where $REFT_EDGE_PEERS has none."""
    given = os.environ.get("REFT_EDGE_PEERS")
    if given and (Path(given) / name / "bin/python").exists():
        return Path(given) / name / "bin/python"
    if name == "llama.cpp":
        pytest.skip("set REFT_EDGE_PEERS to a folder that benchmarks/runtime/environments.sh filled")
    subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
    site = next((folder / name).rglob("site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))  # its 200 MB once
    subprocess.run(
        ["sh", ROOT / "benchmarks/runtime/environments.sh", folder, name],
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    return folder / name / "bin/python"


def run(python: Path, script: str, *arguments: object) -> None:
    """A script of tests/peers with a peer's Python; it fails with what the script says."""
    command = [python, ROOT / "tests/peers" / script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def steered_logits(model, adapter, rows):
    """Of each row, `[tokens, vocabulary]`."""
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        return [logits(model, row).numpy() for row in rows]


def largest(found, expected) -> float:
    """The largest difference of any number of any row."""
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
