"""Two processes (gloo, CPU) train what one trains, with the base whole in each or sharded by FSDP."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reft_edge.adapter.file import load_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.training.distributed import ALONE, Processes, launch_note, launched_processes
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
ANSWERS = ["I am well.", "ice melts", "the lazy dog jumps over the quick brown fox", "thank you"]
OPTIONS = ["--dtype", "fp32", "--batch-size", "4", "--positions", "f3+l3", "--device", "cpu", "--json"]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """13 rows of unlike lengths: the last batch of an epoch has one row for two processes."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"prompt": f"Question {i}?" * (1 + i % 3), "completion": ANSWERS[i % 4]})
            for i in range(13)
        )
    )
    return path


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def launch(processes: int, *arguments, environment=None, launcher=None, check=True, folder=ROOT):
    """By the launcher, in a process of its own, or else as a launcher would start them."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    code = list(map(str, arguments))
    if launcher is None:
        done = run_ranks(processes, code, variables, folder)
    else:
        command = [sys.executable, *launcher, *code]
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=folder, timeout=240, check=False
        )
    assert not check or done.returncode == 0, done.stderr
    return done


def train(processes, device_folder, rows, output, *options, **how):
    return launch(
        processes,
        "-m",
        "reft_edge",
        "train",
        device_folder / "hf",
        rows,
        "-o",
        output,
        *OPTIONS,
        *options,
        **how,
    )


@pytest.fixture(scope="module")
def one(device_folder, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "a.safetensors"
    train(1, device_folder, rows, path, "--max-steps", "9", "--eval", rows)
    return load_adapter(path)


def assert_same(found, expected):
    """The same loss at every step, within 1e-5, and the same adapter."""
    losses, others = (np.array(adapter.config.training["curve"]) for adapter in (found, expected))
    assert len(losses) == 9
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    held, other = (adapter.config.training["evaluation_loss"] for adapter in (found, expected))
    assert held == pytest.approx(other, rel=1e-5)
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, atol=2e-4)


@pytest.mark.parametrize(
    ("environment", "launcher"), [({}, TORCHRUN), (SHARDED, None)], ids=["whole", "sharded"]
)
def test_two_processes_train_what_one_trains(device_folder, rows, tmp_path, one, environment, launcher):
    path, how = tmp_path / "two.safetensors", {"environment": environment, "launcher": launcher}
    done = train(2, device_folder, rows, path, "--max-steps", "9", "--eval", rows, **how)
    assert_same(load_adapter(path), one)
    assert len(done.stdout.strip().splitlines()) == 1  # only one of them reports
    assert done.stderr.count("2 processes train") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["two.safetensors"]


def test_accelerate_launches_it(device_folder, rows, tmp_path, one):
    path = tmp_path / "two.safetensors"
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    train(2, device_folder, rows, path, "--max-steps", "9", "--eval", rows, launcher=launcher)
    assert_same(load_adapter(path), one)


def test_a_killed_launch_goes_on_from_its_checkpoint(device_folder, rows, tmp_path, one):
    """Checkpoints are the main process's; every process starts from it, whatever their number."""
    path = tmp_path / "a.safetensors"
    killer = (
        "import os, signal, sys; from reft_edge.training import checkpoint as c; save = c.Checkpoint.save\n"
        "def kill(self, tensors, step):\n"
        "    save(self, tensors, step)\n"
        "    if step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.Checkpoint.save = kill\n"
        "from reft_edge.cli import app; app()\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(killer)
    options = ["--max-steps", "9", "--eval", rows, "--save-every", "3"]
    done = launch(2, script, "train", device_folder / "hf", rows, "-o", path, *OPTIONS, *options, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert path.with_name("a.safetensors.checkpoint").exists()
    done = train(2, device_folder, rows, path, *options, "--resume")
    assert "continuing after step 6" in done.stderr
    assert_same(load_adapter(path), one)


def test_machines_need_no_folder_in_common(device_folder, rows, tmp_path):
    """Every process in a folder of its own: the adapter is in the main one's."""
    script = tmp_path / "apart.py"
    script.write_text(
        "import os; os.makedirs(os.environ['RANK']); os.chdir(os.environ['RANK'])\n"
        "if os.environ['RANK'] == '0': os.mkdir('out')\n"
        "from reft_edge.cli import app; app()\n"
    )
    command = ["train", device_folder / "hf", rows, "-o", "out/a.safetensors", *OPTIONS, "--max-steps", "2"]
    launch(2, script, *command, environment={"PYTHONPATH": str(ROOT)}, folder=tmp_path)
    assert load_adapter(tmp_path / "0/out/a.safetensors").config.training["steps"] == 2
    assert list((tmp_path / "1").iterdir()) == []


def test_an_error_stops_all_processes_with_its_reason(device_folder, rows, tmp_path):
    path = tmp_path / "a.safetensors"
    path.with_name("a.safetensors.checkpoint").write_bytes(b"junk")
    done = train(2, device_folder, rows, path, "--max-steps", "2", "--resume", check=False)
    assert done.returncode != 0
    assert "is not a usable checkpoint" in done.stderr
    assert "ReftEdgeError" not in done.stderr


def test_a_sharded_base_is_held_once(device_folder):
    done = launch(2, "tests/helpers/sharded.py", device_folder / "hf", environment=SHARDED)
    lines = sorted(tuple(map(int, line.split())) for line in done.stdout.strip().splitlines())
    assert [(rank, count) for rank, count, _, _ in lines] == [(0, 2), (1, 2)]
    assert sum(held for _, _, held, _ in lines) == lines[0][3]
    assert max(held for _, _, held, _ in lines) < 0.6 * lines[0][3]


def test_every_row_is_in_one_share():
    rows = list(range(7))
    shares = [Processes(rank=rank, count=3).share(rows) for rank in range(3)]
    assert sorted(row for share, weight in shares for row in share) == rows
    assert all(weight == 1 for _, weight in shares)
    assert Processes(rank=2, count=3).share([5, 6]) == ([5], 0.0)
    assert ALONE.share(rows) == (rows, 1.0)
    parameter = nn.Parameter(torch.ones(2))
    assert ALONE.add_up(1.5, [parameter]) == 1.5


def test_one_device_for_several_processes_is_refused(monkeypatch):
    assert launched_processes("cuda:0") is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReftEdgeError, match="cuda:0 is one device for 2 processes"):
        launched_processes("cuda:0")


@pytest.mark.parametrize(
    ("environment", "note"),
    [
        ({}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "one process trains"),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, "one process trains"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "though several were asked for"),
    ],
)
def test_a_launch_says_how_many_train(monkeypatch, environment, note):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = launch_note(launched_processes("cpu"))
    assert said == note or note in said
    assert launch_note(Processes(count=3)) == "3 processes train"


@pytest.mark.parametrize("size", ["", "two", "-1", "1.5"])
def test_a_count_of_processes_that_is_none(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ReftEdgeError, match="WORLD_SIZE"):
        launched_processes(None)


def test_accelerate_starts_one_process_on_cpus_and_it_is_said(device_folder, rows, tmp_path):
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = train(2, device_folder, rows, tmp_path / "a.safetensors", "--max-steps", "2", launcher=launcher)
    assert "one process trains, though several were asked for" in done.stderr
    assert "step 2 of 2" in done.stderr
