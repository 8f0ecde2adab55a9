"""The adapter file: what is written comes back, and everything malformed is refused by name."""

import contextlib
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reft_edge.adapter.config import INTERVENTIONS, Adapter, AdapterConfig
from reft_edge.adapter.file import load_adapter, read_config, save_adapter
from reft_edge.errors import AdapterFileError, ReftEdgeError
from tests.adapter.test_algebra import make_adapter


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "task.safetensors"
    save_adapter(make_adapter("loreft", training={"steps": 3, "loss": 0.5}), path)
    return path


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_config(path: Path, **changes: Any) -> None:
    header, data = parts(path)
    config = json.loads(header["__metadata__"]["adapter"])
    config.update(changes)
    header["__metadata__"]["adapter"] = json.dumps(
        {key: value for key, value in config.items() if value != "DROP"}
    )
    rewrite(path, header, data)


@pytest.mark.parametrize("kind", INTERVENTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path: Path, kind: str, tied: bool) -> None:
    adapter = make_adapter(
        kind, tied=tied, training={"seed": 1, "versions": {"torch": "2"}}, add_bias=kind == "noreft"
    )
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.config == adapter.config == read_config(tmp_path / "a.safetensors")
    assert loaded.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert np.array_equal(loaded.tensors[name], tensor)


def test_the_file_is_small_and_plain(saved: Path) -> None:
    header, data = parts(saved)
    assert header["__metadata__"]["format"] == "reft-edge"
    assert saved.stat().st_size < len(data) + 1500


