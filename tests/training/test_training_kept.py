"""What a training must not lose: full and read-only disks, folders that go, second trainings, signals, held-out rows."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reft_edge.adapter.file import load_adapter
from reft_edge.cli import app
from reft_edge.commands.screen import Screen
from reft_edge.commands.training_progress import StepLines, duration, working_on
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place
from reft_edge.locks import held
from reft_edge.model.loading import load_model
from reft_edge.model.source import ModelFolder
from reft_edge.training.data import Dataset
from reft_edge.training.description import held_out_curve
from reft_edge.training.interrupts import SIGNALS, interrupts
from reft_edge.training.loss_log import LossLog
from reft_edge.training.objectives import Completions
from reft_edge.training.rescue import written_elsewhere
from reft_edge.training.run import train
from reft_edge.training.settings import StepReport, TrainSettings
from reft_edge.training.steps import NothingLearntError
from reft_edge.training.turns import Example

FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES]


@pytest.fixture(autouse=True)
def heard():
    """Signals are heard, also where the tests run as a shell's background job, which ignores Ctrl-C."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def no_other_folder(monkeypatch, tmp_path_factory):
    """What finds no place is not left in the home or the working folder of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("none")
    monkeypatch.setattr(Path, "home", lambda: folder / "home")
    monkeypatch.setattr(Path, "cwd", lambda: folder / "here")


@pytest.fixture
def model(device_folder):
    return load_model(ModelFolder(device_folder / "hf", "tiny"))


@pytest.fixture
def data() -> Dataset:
    rows = [Example(tuple(range(2 + i, 12 + i)), (40 + i, 50 + i)) for i in range(8)]
    return Dataset(rows, 0, "digest")


@pytest.fixture
def spare(tmp_path_factory, monkeypatch) -> Path:
    """The system's temporary folder for the length of a test."""
    folder = tmp_path_factory.mktemp("spare")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(model, data, path, **options):
    changes = {name: options.pop(name) for name in ("seed", "lr", "positions") if name in options}
    given = {"max_steps": 6, "batch_size": 4, "positions": "f3+l3", "dtype": "fp32", "lr": 5e-3, **changes}
    return train(model, "tiny", data, path, TrainSettings(**given), **options)


def fail_writes(monkeypatch, which, code=errno.ENOSPC):
    """Let files that `which` chooses, by folder and name, get no place; returns what was refused."""
    replace, refused = os.replace, []

    def refuse(source, target):
        path = Path(target)
        if which(path.parent, path.name):
            refused.append(path.name)
            raise OSError(code, os.strerror(code))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    return refused


def same(path, other):
    for name, tensor in load_adapter(other).tensors.items():
        np.testing.assert_allclose(load_adapter(path).tensors[name], tensor, atol=1e-6)


@pytest.mark.parametrize("code", FAULTS)
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_training_goes_on(
    model, data, tmp_path, monkeypatch, code
):
    said = []
    with monkeypatch.context() as patch:
        refused = fail_writes(patch, lambda folder, name: name == "a.checkpoint", code)
        run(model, data, tmp_path / "a", save_every=2, report=said.append)
    assert len(refused) == len(said) == 3
    assert said[0].startswith("no checkpoint after step 2: cannot write")
    assert os.strerror(code) in said[0]
    run(model, data, tmp_path / "whole")
    same(tmp_path / "a", tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "whole"]


