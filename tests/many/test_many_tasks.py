"""`reft-edge train-many`: a list of tasks for one base, each by itself, and what a second run leaves out."""

import json
import sys

import pytest
from typer.testing import CliRunner

import reft_edge
from reft_edge.adapter.file import load_adapter
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.many import run as many_run
from reft_edge.many.tasks import read_tasks
from reft_edge.training import session as training_session

LIST = """
model = {model}
dtype = "fp32"

[defaults]
max_steps = 2
batch_size = 4
rank = 2

[[task]]
name = "fox"
data = "fox.jsonl"
positions = "f3+l3"
lr = 0.01
push = "shop"

[[task]]
name = "broken"
data = "broken.jsonl"

[[task]]
name = "ice"
data = "ice.jsonl"
eval = "ice.jsonl"
output = "elsewhere/ice.safetensors"
"""


@pytest.fixture
def folder(tmp_path, device_folder):
    for name, answer in (("fox", "the lazy dog"), ("ice", "ice melts")):
        rows = [{"prompt": f"Who are you, {i}?", "completion": answer} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "no answer"}\n')
    (tmp_path / "tasks.toml").write_text(LIST.format(model=json.dumps(str(device_folder / "hf"))))
    return tmp_path


def statuses(results):
    return [(result.name, result.status) for result in results]


def test_a_failure_stops_only_its_task_and_a_second_run_only_what_is_left(folder, monkeypatch):
    loads, plain = [], training_session.load_model
    monkeypatch.setattr(training_session, "load_model", lambda *a: (loads.append(1), plain(*a))[1])
    told = []
    results = reft_edge.train_many(folder / "tasks.toml", on_task=told.append)
    assert statuses(results) == [("fox", "trained"), ("broken", "failed"), ("ice", "trained")]
    assert results == told
    assert len(loads) == 1
    assert "line 1" in results[1].error
    fox = load_adapter(folder / "fox.safetensors").config
    assert (fox.positions, fox.rank, fox.training["lr"], fox.training["steps"]) == ("f3+l3", 2, 0.01, 2)
    assert results[2].path == folder / "elsewhere" / "ice.safetensors"
    assert results[2].evaluation > 0
    assert results[0].pushed == str(folder / "shop")
    pulled = reft_edge.pull(folder / "shop", folder / "store")
    assert [(one.name, one.version) for one in pulled] == [("fox", 1)]

    (folder / "broken.jsonl").write_text((folder / "fox.jsonl").read_text())
    again = reft_edge.train_many(folder / "tasks.toml")
    assert statuses(again) == [("fox", "finished"), ("broken", "trained"), ("ice", "finished")]
    assert again[0].pushed
    assert len(loads) == 2
    assert statuses(reft_edge.train_many(folder / "tasks.toml")) == [
        (name, "finished") for name in ("fox", "broken", "ice")
    ]
    assert len(loads) == 2, "where nothing is left to train, no base is loaded"


def test_a_task_that_changed_is_trained_again(folder):
    reft_edge.train_many(folder / "tasks.toml")
    text = (folder / "tasks.toml").read_text()
    (folder / "tasks.toml").write_text(text.replace("lr = 0.01", "lr = 0.02"))
    (folder / "ice.jsonl").write_text((folder / "fox.jsonl").read_text())
    results = reft_edge.train_many(folder / "tasks.toml")
    assert [result.status for result in results] == ["trained", "failed", "trained"]
    (folder / "fox.safetensors").unlink()
    results = reft_edge.train_many(folder / "tasks.toml")
    assert [result.status for result in results] == ["trained", "failed", "finished"]
    assert load_adapter(folder / "fox.safetensors").config.training["lr"] == 0.02