def test_saving_replaces_whole_files_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ReftEdgeError, match="No space left"):
        save_adapter(make_adapter("direft"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_every_truncation_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for size in [*range(0, 40), len(content) // 2, len(content) - 1]:
        saved.write_bytes(content[:size])
        with pytest.raises(AdapterFileError, match=r"task\.safetensors is not a usable adapter"):
            load_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 4]}, "beyond a model of 4 layers"),
        ({"layers": [-1, 2]}, "beyond a model of 4 layers"),
        ({"layers": [2, 0]}, "not ascending"),
        ({"layers": []}, "expected a list of whole numbers"),
        ({"layers": "all"}, "expected a list of whole numbers"),
        ({"layers": [0, True]}, "expected a list of whole numbers"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 10**9}, "rank is 1000000000"),
        ({"rank": 5}, "the file is truncated or its description is wrong"),
        ({"rank": 3.0}, "expected a whole number"),
        ({"hidden_size": 10**12}, "hidden_size is"),
        ({"hidden_size": 2}, "larger than the hidden size"),
        ({"num_layers": True}, "num_layers is True"),
        ({"intervention": "lora"}, "unknown intervention 'lora'"),
        ({"intervention": ["loreft"]}, "expected text"),
        ({"positions": "f3;l3"}, "cannot read"),
        ({"positions": 7}, "expected text"),
        ({"tied": "yes"}, "expected true or false"),
        ({"tied": True}, "the file is truncated or its description is wrong"),
        ({"act_fn": "__import__"}, "not an activation's name"),
        ({"add_bias": True}, "only for noreft"),
        ({"base_name": "\x1b[2J"}, "not plain text"),
        ({"base_fingerprint": "f" * 300}, "not plain text"),
        ({"prompt_format": "html"}, "expected `chat` or `raw`"),
        ({"training": []}, "not a JSON object"),
        ({"surprise": 1}, "unknown fields"),
        ({"rank": "DROP"}, "lacks"),
        ({"intervention": "noreft"}, "missing: .*W1"),
    ],
)
def test_wrong_descriptions(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    for read in (load_adapter, read_config):
        with pytest.raises(AdapterFileError, match=message):
            read(saved)


def test_wrong_format_and_version(saved: Path) -> None:
    for key, value, message in [
        ("version", "3", "this reft-edge reads versions 1 and 2"),
        ("format", "peft", "does not say format"),
        ("adapter", "{", "not valid JSON"),
        ("adapter", "[]", "not a JSON object"),
        ("adapter", '{"rank": NaN}', "holds NaN"),
        ("adapter", '{"rank": 1e999}', "holds 1e999"),
        ("adapter", '{"rank":1,"rank":2}', "twice"),
    ]:
        header, data = parts(saved)
        header["__metadata__"][key] = value
        changed = saved.with_name("changed.safetensors")
        rewrite(changed, header, data)
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(changed)


def test_wrong_tensors(saved: Path) -> None:
    def with_header(change: Any) -> None:
        header, data = parts(saved)
        change(header)
        rewrite(bad, header, data)

    bad = saved.with_name("bad.safetensors")
    cases = [
        (lambda h: h.pop("b"), "missing: .*b"),
        (lambda h: h.update(extra=h["b"]), "unexpected: .*extra"),
        (lambda h: h["b"].update(dtype="F16"), "declared as 'F16'"),
        (lambda h: h["R"].update(shape=h["R"]["shape"][::-1]), "declared as 'F32'"),
        (lambda h: h["W"].update(data_offsets=h["R"]["data_offsets"]), "not a usable adapter"),
        (lambda h: h.update(W=[1]), "declared as"),
        (lambda h: h.pop("__metadata__"), "does not say format"),
    ]
    for change, message in cases:
        with_header(change)
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(bad)


def test_duplicate_tensor_names(saved: Path) -> None:
    header, data = parts(saved)
    text = json.dumps(header)
    rewrite(saved, text[:-1] + ', "b": ' + json.dumps(header["b"]) + "}", data)
    with pytest.raises(AdapterFileError, match="twice"):
        load_adapter(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(saved: Path, value: float) -> None:
    header, data = parts(saved)
    changed = bytearray(data)
    start = header["W"]["data_offsets"][0]
    changed[start : start + 4] = struct.pack("<f", value)
    rewrite(saved, header, bytes(changed))
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        load_adapter(saved)
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        Adapter(
            make_adapter("loreft").config,
            {**make_adapter("loreft").tensors, "b": np.full((2, 2, 3), value, np.float32)},
        )


def test_huge_claims_cost_no_memory(saved: Path) -> None:
    """A small file that declares terabytes is refused by arithmetic on its header."""
    header, data = parts(saved)
    rewrite(saved, {**header, "W": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, data)
    with pytest.raises(AdapterFileError, match="declared as"):
        load_adapter(saved)
    saved.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(AdapterFileError, match="its header claims"):
        load_adapter(saved)
    with saved.open("wb") as file:
        config = dataclasses.asdict(make_adapter("loreft", rank=12).config) | {
            "hidden_size": 2**20,
            "num_layers": 4,
            "layers": [0, 1, 2, 3],
            "rank": 64,
        }
        shapes = AdapterConfig(**{**config, "layers": (0, 1, 2, 3)}).shapes()
        size, entries = 0, {}
        for name, shape in shapes.items():
            entries[name] = {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [size, size := size + 4 * int(np.prod(shape))],
            }
        text = json.dumps(
            {
                "__metadata__": {"format": "reft-edge", "version": "1", "adapter": json.dumps(config)},
                **entries,
            }
        ).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    with pytest.raises(AdapterFileError, match="at most 1,073,741,824 are accepted"):
        load_adapter(saved)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"cannot read adapter .*No such file"):
        load_adapter(tmp_path / "none.safetensors")
    with pytest.raises(AdapterFileError, match="cannot read adapter"):
        load_adapter(tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_no_changed_byte_crashes_the_reader(tmp_path: Path, at: int, byte: int) -> None:
    path = tmp_path / "fuzzed.safetensors"
    save_adapter(make_adapter("loreft"), path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content)
    with contextlib.suppress(AdapterFileError):
        load_adapter(path)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """The library writes metadata in random order; with three entries, ten files would differ."""
    from safetensors import safe_open

    for precision in ("fp32", "fp16", "int8"):
        adapter = make_adapter("noreft", add_bias=True, training={"b": 1, "a": 'é"\\\n'})
        path = tmp_path / f"{precision}.safetensors"
        contents = set()
        for _ in range(10):
            save_adapter(adapter, path, precision)
            contents.add(path.read_bytes())
        assert len(contents) == 1
        with safe_open(path, "numpy") as file:
            assert file.metadata() == parts(path)[0]["__metadata__"]
            assert {name: file.get_tensor(name).shape for name in adapter.tensors} == {
                name: tensor.shape for name, tensor in adapter.tensors.items()
            }
        assert len(path.read_bytes()) % 4 == 0
        assert load_adapter(path).config == adapter.config


OVERFLOWING = {
    "loreft": {"W": 3e38, "R": -3e38},
    "noreft": {"b": -2e38, "b2": 3e38},
    "both": {"W1": -1.8e38, "W2": 1.8e38},
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_weights_that_fold_to_infinity_are_refused(tmp_path: Path, name: str) -> None:
    kind = "loreft" if name == "loreft" else "noreft"
    adapter = make_adapter(kind, add_bias=kind == "noreft")
    save_adapter(adapter, tmp_path / "a.safetensors")
    header, data = parts(tmp_path / "a.safetensors")
    changed = bytearray(data)
    for tensor, value in OVERFLOWING[name].items():
        begin, end = header[tensor]["data_offsets"]
        changed[begin:end] = np.full((end - begin) // 4, value, np.float32).tobytes()
    rewrite(tmp_path / "a.safetensors", header, bytes(changed))
    with pytest.raises(AdapterFileError, match="tensors are finite, but not the"):
        load_adapter(tmp_path / "a.safetensors")
    change_config(tmp_path / "a.safetensors", act_fn="relu")  # such a difference is never taken then
    load_adapter(tmp_path / "a.safetensors")


def test_numbers_at_the_ends_of_float32_are_kept(tmp_path: Path) -> None:
    adapter = make_adapter("direft")
    adapter.tensors["W"].flat[:4] = [1e-45, -0.0, 3.4e38, -1e-40]
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors").tensors["W"]
    assert loaded.tobytes() == adapter.tensors["W"].tobytes()


def test_an_adapter_is_opened_once_and_not_waited_for(saved: Path) -> None:
    import os

    os.mkfifo(saved.parent / "fifo.safetensors")
    (saved.parent / "link.safetensors").symlink_to(saved)
    (saved.parent / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("fifo", "loop", "."):
        for read in (load_adapter, read_config):
            with pytest.raises(AdapterFileError, match="cannot read adapter"):
                read(saved.parent / f"{name}.safetensors" if name != "." else saved.parent)
    assert load_adapter(saved.parent / "link.safetensors").config == load_adapter(saved).config