def test_the_next_checkpoint_is_tried_again(model, data, tmp_path, monkeypatch):
    def stop(step):
        if step.step == 5:
            raise KeyboardInterrupt

    said, steps = [], []
    with monkeypatch.context() as patch:
        failing = [True]
        fail_writes(patch, lambda folder, name: name == "a.checkpoint" and failing and failing.pop())
        with pytest.raises(KeyboardInterrupt):
            run(model, data, tmp_path / "a", save_every=2, report=said.append, on_step=stop)
    assert "no checkpoint after step 2" in said[0]
    assert "saved a checkpoint after step 5" in said[1]
    run(model, data, tmp_path / "a", resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [6]


@pytest.mark.parametrize("code", FAULTS)
def test_an_adapter_that_cannot_be_written_goes_elsewhere(model, data, tmp_path, monkeypatch, spare, code):
    with monkeypatch.context() as patch:
        fail_writes(patch, lambda folder, name: folder == tmp_path, code)
        with pytest.raises(ReftEdgeError, match="the trained adapter is at") as failed:
            run(model, data, tmp_path / "a")
    assert os.strerror(code) in str(failed.value)
    (kept,) = spare.glob("*/a")
    assert str(kept) in str(failed.value)
    assert not (tmp_path / "a").exists()
    run(model, data, tmp_path / "whole")
    same(kept, tmp_path / "whole")


def test_a_folder_that_goes_while_training(model, data, tmp_path, spare):
    folder, said = tmp_path / "out", []
    folder.mkdir()

    def remove(step):
        if step.step == 3:
            shutil.rmtree(folder)

    with pytest.raises(ReftEdgeError, match="the trained adapter is at"):
        run(model, data, folder / "a", save_every=2, on_step=remove, report=said.append)
    assert "no checkpoint after step 4" in said[0]
    (kept,) = spare.glob("*/a")
    assert load_adapter(kept).config.training["steps"] == 6


def test_the_checkpoint_gives_way_where_both_have_no_room(model, data, tmp_path, monkeypatch, spare):
    checkpoint = tmp_path / "a.checkpoint"
    with monkeypatch.context() as patch:
        refused = fail_writes(patch, lambda folder, _: folder == tmp_path and checkpoint.exists())
        run(model, data, tmp_path / "a")
    assert refused == ["a"]
    assert list(spare.iterdir()) == []
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert load_adapter(tmp_path / "a").config.training["steps"] == 6


def test_where_nothing_can_be_written_the_checkpoint_is_kept(model, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_writes(patch, lambda folder, name: name == "a")
        with pytest.raises(ReftEdgeError, match=r"a\.checkpoint is kept: --resume writes the adapter"):
            run(model, data, tmp_path / "a")
    steps = []
    run(model, data, tmp_path / "a", resume=True, on_step=steps.append)
    assert steps == []
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_an_interrupt_without_room_leaves_the_checkpoint_elsewhere(model, data, tmp_path, monkeypatch, spare):
    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    said, steps = [], []
    with monkeypatch.context() as patch:
        fail_writes(patch, lambda folder, name: folder == tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, tmp_path / "a", on_step=stop, report=said.append)
    (kept,) = spare.glob("*/a.checkpoint")
    assert f"The checkpoint of step 3 is at {kept}" in said[-1]
    kept.rename(tmp_path / "a.checkpoint")
    run(model, data, tmp_path / "a", resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [4, 5, 6]


def test_written_elsewhere_tries_every_folder(tmp_path, monkeypatch, spare):
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")

    def write(path):
        if path.parent.parent == spare:
            raise ReftEdgeError("full")
        path.write_text("kept")

    kept = written_elsewhere(write, "a")
    assert kept is not None
    assert kept.parent.parent == tmp_path / "home"
    assert list(spare.iterdir()) == []


@pytest.mark.parametrize("code", FAULTS)
def test_a_place_that_cannot_be_written_is_found_by_trying(tmp_path, monkeypatch, code):
    """os.access says yes to an administrator, and of a full disk."""

    def refuse(*given, **named):
        raise OSError(code, os.strerror(code))

    check_place(tmp_path / "a", room=3 << 20)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(ReftEdgeError, match=os.strerror(code)):
        check_place(tmp_path / "a")


def test_names_that_no_file_can_have(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "none" / "a", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            check_place(path)


def test_one_training_at_a_time_writes_to_an_output(model, data, tmp_path):
    seen = []

    def second(step):
        for resume in (False, True):
            with pytest.raises(ReftEdgeError, match="another training writes to") as failed:
                run(model, data, tmp_path / "a", seed=1, resume=resume)
            seen.append(str(failed.value))
        run(model, data, tmp_path / f"other{step.step}")

    run(model, data, tmp_path / "a", on_step=lambda step: step.step == 2 and second(step))
    assert len(seen) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "other2"]
    assert load_adapter(tmp_path / "a").config.training["seed"] == 0


def test_a_lock_ends_with_its_process(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from reft_edge.locks import held\n"
        "with held(Path(sys.argv[1]), 'busy'): print('held', flush=True); time.sleep(60)\n"
    )
    path = tmp_path / ".a.lock"
    holder = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ReftEdgeError, match="busy"), held(path, "busy"):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert path.exists()  # left behind, held by nobody
    with held(path, "busy") as locks:
        assert locks
        with pytest.raises(ReftEdgeError, match="busy"), held(path, "busy"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_name_was_removed_is_not_enough(tmp_path):
    """Who waited on a removed file does not hold the name."""
    path = tmp_path / "lock"
    with held(path, "busy"):
        path.unlink()
        with held(path, "busy"):
            assert path.exists()
        assert not path.exists()


def test_a_checkpoint_of_another_training_is_not_replaced(model, data, tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", seed=1, on_step=stop)
    said = []
    run(model, data, tmp_path / "a", seed=2, report=said.append)
    assert "is of another training; it is kept as" in said[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "a.checkpoint.1"]
    (tmp_path / "a.checkpoint.1").rename(tmp_path / "a.checkpoint")
    steps = []
    run(model, data, tmp_path / "a", seed=1, resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [2, 3, 4, 5, 6]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_checkpoint_put_there_meanwhile_is_not_deleted(model, data, tmp_path):
    def put(step):
        if step.step == 6:
            (tmp_path / "a.checkpoint").write_bytes(b"somebody's")

    run(model, data, tmp_path / "a", on_step=put)
    assert (tmp_path / "a.checkpoint").read_bytes() == b"somebody's"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_after_the_step(model, data, tmp_path, number):
    def send(step):
        if step.step == 3:
            os.kill(os.getpid(), number)
            time.sleep(0)  # handlers run here at the latest

    said, steps = [], []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", on_step=send, report=said.append)
    assert said == ["saved a checkpoint after step 3; --resume continues from it"]
    assert signal.getsignal(number) == before
    run(model, data, tmp_path / "a", resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [4, 5, 6]


@pytest.mark.parametrize("at", range(2 * len(SIGNALS)))
def test_a_signal_while_handlers_change_leaves_none_behind(monkeypatch, at):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    change, changed = signal.signal, []

    def signal_comes(number, handler):
        result = change(number, handler)
        changed.append(number)
        if len(changed) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(signal, "signal", signal_comes)
    with pytest.raises(KeyboardInterrupt), interrupts():
        pass
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_second_signal_stops_at_once(model, data, tmp_path):
    def send(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    said = []
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", on_step=send, report=said.append)
    assert said == ["stopped at once"]


def test_a_signal_while_held_out_rows_are_read_leaves_the_adapter(model, data, tmp_path, monkeypatch):
    def send(*given):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("reft_edge.training.steps.evaluate", send)
    said = []
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", evaluation=data, report=said.append)
    assert said[-1] == f"{tmp_path / 'a'} is written, without the held-out rows' loss"
    assert load_adapter(tmp_path / "a").config.training["evaluation_loss"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_held_out_loss_that_is_not_finite_is_told_and_null(model, data, tmp_path, monkeypatch, loss):
    monkeypatch.setattr("reft_edge.training.steps.evaluate", lambda *given: loss)
    said, shown = [], []
    result = run(
        model,
        data,
        tmp_path / "a",
        evaluation=data,
        eval_every=2,
        report=said.append,
        on_step=lambda step: shown.append(step.evaluation),
    )
    assert f"the held-out loss is {loss}; the file says null in its place" in said
    assert result.evaluation is None
    training = load_adapter(tmp_path / "a").config.training
    assert training["evaluation_loss"] is None
    assert training["evaluation_curve"] == [[2, None], [4, None]]
    assert [value is None for value in shown] == [True, False, True, False, True, True]


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), MemoryError("none left"), ReftEdgeError("x")]
)
def test_held_out_rows_that_cannot_be_read_do_not_cost_the_adapter(model, data, tmp_path, monkeypatch, error):
    def fail(*given):
        raise error

    said = []
    with monkeypatch.context() as patch:
        patch.setattr("reft_edge.training.steps.evaluate", fail)
        with pytest.raises(ReftEdgeError, match=r"could not be evaluated: .* is written, without"):
            run(model, data, tmp_path / "a", evaluation=data, eval_every=3, report=said.append)
    assert "could not be evaluated after step 3" in said[0]
    run(model, data, tmp_path / "whole")
    same(tmp_path / "a", tmp_path / "whole")
    result = run(model, data, tmp_path / "a", evaluation=data, eval_every=3, resume=True)
    assert result.evaluation is not None
    assert not (tmp_path / "a.checkpoint").exists()


def test_held_out_rows_along_the_way_change_nothing_and_are_kept(model, data, tmp_path):
    seen = {}
    result = run(
        model,
        data,
        tmp_path / "a",
        evaluation=data,
        eval_every=2,
        save_every=1,
        on_step=lambda step: step.evaluation is not None and seen.update({step.step: step.evaluation}),
    )
    assert list(seen) == [2, 4]
    kept = load_adapter(tmp_path / "a").config.training["evaluation_curve"]
    assert kept == [[2, pytest.approx(seen[2], rel=1e-4)], [4, pytest.approx(seen[4], rel=1e-4)]]
    assert seen[2] > result.evaluation
    run(model, data, tmp_path / "plain")
    same(tmp_path / "a", tmp_path / "plain")

    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "b", evaluation=data, eval_every=2, on_step=stop)
    run(model, data, tmp_path / "b", evaluation=data, eval_every=2, resume=True)
    assert load_adapter(tmp_path / "b").config.training["evaluation_curve"] == kept
    with pytest.raises(ReftEdgeError, match="eval_every needs held-out rows"):
        run(model, data, tmp_path / "c", eval_every=2)
    assert len(held_out_curve([1.0] * 100)) == 64
    assert held_out_curve([math.nan, 2.0, math.inf]) == [[2, 2.0], [3, None]]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_training_that_diverges_keeps_its_last_good_step(model, data, tmp_path, monkeypatch, where):
    def spoil(step):
        if step.step == 4 and where == "loss":
            model.model.norm.weight.data.fill_(math.inf)
        elif step.step == 4:
            clip = torch.nn.utils.clip_grad_norm_
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: clip(*given) * math.nan)

    norm = model.model.norm.weight.clone()
    with monkeypatch.context() as patch, pytest.raises(ReftEdgeError, match="at step 5; lower") as failed:
        run(model, data, tmp_path / "a", on_step=spoil)
    assert "saved a checkpoint after step 4" in str(failed.value)
    assert not (tmp_path / "a").exists()
    model.model.norm.weight.data.copy_(norm)
    run(model, data, tmp_path / "a", resume=True)
    run(model, data, tmp_path / "whole")
    same(tmp_path / "a", tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "not enough memory for step 5"),
        (MemoryError(), "not enough memory for step 5"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory for step 5"),
        (RuntimeError("the device is lost"), None),
    ],
)
def test_an_error_in_a_step_loses_no_earlier_one(model, data, tmp_path, monkeypatch, error, message):
    said, losses = [], []
    with monkeypatch.context() as patch:
        loss = Completions.loss

        def fail(*given):
            losses.append(given)
            if len(losses) == 5:
                raise error
            return loss(*given)

        patch.setattr(Completions, "loss", fail)
        with pytest.raises(ReftEdgeError if message else RuntimeError) as failed:
            run(model, data, tmp_path / "a", report=said.append)
    assert "saved a checkpoint after step 4" in (str(failed.value) if message else said[-1])
    assert message is None or message in str(failed.value)
    run(model, data, tmp_path / "a", resume=True)
    run(model, data, tmp_path / "whole")
    same(tmp_path / "a", tmp_path / "whole")


@pytest.mark.parametrize("positions", ["f7+l7", "f1", "l2"])
def test_a_training_that_edits_no_token_writes_nothing(model, tmp_path, monkeypatch, positions):
    """It is found before the first step; and whatever that overlooks, after the last."""
    data = Dataset([Example((5 + i,), (40,)) for i in range(4)], 0, "digest")
    steps = []
    with pytest.raises(ReftEdgeError, match="nothing can be learnt"):
        run(model, data, tmp_path / "a", positions=positions, on_step=steps.append)
    assert steps == []
    with monkeypatch.context() as patch:
        patch.setattr("reft_edge.training.run.check_positions", lambda *given: ())
        with pytest.raises(NothingLearntError, match="no token of any row was edited"):
            run(model, data, tmp_path / "a", positions=positions, save_every=2)
    assert list(tmp_path.iterdir()) == []
    longer = Dataset([*data.examples, Example((5, 6, 7, 8), (40,))], 0, "digest")
    run(model, longer, tmp_path / "a", positions=positions)
    assert load_adapter(tmp_path / "a").config.training["steps"] == 6


@pytest.mark.parametrize(
    "row", [Example((5, 320, 7, 8), (9,)), Example((5, 6, 7), (9, 5000, 3)), Example((5, 6), (9, 320))]
)
def test_tokens_beyond_the_embedding_are_an_error(model, tmp_path, row):
    with pytest.raises(ReftEdgeError, match=r"a row has the token (320|5000); the model has 320"):
        run(model, Dataset([row], 0, "digest"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def step_report(step, loss=1.0, evaluation=None):
    return StepReport(step, 9, loss, 0.1, 100.0, evaluation)


def test_a_loss_log_grows_with_the_training(tmp_path):
    path = tmp_path / "log.jsonl"
    log = LossLog(path, False, print)
    log(step_report(1))
    assert json.loads(path.read_text()) == {"step": 1, "loss": 1.0, "lr": 0.1, "tokens_per_second": 100.0}
    for step in range(2, 6):
        log(step_report(step, evaluation=math.nan if step == 4 else None))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed
    again = LossLog(path, True, print)
    again(step_report(5, 2.0))
    again.end(5, 1.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5]
    assert rows[3]["evaluation_loss"] is None
    assert (rows[4]["loss"], rows[5]) == (2.0, {"step": 5, "evaluation_loss": 1.5})
    LossLog(path, False, print)(step_report(1))
    assert len(path.read_text().splitlines()) == 1


def test_a_loss_log_replaces_no_other_file_and_ends_no_training(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    for content in ('{"prompt": "a", "completion": "b"}\n', "text\n", "[]\n", '{"step": "1"}\n'):
        path.write_text(content)
        with pytest.raises(ReftEdgeError, match="line 1 is not of a loss log"):
            LossLog(path, False, print)
        assert path.read_text() == content
    said = []
    log = LossLog(tmp_path / "log.jsonl", False, said.append)
    fail_writes(monkeypatch, lambda folder, name: True)
    for step in (1, 2, 3):
        log(step_report(step))
    assert len(said) == 1
    assert "No space left on device" in said[0]


@pytest.mark.parametrize("log", ["a.safetensors", "a.safetensors.checkpoint", "x/../a.safetensors"])
def test_a_loss_log_is_no_name_of_the_adapter(device_folder, tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    options = ["-o", "a.safetensors", "--loss-log", log]
    found = CliRunner().invoke(app, ["train", str(device_folder / "hf"), "rows.jsonl", *options])
    assert (found.exit_code, "would replace the adapter" in found.output) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "x"]


def test_the_command_says_what_it_does_and_heeds_signals(device_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Question {i}?", "completion": "ice"}) + "\n" for i in range(9))
    )
    output = tmp_path / "a.safetensors"
    common = ["train", str(device_folder / "hf"), str(rows), "-o", str(output), "--device", "cpu"]
    options = [*common, "--max-steps", "100000", "--batch-size", "1"]
    first = subprocess.Popen(
        [sys.executable, "-m", "reft_edge", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = next(line for line in first.stderr if line.startswith("step "))
        assert line.startswith("step 1 of 100,000  loss ")
        assert "tokens/s" in line
        assert line.rstrip().endswith("left")
        refused = CliRunner().invoke(app, [*common, "--seed", "1"])
        assert refused.exit_code == 1
        assert "another training writes to" in refused.output
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 128 + signal.SIGTERM
    assert "saved a checkpoint after step" in said
    assert "Traceback" not in said
    assert not output.exists()
    command = f"{sys.executable} -m reft_edge {' '.join(common)} --max-steps 20 2>&1 >/dev/null | head -1"
    subprocess.run(["bash", "-c", command], check=True, timeout=120)
    assert load_adapter(output).config.training["steps"] == 20  # who read its lines had gone
    for extra, message in (
        (["-o", str(rows)], "would be replaced"),
        (["--loss-log", str(rows)], "would be replaced"),
        (["--loss-log", str(output), "-o", str(tmp_path / "none" / "x")], "does not exist"),
        (["--eval-every", "2"], "--eval-every needs held-out rows"),
    ):
        failed = CliRunner().invoke(app, [*common, *extra])
        assert failed.exit_code == 1
        assert message in failed.output


def test_lines_where_there_is_no_terminal():
    """The first step, the last, every twentieth part, held-out losses, and a sign of life in a long training."""
    said, now = [], [0.0]
    lines = StepLines(said.append, lambda: now[0])
    for step in range(1, 101):
        now[0] += 1.0
        lines(StepReport(step, 100, 2.0, 0.1, 1234.5, 0.5 if step == 13 else None))
    shown = [int(line.split()[1]) for line in said]
    assert shown == [1, 6, 11, 13, *range(18, 99, 5), 100]
    assert said[0] == "step 1 of 100  loss 2.0000  1,234 tokens/s  99 s left"
    assert "held-out loss 0.5000" in said[3]
    said.clear()
    now[0] = 0.0
    slow = StepLines(said.append, lambda: now[0])
    for step in range(51, 60):  # continued, six seconds a step
        now[0] += 6.0
        slow(StepReport(step, 100_000, 2.0, 0.1, 10.0))
    assert [int(line.split()[1]) for line in said] == [51, 53, 55, 57, 59]
    assert duration(6000 * 6) == "10 h 0 min"


def test_work_that_takes_long_is_told(monkeypatch):
    monkeypatch.setattr("reft_edge.commands.training_progress.QUIET", 0.02)
    screen = Screen(stderr=True)
    said, heard = [], threading.Event()
    screen.say = lambda text: (said.append(text), heard.set())
    with working_on(screen, "reading rows"):
        assert heard.wait(10)
    assert said[0].startswith("reading rows: 0 s so far")