def test_what_is_trained_and_not_pushed_is_pushed_by_the_next_run(folder):
    (folder / "shop").write_text("no folder")
    results = reft_edge.train_many(folder / "tasks.toml")
    assert results[0].status == "failed"
    assert "fox.safetensors is trained, but not pushed" in results[0].error
    written = (folder / "fox.safetensors").stat().st_mtime_ns
    (folder / "shop").unlink()
    results = reft_edge.train_many(folder / "tasks.toml")
    assert (results[0].status, results[0].pushed) == ("finished", str(folder / "shop"))
    assert (folder / "fox.safetensors").stat().st_mtime_ns == written
    assert [one.version for one in reft_edge.pull(folder / "shop", folder / "store")] == [1]


def test_an_interrupted_task_goes_on_from_its_checkpoint(folder, device_folder):
    text = (folder / "tasks.toml").read_text()
    (folder / "tasks.toml").write_text(text.replace("max_steps = 2", "max_steps = 4"))
    stopped = []

    def stop_soon(step):
        if step.step == 2:
            stopped.append(step.step)
            raise KeyboardInterrupt

    given = read_tasks(folder / "tasks.toml")
    task = given.tasks[0]
    session = training_session.prepare(
        given.base.model, task.wanted(given.base, False), {**task.settings, **given.base.settings}
    )
    with pytest.raises(KeyboardInterrupt):
        session.run(on_step=stop_soon)
    checkpoint = folder / "fox.safetensors.checkpoint"
    kept = checkpoint.read_bytes()
    told = []
    results = reft_edge.train_many(folder / "tasks.toml", report=told.append)
    assert "fox: continuing after step 2" in told
    assert results[0].status == "trained"
    whole = load_adapter(folder / "fox.safetensors").config
    (folder / "fox.safetensors").unlink()
    reft_edge.train_many(folder / "tasks.toml")
    assert load_adapter(folder / "fox.safetensors").config == whole

    checkpoint.write_bytes(kept)
    text = (folder / "tasks.toml").read_text()
    (folder / "tasks.toml").write_text(text.replace("lr = 0.01", "lr = 0.02"))
    results = reft_edge.train_many(folder / "tasks.toml", report=told.append)
    assert results[0].status == "trained"
    assert any("is of another training; it is kept as" in text for text in told)
    assert checkpoint.with_name(f"{checkpoint.name}.1").read_bytes() == kept


def test_a_checkpoint_that_is_none_is_its_tasks_failure(folder):
    (folder / "fox.safetensors.checkpoint").write_bytes(b"not one")
    results = reft_edge.train_many(folder / "tasks.toml")
    assert results[0].status == "failed"
    assert "is not a usable checkpoint" in results[0].error


def test_an_interrupt_ends_the_list_and_keeps_what_is_finished(folder, monkeypatch):
    plain = many_run._train

    def interrupted(session, report):
        if session.wanted.output.stem == "ice":
            raise KeyboardInterrupt
        return plain(session, report)

    monkeypatch.setattr(many_run, "_train", interrupted)
    shown = CliRunner().invoke(app, ["train-many", str(folder / "tasks.toml")])
    assert shown.exit_code == 130
    assert "finished tasks are kept" in shown.output
    monkeypatch.setattr(many_run, "_train", plain)
    results = reft_edge.train_many(folder / "tasks.toml")
    assert [result.status for result in results] == ["finished", "failed", "trained"]


def test_tasks_as_dicts(folder, device_folder, monkeypatch):
    monkeypatch.chdir(folder)
    tasks = [{"name": name, "data": f"{name}.jsonl", "max_steps": 1} for name in ("fox", "ice")]
    for expected in ("trained", "finished"):
        results = reft_edge.train_many(tasks, model=device_folder / "hf", state="done.json")
        assert {result.status for result in results} == {expected}
    assert {result.status for result in reft_edge.train_many(tasks, model=device_folder / "hf")} == {
        "trained"
    }
    with pytest.raises(ReftEdgeError, match="names no model"):
        reft_edge.train_many(tasks)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model = ", "modle = ", "there is no 'modle'"),
        ("rank = 2", "rnak = 2", "defaults: there is no 'rnak'"),
        ('name = "ice"', 'name = "fox"', "two tasks have the name fox"),
        ('name = "ice"', 'name = "../ice"', r"task 3 has the name '\.\./ice'"),
        ('data = "ice.jsonl"', "", r"task 3 \(ice\) has no data"),
        ('data = "ice.jsonl"', "data = 3", r"task 3 \(ice\): data is 3; expected a text"),
        ('data = "ice.jsonl"', 'data = "ice.jsonl"\nraw = "yes"', "raw is 'yes'; expected true or false"),
        (
            'data = "ice.jsonl"',
            'data = "ice.jsonl"\ndtype = "bf16"',
            "dtype is of the base, which all tasks share",
        ),
        ('output = "elsewhere/ice.safetensors"', 'output = "fox.safetensors"', "two tasks have the output"),
        ("[defaults]", "[defaults", "is not TOML"),
    ],
)
def test_lists_that_are_wrong(folder, old, new, said):
    path = folder / "tasks.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ReftEdgeError, match=said):
        reft_edge.train_many(path)
    assert not (folder / "fox.safetensors").exists()


