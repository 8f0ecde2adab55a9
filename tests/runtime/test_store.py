"""A folder of adapters: listed without opening, loaded on use, reloaded when replaced, forgotten over the budget."""

import os
import time

import pytest

from reft_edge.errors import AdapterFileError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.store import AdapterStore, UnknownAdapterError


@pytest.fixture
def folder(device_folder, tmp_path):
    for name in ("first", "everywhere"):
        (tmp_path / f"{name}.safetensors").write_bytes((device_folder / f"{name}.safetensors").read_bytes())
    return tmp_path


@pytest.fixture
def model(device_folder):
    return SteeredModel(device_folder / "export", device="cpu")


def test_adapters_are_loaded_on_first_use_only(model, folder):
    store = AdapterStore(model, folder)
    assert store.names() == ["everywhere", "first"]
    assert not model.adapters
    store.use(["first"])
    assert list(model.adapters) == store.loaded == ["first"]
    before = model.generate("ice", "first", max_tokens=8)
    store.use(["first"])
    assert model.generate("ice", "first", max_tokens=8) == before


def test_a_replaced_file_is_loaded_again_and_a_bad_one_spoils_only_its_name(model, folder):
    store = AdapterStore(model, folder)
    store.use(["first", "everywhere"])
    running = model.stream("ice", "first", max_tokens=8)
    expected = model.generate("ice", "first", max_tokens=8)
    other = model.generate("ice", "everywhere", max_tokens=8)
    os.replace(folder / "everywhere.safetensors", folder / "first.safetensors")
    store.use(["first"])
    assert model.generate("ice", "first", max_tokens=8) == other
    assert running.text() == expected
    (folder / "first.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterFileError):
        store.use(["first"])
    assert "first" not in model.adapters
    with pytest.raises(UnknownAdapterError):
        store.use(["everywhere"])
    assert not model.adapters


def test_the_least_recently_used_go_when_memory_is_short(model, folder, device_folder):
    content = (device_folder / "first.safetensors").read_bytes()
    for i in range(5):
        (folder / f"task{i}.safetensors").write_bytes(content)
    store = AdapterStore(model, folder)
    store.use(["task0"])
    store.budget = 3 * store.size
    for i in (1, 2, 0, 3):
        store.use([f"task{i}"])
    assert store.loaded == ["task2", "task0", "task3"]
    assert set(model.adapters) == {"task2", "task0", "task3"}
    store.budget = 1
    store.use(["task0", "task1"])
    assert set(model.adapters) == {"task0", "task1"}


@pytest.mark.parametrize("name", ["", ".", "..", "../first", "sub/first", "first\0", "nobody", "/etc/passwd"])
def test_names_do_not_lead_out_of_the_folder(model, folder, name):
    inner = folder / "inner"
    inner.mkdir()
    with pytest.raises(UnknownAdapterError):
        AdapterStore(model, inner).use([name])


def test_links_that_lead_out_are_not_followed(model, folder, tmp_path):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "out.safetensors").symlink_to(folder / "first.safetensors")
    (inner / "real.safetensors").write_bytes((folder / "first.safetensors").read_bytes())
    (inner / "in.safetensors").symlink_to(inner / "real.safetensors")
    store = AdapterStore(model, inner)
    assert store.names() == ["in", "real"]
    store.use(["in"])
    with pytest.raises(UnknownAdapterError):
        store.use(["out"])


def test_ten_thousand_files_are_listed_in_under_a_second(model, tmp_path):
    for i in range(10_000):
        (tmp_path / f"task{i:05}.safetensors").touch()
    started = time.perf_counter()
    assert len(AdapterStore(model, tmp_path).names()) == 10_000
    assert time.perf_counter() - started < 1
