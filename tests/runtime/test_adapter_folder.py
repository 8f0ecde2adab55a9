"""A folder of adapters: listed without opening, loaded on use, reloaded when replaced, forgotten over the budget."""

import contextlib
import os
import shutil
import threading
import time

import pytest

from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.adapter_folder import AdapterFolder, AdapterMemoryError, UnknownAdapterError


@pytest.fixture
def folder(device_folder, tmp_path):
    for name in ("first", "everywhere"):
        (tmp_path / f"{name}.safetensors").write_bytes((device_folder / f"{name}.safetensors").read_bytes())
    return tmp_path


@pytest.fixture
def model(device_folder):
    return SteeredModel(device_folder / "export", device="cpu")


def test_adapters_are_loaded_on_first_use_only(model, folder):
    adapters = AdapterFolder(model, folder)
    assert adapters.names() == ["everywhere", "first"]
    assert not model.adapters
    adapters.use(["first"])
    assert list(model.adapters) == adapters.loaded == ["first"]
    before = model.generate("ice", "first", max_tokens=8)
    adapters.use(["first"])
    assert model.generate("ice", "first", max_tokens=8) == before


def test_a_replaced_file_is_loaded_again_and_a_bad_one_spoils_only_its_name(model, folder):
    adapters = AdapterFolder(model, folder)
    adapters.use(["first", "everywhere"])
    running = model.stream("ice", "first", max_tokens=8)
    expected = model.generate("ice", "first", max_tokens=8)
    other = model.generate("ice", "everywhere", max_tokens=8)
    os.replace(folder / "everywhere.safetensors", folder / "first.safetensors")
    adapters.use(["first"])
    assert model.generate("ice", "first", max_tokens=8) == other
    assert running.text() == expected
    (folder / "first.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterFileError):
        adapters.use(["first"])
    assert "first" not in model.adapters
    with pytest.raises(UnknownAdapterError):
        adapters.use(["everywhere"])
    assert not model.adapters


def test_the_least_recently_used_go_when_memory_is_short(model, folder, device_folder):
    content = (device_folder / "first.safetensors").read_bytes()
    for i in range(5):
        (folder / f"task{i}.safetensors").write_bytes(content)
    adapters = AdapterFolder(model, folder)
    adapters.use(["task0"])
    adapters.budget = 3 * adapters.size
    for i in (1, 2, 0, 3):
        adapters.use([f"task{i}"])
    assert adapters.loaded == ["task2", "task0", "task3"]
    assert set(model.adapters) == {"task2", "task0", "task3"}
    adapters.budget = adapters.size // 3
    with pytest.raises(ReftEdgeError, match=r"at most .* bytes of adapters are kept in memory"):
        adapters.use(["task0", "task1"])
    adapters.use(["task1"])
    assert set(model.adapters) == {"task1"}
    adapters.budget = 1
    with pytest.raises(ReftEdgeError, match="--adapter-memory"):
        adapters.use(["task1"])
    assert not model.adapters


def test_what_is_held_stays_until_it_is_let_go(model, folder, device_folder):
    adapters = AdapterFolder(model, folder)
    alone = {name: model_of(device_folder, name) for name in ("first", "everywhere")}
    with adapters.hold({"first": 1.0}) as old:
        os.replace(folder / "everywhere.safetensors", folder / "first.safetensors")
        with adapters.hold({"first": 1.0}) as new:
            assert len(model.adapters) == 2
            assert model.generate("ice", old, max_tokens=8) == alone["first"]
            assert model.generate("ice", new, max_tokens=8) == alone["everywhere"]
            (folder / "first.safetensors").unlink()
            with pytest.raises(UnknownAdapterError):
                adapters.use(["first"])
            assert model.generate("ice", new, max_tokens=8) == alone["everywhere"]
        assert list(model.adapters) == list(old)
    assert not model.adapters
    assert adapters.size == 0


def model_of(device_folder, name):
    """The answer of a model that holds nothing else."""
    alone = SteeredModel(device_folder / "export", device="cpu")
    alone.load_adapter(device_folder / f"{name}.safetensors")
    return alone.generate("ice", name, max_tokens=8)


def test_held_adapters_and_mixes_are_bounded(model, folder):
    adapters = AdapterFolder(model, folder)
    adapters.use(["first"])
    adapters.budget = int(1.5 * adapters.size)
    with adapters.hold({"first": 1.0}):
        with pytest.raises(AdapterMemoryError, match="try again later"):
            adapters.use(["everywhere"])
        with adapters.hold({"first": 1.0}):
            pass
        with pytest.raises(AdapterMemoryError, match="mixes"), adapters.hold({"first": 0.5}):
            pass
    with adapters.hold({"first": 0.5}):
        pass
    adapters.use(["everywhere"])
    assert adapters.loaded == ["everywhere"]


class Counting:
    """Stands for a model and counts what is asked of it."""

    def __init__(self, error=None):
        self.error, self.read, self.held = error, [], {}

    def load_adapter(self, path, name=None):
        self.read.append(name)
        content = path.file.read()
        if self.error is not None:
            raise self.error
        self.held[name] = content
        return name

    def unload_adapter(self, name):
        del self.held[name]

    def adapter_size(self, name):
        return len(self.held[name])


def test_a_refusal_is_remembered_until_the_file_changes(tmp_path):
    path = tmp_path / "task.safetensors"
    path.write_bytes(b"one")
    model = Counting(AdapterFileError("it is broken"))
    adapters = AdapterFolder(model, tmp_path)
    for _ in range(5):
        with pytest.raises(AdapterFileError, match="it is broken"):
            adapters.use(["task"])
    assert model.read == ["task"]
    path.write_bytes(b"three")
    with pytest.raises(AdapterFileError):
        adapters.use(["task"])
    assert model.read == ["task"] * 2
    model.error = None
    path.write_bytes(b"seven")
    adapters.use(["task"])
    assert model.held == {"task": b"seven"}


@pytest.mark.parametrize("cause", [OSError("disk"), MemoryError()])
def test_what_was_not_the_files_fault_is_tried_again(tmp_path, cause):
    (tmp_path / "task.safetensors").write_bytes(b"one")
    error = AdapterFileError("cannot read")
    error.__cause__ = cause
    model = Counting(error)
    adapters = AdapterFolder(model, tmp_path)
    for _ in range(2):
        with pytest.raises(AdapterFileError):
            adapters.use(["task"])
    assert model.read == ["task"] * 2


def test_a_slow_file_delays_no_request_for_what_is_loaded(tmp_path):
    for name in ("slow", "quick"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    model = Counting()
    adapters = AdapterFolder(model, tmp_path)
    adapters.use(["quick"])
    begun, go_on = threading.Event(), threading.Event()
    load = model.load_adapter

    def wait(path, name=None):
        begun.set()
        assert go_on.wait(30)
        return load(path, name)

    model.load_adapter = wait
    thread = threading.Thread(target=adapters.use, args=(["slow"],))
    thread.start()
    assert begun.wait(30)
    adapters.use(["quick"])
    assert adapters.names() == ["quick", "slow"]
    go_on.set()
    thread.join()
    assert adapters.loaded == ["quick", "slow"]


@pytest.mark.parametrize("step", ["readlink", "open", "fstat"])
@pytest.mark.parametrize("call", range(1, 8))
def test_links_swapped_in_at_any_moment_show_no_other_files(tmp_path, monkeypatch, step, call):
    secret = tmp_path / "secret"
    secret.write_bytes(b"root:x:0:0")
    folder = tmp_path / "adapters"
    folder.mkdir()
    path = folder / "task.safetensors"
    path.write_bytes(b"good")
    model = Counting()
    real, calls = getattr(os, step), []

    def swap(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            path.unlink()
            path.symlink_to(secret)
        return real(*arguments, **options)

    adapters = AdapterFolder(model, folder)
    monkeypatch.setattr(os, step, swap)
    with contextlib.suppress(ReftEdgeError):
        adapters.use(["task"])
    monkeypatch.undo()
    assert set(model.held.values()) <= {b"good"}
    with contextlib.suppress(ReftEdgeError):
        adapters.use(["task"])
    assert model.read in (["task"], [])


ODD = [
    "a" * 300,
    "é" * 200,
    "loop",
    "fifo",
    "folder",
    "dangling",
    "zero",
    "outside",
    "through",
    "._first",
    "bad\udcff",
    "\udc80",
    "a\\b",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_neither_listed_nor_used(model, folder, name):
    inner = folder / "inner"
    (inner / "sub").mkdir(parents=True)
    first = (folder / "first.safetensors").read_bytes()
    for place in ("first", "._first", "sub/deep"):
        (inner / f"{place}.safetensors").write_bytes(first)
    for place, target in {
        "loop": "loop.safetensors",
        "dangling": "nothing",
        "zero": "/dev/zero",
        "outside": folder / "first.safetensors",
        "through": "sub/deep.safetensors",
        "alias": "first.safetensors",
        "again": "../inner/alias.safetensors",
    }.items():
        (inner / f"{place}.safetensors").symlink_to(target)
    os.mkfifo(inner / "fifo.safetensors")
    (inner / "folder.safetensors").mkdir()
    with open(os.fsencode(inner) + b"/bad\xff.safetensors", "wb"):
        pass
    adapters = AdapterFolder(model, inner)
    assert adapters.names() == ["again", "alias", "first"]
    with pytest.raises(UnknownAdapterError) as caught:
        adapters.use([name])
    assert len(str(caught.value)) < 1000
    assert not adapters.has(name)
    adapters.use(["again"])
    assert adapters.has("alias")
    shutil.rmtree(inner)
    assert adapters.names() == []
    with pytest.raises(UnknownAdapterError):
        adapters.use(["first"])


def test_files_that_vanish_while_they_are_listed(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    adapters = AdapterFolder(Counting(), tmp_path)

    class Vanished:
        name = "gone.safetensors"

        def is_symlink(self):
            raise FileNotFoundError

    real = os.scandir

    @contextlib.contextmanager
    def scan(folder):
        with real(folder) as entries:
            yield [Vanished(), *entries]

    monkeypatch.setattr(os, "scandir", scan)
    assert adapters.names() == ["one", "two"]


@pytest.mark.parametrize("name", ["", ".", "..", "../first", "sub/first", "first\0", "nobody", "/etc/passwd"])
def test_names_do_not_lead_out_of_the_folder(model, folder, name):
    inner = folder / "inner"
    inner.mkdir()
    with pytest.raises(UnknownAdapterError):
        AdapterFolder(model, inner).use([name])


def test_links_that_lead_out_are_not_followed(model, folder, tmp_path):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "out.safetensors").symlink_to(folder / "first.safetensors")
    (inner / "real.safetensors").write_bytes((folder / "first.safetensors").read_bytes())
    (inner / "in.safetensors").symlink_to(inner / "real.safetensors")
    adapters = AdapterFolder(model, inner)
    assert adapters.names() == ["in", "real"]
    adapters.use(["in"])
    with pytest.raises(UnknownAdapterError):
        adapters.use(["out"])


def test_ten_thousand_files_are_listed_in_under_a_second(model, tmp_path):
    for i in range(10_000):
        (tmp_path / f"task{i:05}.safetensors").touch()
    started = time.perf_counter()
    assert len(AdapterFolder(model, tmp_path).names()) == 10_000
    assert time.perf_counter() - started < 1
