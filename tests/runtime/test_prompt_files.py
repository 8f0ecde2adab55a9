"""Prompts on disk: what a restart takes over, and what it leaves alone."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Engine, Request, SteeredModel
from reft_edge.runtime.prefix import Prefix
from reft_edge.runtime.prompt_files import PromptFiles, fingerprint_of
from reft_edge.runtime.rows import BoundRows

SYSTEM = (
    "The quick brown fox jumps over the lazy dog. Water boils when it is hot; ice melts when it is warm. " * 5
)
SHAPES = {"past_key_values.0.key": (2, 4), "past_key_values.0.value": (2, 4)}


@pytest.fixture
def export(device_folder, tmp_path):
    shutil.copytree(device_folder / "export", tmp_path / "export")
    return tmp_path / "export"


def start(export, folder, **options):
    model = SteeredModel(export, device="cpu")
    for name in ("first", "everywhere"):
        model.load_adapter(export.parent / f"{name}.safetensors")
    return model, Engine(model, slots=2, prompt_cache=folder, **options)


@pytest.fixture
def adapters(device_folder, export):
    for name in ("first", "everywhere"):
        shutil.copy(device_folder / f"{name}.safetensors", export.parent)


def ask(model, engine, text, choice=None, count=6):
    ids = tuple(model.prompts.encode_raw(text))
    ticket = engine.submit(Request(ids, {choice: 1.0} if choice else {}, count))
    list(ticket)
    return ticket.tokens, len(ids)


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("choice", [None, "first", "everywhere"])
def test_a_restart_takes_a_prompt_over_and_answers_the_same(export, tmp_path, monkeypatch, choice):
    folder = tmp_path / "prompts"
    model, engine = start(export, folder)
    before, length = ask(model, engine, SYSTEM + "Who?", choice)
    other, _ = ask(model, engine, SYSTEM + "Where is it?", choice)
    engine.close()
    assert length > 200
    assert len(list(folder.iterdir())) == 1  # the second prompt had less than 128 tokens of its own
    if os.name != "nt":
        assert not next(folder.iterdir()).stat().st_mode & 0o077

    ran = []
    step = BoundRows.step
    monkeypatch.setattr(
        BoundRows, "step", lambda self, ids, lengths: ran.append(ids.shape[1]) or step(self, ids, lengths)
    )
    model, engine = start(export, folder)
    assert ask(model, engine, SYSTEM + "Where is it?", choice)[0] == other
    assert engine.batch.prefixes.hits > length - 40
    assert max(ran) < 40
    assert ask(model, engine, SYSTEM + "Who?", choice)[0] == before
    engine.close()


@pytest.mark.usefixtures("adapters")
def test_files_belong_to_their_adapter_and_its_weights(export, tmp_path):
    folder = tmp_path / "prompts"
    model, engine = start(export, folder)
    ask(model, engine, SYSTEM, "first")
    engine.close()
    for choice in (None, "everywhere"):
        model, engine = start(export, folder)
        alone = model.generate(SYSTEM, choice, raw=True, max_tokens=6)
        assert model.prompts.decode(ask(model, engine, SYSTEM, choice)[0]) == alone
        assert engine.batch.prefixes.hits == 0
        engine.close()
    adapter = load_adapter(tmp_path / "first.safetensors")
    adapter.tensors["b"][:] += 1
    save_adapter(adapter, tmp_path / "first.safetensors")
    model, engine = start(export, folder)
    ask(model, engine, SYSTEM, "first")
    assert engine.batch.prefixes.hits == 0
    engine.close()


@pytest.mark.usefixtures("adapters")
def test_files_of_another_model_are_left_alone_with_one_line(export, tmp_path, caplog):
    folder = tmp_path / "prompts"
    model, engine = start(export, folder)
    ask(model, engine, SYSTEM)
    engine.close()
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    weights = export / "model.onnx.data"
    content = np.frombuffer(weights.read_bytes(), np.float32).copy()
    content[20_000:20_100] *= 2
    content[20_100] = 0.5
    weights.write_bytes(content.tobytes())
    with caplog.at_level(logging.WARNING):
        model, engine = start(export, folder)
    assert [record.message.count("it is of another model") for record in caplog.records] == [1]
    ask(model, engine, SYSTEM)
    assert engine.batch.prefixes.hits == 0
    engine.close()
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(list(folder.iterdir())) == 2


@pytest.mark.usefixtures("adapters")
def test_a_model_keeps_prompts_of_its_own_answers_and_says_the_same(export, tmp_path, monkeypatch):
    ran = []
    step = BoundRows.step
    monkeypatch.setattr(
        BoundRows, "step", lambda self, ids, lengths: ran.append(ids.shape[1]) or step(self, ids, lengths)
    )
    alone = SteeredModel(export, device="cpu")
    expected = [alone.generate(SYSTEM + end, raw=True, max_tokens=6) for end in ("Who?", "Where is it?")]
    for place in (None, tmp_path / "prompts", tmp_path / "prompts"):
        model = SteeredModel(export, device="cpu")
        model.keep_prompts(place)
        ran.clear()
        assert model.generate(SYSTEM + "Who?", raw=True, max_tokens=6) == expected[0]
        first = max(ran)
        ran.clear()
        assert model.generate(SYSTEM + "Where is it?", raw=True, max_tokens=6) == expected[1]
        assert max(ran) < 40
        if place is not None:
            model._prefixes.files.close()
    assert first < 40


def files(folder, model="m", budget=1 << 20):
    return PromptFiles(folder, model, SHAPES, np.float32, 512, budget)


def prompt(first, length=160):
    rng = np.random.default_rng(first)
    values = {name: rng.random((heads, length, size), np.float32) for name, (heads, size) in SHAPES.items()}
    return Prefix(tuple(range(first, first + length)), None, values)


def kept(folder, *prompts, **options):
    made = files(folder, **options)
    for each in prompts:
        made.save(each)
        made.close()
        made = files(folder, **options)
    return made


def test_what_is_read_is_what_was_written(tmp_path):
    whole = prompt(0)
    found = kept(tmp_path, whole).find(range(150), None, 0, 1 << 20)
    assert found.ids == whole.ids
    for name, values in whole.content.items():
        np.testing.assert_array_equal(found.content[name], values)
    assert files(tmp_path).find(range(150), None, 30, 1 << 20) is None  # little more than is there already
    assert files(tmp_path).find(range(150), None, 0, whole.size - 1) is None
    assert files(tmp_path, "another").find(range(150), None, 0, 1 << 20) is None


def test_the_oldest_go_beyond_the_budget_and_use_counts(tmp_path):
    made = kept(tmp_path, prompt(0), prompt(1000), prompt(2000))
    for path in tmp_path.iterdir():
        os.utime(path, ns=(1, 1))
    assert made.find(range(1000, 1160), None, 0, 1 << 20) is not None
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    made = kept(tmp_path, prompt(3000), budget=2 * size)
    assert len(list(tmp_path.iterdir())) == 2
    for start, there in ((0, False), (1000, True), (2000, False), (3000, True)):
        assert (made.find(range(start, start + 160), None, 0, 1 << 20) is not None) == there


def test_a_longer_prompt_takes_the_place_of_its_beginning(tmp_path):
    made = kept(tmp_path, prompt(0, 150), prompt(0, 300), prompt(0, 310))
    assert len(list(tmp_path.iterdir())) == 1
    assert made.find(range(310), None, 0, 1 << 20).ids == tuple(range(300))


@examples(max_examples=60, deadline=None)
@given(at=st.integers(0, 20_000), content=st.binary(min_size=1, max_size=40), cut=st.booleans())
def test_damaged_files_are_no_failure(tmp_path_factory, at, content, cut):
    folder = tmp_path_factory.mktemp("prompts")
    kept(folder, prompt(0))
    [path] = folder.iterdir()
    whole = path.read_bytes()
    at %= len(whole)
    damaged = whole[:at] + (b"" if cut else content + whole[at + len(content) :])
    path.write_bytes(damaged)
    found = files(folder).find(range(150), None, 0, 1 << 20)
    if found is not None:
        assert len(damaged) == len(whole)
        assert all(values.shape[1] == len(found.ids) for values in found.content.values())


def test_a_header_that_claims_much_takes_no_memory(tmp_path):
    made = files(tmp_path)
    header = made._header(1 << 30, "none")
    text = json.dumps(header).encode()
    path = tmp_path / f"{'0' * 32}.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + (1 << 30) * 8 + made._bytes(1 << 30))
    assert files(tmp_path).find(range(150), None, 0, 1 << 40) is None
    (tmp_path / f"{'1' * 32}.safetensors").symlink_to(path)
    (tmp_path / f"{'2' * 32}.safetensors").mkdir()
    assert files(tmp_path).find(range(150), None, 0, 1 << 40) is None


def test_a_file_that_goes_or_changes_meanwhile_is_not_used(tmp_path, caplog):
    made = kept(tmp_path, prompt(0))
    [path] = tmp_path.iterdir()
    path.unlink()
    assert made.find(range(150), None, 0, 1 << 20) is None
    assert caplog.records == []
    made = kept(tmp_path, prompt(0))
    path.write_bytes(path.read_bytes()[:-1])
    assert made.find(range(150), None, 0, 1 << 20) is None
    assert "is not used: its tensors are not those of this model, or it was cut" in caplog.text


def test_a_disk_that_is_full_ends_nothing(tmp_path, monkeypatch, caplog):
    made = files(tmp_path)

    def full(*arguments, **options):
        raise ReftEdgeError("cannot write it: No space left on device")

    monkeypatch.setattr("reft_edge.runtime.prompt_files.write_atomically", full)
    made.save(prompt(0))
    made.save(prompt(1000))
    made.close()
    assert [record.message for record in caplog.records] == [
        "prompt cache: cannot write it: No space left on device"
    ]
    made.save(prompt(2000))  # closed: nothing happens


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReftEdgeError, match="cannot make the folder"):
        files(tmp_path / "file")


def test_a_fingerprint_tells_types_of_caches_apart(device_folder):
    export = device_folder / "export"
    found = set()
    for kind in ("auto", "int8"):
        model = SteeredModel(Path(export), device="cpu", cache_type=kind)
        found.add(fingerprint_of(export, model.manifest, model.graph))
    assert len(found) == 2