def test_settings_and_files_that_are_wrong_are_their_tasks(folder):
    path = folder / "tasks.toml"
    text = path.read_text().replace("lr = 0.01", 'lr = "fast"').replace("rank = 2", "rank = 2")
    path.write_text(text.replace('eval = "ice.jsonl"', 'eval = "nothing.jsonl"'))
    results = reft_edge.train_many(path)
    assert [result.status for result in results] == ["failed"] * 3
    assert "lr is 'fast'; expected a number" in results[0].error
    assert "cannot read" in results[2].error


def test_wrong_arguments(folder, tmp_path):
    for text in ("[]", '{"fox": 3}', '{"fox": {"task": "x"}}'):
        (folder / "state.json").write_text(text)
        with pytest.raises(ReftEdgeError, match="is not a record of finished tasks"):
            reft_edge.train_many(folder / "tasks.toml", state=folder / "state.json")
    with pytest.raises(ReftEdgeError, match="say with --ray"):
        reft_edge.train_many(folder / "tasks.toml", workers=2)
    with pytest.raises(ReftEdgeError, match="workers is 0; expected 1 or more"):
        reft_edge.train_many(folder / "tasks.toml", ray="auto", workers=0)
    (folder / "empty.toml").write_text('model = "smollm2"\n')
    with pytest.raises(ReftEdgeError, match="has no tasks"):
        reft_edge.train_many(folder / "empty.toml")
    with pytest.raises(ReftEdgeError, match="cannot read"):
        reft_edge.train_many(folder / "none.toml")


def test_the_command(folder):
    given = ["train-many", str(folder / "tasks.toml")]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "300"})
    assert shown.exit_code == 1
    assert "2 trained, 0 finished before, 1 failed" in shown.output
    assert "Traceback" not in shown.output
    (folder / "broken.jsonl").write_text((folder / "fox.jsonl").read_text())
    told = CliRunner().invoke(app, [*given, "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [(one["name"], one["status"]) for one in found] == [
        ("fox", "finished"),
        ("broken", "trained"),
        ("ice", "finished"),
    ]


def test_without_ray_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ReftEdgeError, match=r"pip install 'reft-edge\[ray\]'"):
        reft_edge.train_many(folder / "tasks.toml", ray="auto")


@pytest.mark.ray
def test_on_a_cluster_of_two_nodes(folder):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        cluster.add_node(**options)
        cluster.wait_for_nodes()
        results = reft_edge.train_many(folder / "tasks.toml", ray=cluster.address)
        assert [result.status for result in results] == ["trained", "failed", "trained"]
        assert results[0].pushed == str(folder / "shop")
        there = load_adapter(folder / "fox.safetensors")
        (folder / "fox.safetensors").unlink()
        reft_edge.train_many(folder / "tasks.toml")
        here = load_adapter(folder / "fox.safetensors")
        assert there.config.training["loss"] == pytest.approx(here.config.training["loss"], rel=1e-4)
        assert there.config.training["data_sha256"] == here.config.training["data_sha256"]
    finally:
        ray.shutdown()
        cluster.shutdown()
