"""push, pull, list and rollback as users type them, and what a running model makes of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.adapter_folder import AdapterFolder
from reft_edge.signing.keys import generate_key, load_private_key
from reft_edge.signing.signatures import sign
from tests.adapter.test_algebra import make_adapter
from tests.commands.test_cli import call
from tests.commands.test_without_extras import run as run_without
from tests.helpers.servers import Hub, StaticServer


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.safetensors"
    save_adapter(
        make_adapter("loreft", 1, training={"evaluation_accuracy": 0.875, "evaluation_loss": 0.5}), path
    )
    return path


def change(path: Path, seed: int = 2) -> None:
    save_adapter(make_adapter("loreft", seed), path)


def test_the_whole_way_through_a_web_server(task, tmp_path):
    repository, store = tmp_path / "site", tmp_path / "tasks"
    pushed = call("push", task, repository).stdout
    assert "has task version 1: 1.9 kB, sha256:" in pushed
    assert "version 1" in call("push", task, repository).stdout
    with StaticServer(repository).running() as server:
        assert call("pull", server.url, "--store", store).stdout == "task: installed version 1\n"
        listed = call("list", store).stdout.splitlines()
        assert listed[0].split()[:4] == ["NAME", "VERSION", "SIZE", "DIGEST"]
        assert "accuracy 0.8750" in listed[1]
        assert "base 0000000000000000" in listed[1]
        change(task)
        call("push", task, repository)
        assert call("list", server.url).stdout.count("task") == 2
        assert (
            "installed version 2 in place of version 1"
            in call("pull", server.url, "task", "-s", store).stdout
        )
        assert call("rollback", store, "task").stdout == "task: version 1 is installed again\n"
        assert (
            "version 1 stays: version 2 was rolled back here" in call("pull", server.url, "-s", store).stdout
        )
        found = json.loads(call("pull", server.url, "task", "--version", 2, "-s", store, "--json").stdout)
        assert [(one["status"], one["installed"], one["previous"]) for one in found] == [("installed", 2, 1)]
    rolled = json.loads(call("rollback", store, "task", "--version", 1, "--json").stdout)
    assert (rolled["version"], rolled["previous"]) == (1, 2)


def test_list_tells_everything_as_json(task, tmp_path):
    repository, store = tmp_path / "site", tmp_path / "tasks"
    generate_key(tmp_path / "fleet.key", "fleet")
    private = load_private_key(tmp_path / "fleet.key")
    released = json.loads(call("push", task, repository, "--name", "formal", "--json").stdout)
    assert [(one["name"], one["version"], one["size"]) for one in released] == [
        ("formal", 1, task.stat().st_size)
    ]
    assert json.loads(call("list", repository, "--json").stdout) == released
    call("pull", repository, "-s", store)
    sign(task, private)
    call("push", task, repository, "--name", "formal")
    call("pull", repository, "-s", store, "--require-signed", tmp_path / "fleet.pub")
    (store / "broken.safetensors").write_bytes(b"torn")
    shutil.copy(task, store / "by-hand.safetensors")
    broken, by_hand, formal = json.loads(call("list", store, "--json").stdout)
    assert "not a usable adapter" in broken["problem"]
    assert (by_hand["version"], formal["version"], formal["earlier"]) == (None, 2, [1])
    assert formal["signature"] == f"key {private.id}, not verified"
    assert (formal["accuracy"], formal["loss"], formal["base_fingerprint"]) == (0.875, 0.5, "0" * 16)
    assert formal["digest"] == by_hand["digest"]
    verified = json.loads(call("list", store, "--trusted", tmp_path / "fleet.pub", "--json").stdout)
    assert verified[2]["signature"] == "fleet"
    generate_key(tmp_path / "foreign.key", "foreign")
    text = call("list", store, "--trusted", tmp_path / "foreign.pub").stdout
    assert "refused: it is signed with the key" in text
    assert "not a usable adapter" in text


def test_mistakes_are_told_and_a_failed_adapter_fails_the_command(task, tmp_path):
    repository, store = tmp_path / "site", tmp_path / "tasks"
    for arguments, message in (
        (("pull", repository, "-s", store), "is not a repository"),
        (("list", tmp_path / "none"), "there is no folder"),
        (("push", tmp_path / "none.safetensors", repository), "cannot read"),
        (("push", task, task, repository, "--name", "x"), "--name is for one FILE"),
        (("push", task, task, repository), "same name"),
        (("push", task, repository, "--name", "../x"), "cannot be an adapter's name"),
        (("push", task, "http://example.com/"), "push to a folder"),
        (("rollback", store, "task"), "there is no folder"),
    ):
        assert message in call(*arguments, ok=False).stderr.replace("\n", " ")
    store.mkdir()
    assert "keeps no earlier version" in call("rollback", store, "task", ok=False).stderr
    task_content = task.read_bytes()
    task.write_bytes(b"torn")
    assert "not a usable adapter" in call("push", task, repository, ok=False).stderr
    task.write_bytes(task_content)
    call("push", task, repository)
    for file in repository.rglob("*.safetensors"):
        file.write_bytes(task_content[:-1] + b"x")
    failed = call("pull", repository, "-s", store, ok=False)
    assert "has another content" in failed.stderr
    assert call("list", store).stdout == f"there are no adapters in {store}\n"
    call("push", task, repository, "--name", "other")
    assert "--trusted is for a store" in call("list", repository, "--trusted", "x", ok=False).stderr.replace(
        "\n", " "
    )
    for version, message in ((1, "2 adapters have a version 1; name one"), (7, "no adapter has a version 7")):
        assert message in call("pull", repository, "--version", version, "-s", store, ok=False).stderr
    assert (
        "no version 7 of task"
        in call("pull", repository, "task", "--version", 7, "-s", store, ok=False).stderr
    )


def test_the_runtime_s_store_sees_adapters_only_and_what_pull_and_rollback_change(device_folder, tmp_path):
    repository, folder, file = tmp_path / "site", tmp_path / "tasks", tmp_path / "task.safetensors"
    model = SteeredModel(device_folder / "export", device="cpu")
    told = []
    for name in ("first", "everywhere"):
        shutil.copy(device_folder / f"{name}.safetensors", file)
        call("push", file, repository)
        call("pull", repository, "--store", folder, "--for", device_folder / "export")
        store = AdapterFolder(model, folder)
        assert store.names() == ["task"]
        store.use(["task"])
        told.append(model.generate("ice", "task", max_tokens=8))
    assert told[0] != told[1]
    call("rollback", folder, "task")
    store.use(["task"])
    assert model.generate("ice", "task", max_tokens=8) == told[0]


def test_adapters_for_other_models_are_left_out(device_folder, task, tmp_path):
    call("push", task, tmp_path / "site")
    arguments = ("pull", tmp_path / "site", "-s", tmp_path / "tasks", "--for", device_folder / "export")
    assert call(*arguments).stdout == "the repository has nothing for this store\n"
    assert "trained on another base model" in call(*arguments[:2], "task", *arguments[2:], ok=False).stderr


def test_a_device_needs_no_torch_and_a_missing_extra_is_named(task, tmp_path):
    blocked = ["torch", "transformers", "onnx", "onnxruntime", "huggingface_hub", "cryptography"]
    call("push", task, tmp_path / "site")
    change(task)
    call("push", task, tmp_path / "site")
    with StaticServer(tmp_path / "site").running() as server:
        for arguments in (
            ("pull", server.url, "--version", 1, "-s", tmp_path / "tasks"),
            ("pull", server.url, "-s", tmp_path / "tasks"),
            ("list", tmp_path / "tasks"),
            ("rollback", tmp_path / "tasks", "task"),
        ):
            done = run_without(blocked, *arguments)
            assert done.returncode == 0, done.stderr
    assert load_adapter(tmp_path / "tasks/task.safetensors").config.training["evaluation_accuracy"] == 0.875
    for missing, address in (
        ("httpx", "https://h/"),
        ("huggingface_hub", "hf://a/b"),
        ("filelock", tmp_path / "site"),
    ):
        done = run_without([missing], "pull", address, "-s", tmp_path / "tasks")
        assert done.returncode == 1
        assert "reft-edge[ship]" in done.stderr.replace("\n", "")


def test_the_hub_that_hf_endpoint_names(task, tmp_path):
    with Hub("hf_secret").running() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(tmp_path),
        }
        told = []
        for arguments in (
            ("push", task, "hf://fleet/tasks"),
            ("pull", "hf://fleet/tasks", "-s", tmp_path / "tasks"),
        ):
            command = [sys.executable, "-m", "reft_edge", *map(str, arguments)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            told.append(done.stdout)
    assert told[0].startswith("hf://fleet/tasks has task version 1")
    assert told[1] == "task: installed version 1\n"
