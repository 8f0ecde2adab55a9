"""The losses of a training in trackers: TensorBoard's files are written and read back by TensorBoard itself."""

import json
import math

import pytest
from typer.testing import CliRunner

import reft_edge
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.training.trackers import trackers
from tests.training.test_distributed import launch

ROWS = [{"prompt": f"Who are you, {name}?", "completion": f"I am {name}, arr!"} for name in "ABCD"]


def written(folder):
    """Every scalar's steps and values in the one run below a folder, and the texts of its description."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (run,) = folder.iterdir()
    events = event_accumulator.EventAccumulator(str(run))
    events.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    (described,) = run.glob("*/hparams.yml")
    return scalars, described.read_text()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def train(device_folder, rows, *options):
    arguments = ["train", device_folder / "hf", rows, "-o", rows.parent / "a.safetensors", *options]
    return CliRunner().invoke(app, [*map(str, arguments), "--max-steps", "4", "--dtype", "fp32"])


def test_tensorboard_has_every_step_and_the_settings(device_folder, rows):
    log = rows.parent / "log.jsonl"
    options = ["--report-to", "tensorboard", "--eval", rows, "--eval-every", "2", "--rank", "2"]
    done = train(device_folder, rows, *options, "--loss-log", log)
    assert done.exit_code == 0, done.output
    assert "tensorboard writes to" in done.output
    scalars, described = written(rows.parent / "runs")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for tag, name in (
        ("train/loss", "loss"),
        ("train/learning_rate", "lr"),
        ("eval/loss", "evaluation_loss"),
    ):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines if name in line]
        assert scalars[tag] == expected, tag
    assert [step for step, _ in scalars["eval/loss"]] == [2, 4]
    assert "rank: 2" in described
    assert "positions: f7+l7" in described


def test_the_api_and_the_environment_choose_trackers(device_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    texts = [{"text": "Good.", "label": "yes"}, {"text": "Bad.", "label": "no"}]
    reft_edge.train(
        device_folder / "encoder-hf",
        texts,
        tmp_path / "a.safetensors",
        evaluation=texts,
        positions="f1",
        max_steps=2,
        report_to=["none", "tensorboard, tensorboard"],
    )
    scalars, _ = written(tmp_path / "elsewhere")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2]
    ((step, accuracy),) = scalars["eval/accuracy"]
    assert step == 2
    assert 0 <= accuracy <= 1
    assert not (tmp_path / "runs").exists()


def test_none_is_none(tmp_path):
    assert trackers((), tmp_path / "a", print) is None
    assert trackers(("none",), tmp_path / "a", print) is None


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        (
            "wandb",
            True,
            "--report-to wandb needs a package that is not installed; install it with: pip install wandb",
        ),
        ("comet_ml", True, "pip install comet-ml"),
        (
            "tensorbord",
            False,
            "there is no tracker 'tensorbord'; expected none, or some of .*tensorboard.*wandb",
        ),
        ("", False, "there is no tracker ''"),
    ],
)
def test_what_cannot_be_tracked_is_named_before_a_model_is_loaded(rows, monkeypatch, name, missing, message):
    if missing:
        monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ReftEdgeError, match=message):
        reft_edge.train(rows.parent / "no model", rows, rows.parent / "a.safetensors", report_to=name)
    assert not list(rows.parent.glob("a.safetensors*"))


def test_a_tracker_that_cannot_start_or_breaks_off(device_folder, rows, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    (rows.parent / "runs").write_text("a file")
    done = train(device_folder, rows, "--report-to", "tensorboard")
    assert done.exit_code == 1
    assert "cannot start tensorboard" in done.output
    assert "leave it out of --report-to" in done.output
    (rows.parent / "runs").unlink()

    def log(tracker, values, step=None):
        raise OSError("no room")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    done = train(device_folder, rows, "--report-to", "tensorboard")
    assert done.exit_code == 0, done.output
    assert done.output.count("tensorboard gets no more of this training: no room. The training goes on") == 1
    assert (rows.parent / "a.safetensors").is_file()


def test_of_several_processes_one_writes_the_log_and_the_tracker(device_folder, rows):
    log = rows.parent / "log.jsonl"
    options = ["--report-to", "tensorboard", "--loss-log", log, "--max-steps", "3", "--device", "cpu"]
    arguments = ["-m", "reft_edge", "train", device_folder / "hf", rows, "-o", rows.parent / "a.safetensors"]
    launch(2, *arguments, *options)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    scalars, _ = written(rows.parent / "runs")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3]
    assert all(math.isfinite(loss) for _, loss in scalars["train/loss"])
