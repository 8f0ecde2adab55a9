"""Adapters stored in fewer bits: read back within the bounds of the rounding, refused where header and description differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner

from reft_edge.adapter.algebra import edit_error
from reft_edge.adapter.config import INTERVENTIONS, Adapter, AdapterConfig
from reft_edge.adapter.file import load_adapter, read_stored, save_adapter
from reft_edge.adapter.linear import fold
from reft_edge.adapter.storage import PRECISIONS, ROWS, decode, encode
from reft_edge.cli import app
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.signing.keys import generate_key, load_private_key, load_trusted
from reft_edge.signing.signatures import sign, verify
from tests.adapter.test_adapter_file import parts, rewrite
from tests.adapter.test_algebra import make_adapter


def classifier(kind: str = "loreft") -> Adapter:
    return make_adapter(kind, labels=("bad", "good"), pooling="mean")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_round_trip_of_files(tmp_path: Path, kind: str, precision: str) -> None:
    path = tmp_path / "a.safetensors"
    for adapter in (make_adapter(kind, add_bias=kind == "noreft"), classifier(kind)):
        save_adapter(adapter, path, precision)
        assert read_stored(path).precision == precision
        loaded = load_adapter(path)
        assert loaded.config == adapter.config
        assert parts(path)[0]["__metadata__"]["version"] == ("1" if precision == "fp32" else "2")
        for name, tensor in adapter.tensors.items():
            rows = name in ROWS and precision != "fp32"
            off = np.abs(loaded.tensors[name] - tensor)
            assert loaded.tensors[name].dtype == np.float32
            assert off.max() == 0 or rows
            assert (
                off
                <= {
                    "fp32": 0,
                    "fp16": 2**-11 * np.abs(tensor),
                    "int8": np.abs(tensor).max(-1, keepdims=True) / 253,
                }[precision]
            ).all()
        save_adapter(loaded, path, precision)
        again = load_adapter(path)
        off = max(np.abs(again.tensors[name] - loaded.tensors[name]).max() for name in loaded.tensors)
        assert off <= (1e-6 if precision == "int8" else 0)


FINITE = st.floats(-60000, 60000, width=32)


@settings(max_examples=200)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=FINITE))
def test_bounds_of_rounding(rows: np.ndarray) -> None:
    half = decode(encode({"R": rows}, "fp16"))["R"]
    assert (np.abs(half - rows) <= np.maximum(2.0**-11 * np.abs(rows), 2.0**-25)).all()
    eighth = decode(encode({"R": rows}, "int8"))["R"]
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    assert (np.abs(eighth - rows) <= largest / 254 * 1.0001 + 1e-42).all()
    assert np.isfinite(eighth).all()


def test_rows_of_zeros_stay() -> None:
    assert (decode(encode({"v": np.zeros((2, 1, 4), np.float32)}, "int8"))["v"] == 0).all()


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter("steering")
    adapter.tensors["v"][0, 0, 0, 0] = 70000
    with pytest.raises(ReftEdgeError, match="fp16 ends at 65,504; store it as int8"):
        save_adapter(adapter, tmp_path / "a.safetensors", "fp16")
    assert list(tmp_path.iterdir()) == []
    save_adapter(adapter, tmp_path / "a.safetensors", "int8")
    with pytest.raises(ReftEdgeError, match="no precision 'int4'"):
        save_adapter(adapter, tmp_path / "a.safetensors", "int4")


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_the_error_of_an_edit_is_that_of_its_effect(kind: str) -> None:
    """Against the mean square over many random hidden states."""
    exact = fold(make_adapter(kind, tied=True))
    rounded = fold(
        Adapter(
            make_adapter(kind, tied=True).config,
            decode(encode(make_adapter(kind, tied=True).tensors, "int8")),
        )
    )
    h = np.random.default_rng(0).normal(size=(200_000, 12))
    found = []
    for place, part in exact.places.items():
        other = rounded.places[place]
        change, off = ((h @ at.A + at.b) @ at.B + (h * at.s if len(at.s) else 0) for at in (part, other))
        found.append(np.sqrt(((off - change) ** 2).mean() / (change**2).mean()))
    assert edit_error(exact, rounded) == pytest.approx(max(found), rel=0.02)
    assert edit_error(exact, exact) == 0
    assert 0 < max(found) < 0.02


def smollm2(kind: str, layers: int = 4) -> Adapter:
    """An adapter as for SmolLM2-135M at rank 4, one position group, with rows like those of training."""
    config = AdapterConfig(
        kind,
        "smollm2",
        "0" * 16,
        576,
        30,
        tuple(range(layers)),
        1 if kind == "steering" else 4,
        "f3+l3",
        True,
    )
    random = np.random.default_rng(0)
    tensors = {
        name: (random.normal(size=shape) / 24).astype(np.float32) for name, shape in config.shapes().items()
    }
    return Adapter(config, tensors)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("loreft", {"fp32": 76e3, "fp16": 39e3, "int8": 22e3}),
        ("consreft", {"fp32": 40e3, "fp16": 22e3, "int8": 12e3}),
        ("steering", {"fp32": 12e3, "fp16": 7e3, "int8": 5e3}),
    ],
)
def test_sizes_of_task_files(tmp_path: Path, kind: str, most: dict[str, float]) -> None:
    path = tmp_path / "a.safetensors"
    for precision, limit in most.items():
        save_adapter(smollm2(kind), path, precision)
        assert path.stat().st_size < limit


def test_headers_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def refused(change: Any, message: str, precision: str) -> None:
        save_adapter(make_adapter("loreft"), path, precision)
        header, data = parts(path)
        change(header)
        rewrite(path, header, data)
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(path)

    refused(
        lambda h: h["__metadata__"].update(version="1"), "the file is truncated or its description", "fp16"
    )
    refused(lambda h: h["__metadata__"].update(version="1"), "unexpected: .*R.scale", "int8")
    refused(lambda h: h.pop("R.scale"), "missing: .*R.scale", "int8")
    refused(lambda h: h["R"].update(dtype="I8"), "missing: ", "fp16")
    refused(lambda h: h["W"].update(dtype="BF16"), "declared as 'BF16'", "fp16")
    refused(lambda h: h["W"].update(dtype="U8"), "declared as 'U8'", "int8")
    refused(lambda h: h["b"].update(dtype="F16"), "declared as 'F16'", "fp16")
    refused(lambda h: h["R.scale"].update(shape=[12]), "declared as 'F32'", "int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e38])
def test_bad_scales(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(make_adapter("loreft"), path, "int8")
    header, data = parts(path)
    start = header["W.scale"]["data_offsets"][0]
    rewrite(path, header, data[:start] + np.float32(value).tobytes() + data[start + 4 :])
    with pytest.raises(AdapterFileError, match=r"no scale|NaN or infinity"):
        load_adapter(path)


def test_a_small_file_cannot_claim_much(tmp_path: Path) -> None:
    """A gigabyte of int8 would be four as float32: refused from the header of a sparse file."""
    config = AdapterConfig("consreft", "b", "0", 1 << 20, 4, (0, 1, 2, 3), 100, "l1", True)
    path = tmp_path / "a.safetensors"
    save_adapter(make_adapter("consreft", rank=1, layers=(0,), tied=True), path, "int8")
    header, _ = parts(path)
    header["__metadata__"]["adapter"] = json.dumps(vars(config))
    offset = 0
    for name, (shape, width) in {
        "R": ([4, 1, 100, 1 << 20], 1),
        "R.scale": ([4, 1, 100], 4),
        "b": ([4, 1, 100], 4),
    }.items():
        header[name].update(
            shape=shape, data_offsets=[offset, offset := offset + width * int(np.prod(shape))]
        )
    rewrite(path, header, b"")
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + offset)
    with pytest.raises(AdapterFileError, match=r"takes 1,677,\d+,\d+ bytes as float32; at most"):
        load_adapter(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(INTERVENTIONS), precision=st.sampled_from(PRECISIONS), seed=st.integers(0, 2**32))
def test_signatures_cover_every_storage(tmp_path: Path, kind: str, precision: str, seed: int) -> None:
    key, path = tmp_path / "a.key", tmp_path / "a.safetensors"
    if not key.exists():
        generate_key(key, "me")
    save_adapter(make_adapter(kind, seed=seed), path, precision)
    sign(path, load_private_key(key))
    trusted = load_trusted(key.with_suffix(".pub"))
    assert verify(path, trusted).signer == "me"
    assert read_stored(path).precision == precision
    content = bytearray(path.read_bytes())
    content[-1 - seed % 40] ^= 1 + seed % 255
    with pytest.raises(ReftEdgeError):
        verify(bytes(content), trusted)


def test_shrink(tmp_path: Path) -> None:
    path, out = tmp_path / "task.safetensors", tmp_path / "small.safetensors"
    save_adapter(smollm2("loreft"), path)

    def cli(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["shrink", *map(str, arguments)])

    said = cli(path, "-o", out)
    assert said.exit_code == 0, said.output
    assert "in fp16, before 7" in said.stdout
    figures = json.loads(cli(path, "-o", out, "--precision", "int8", "--json").stdout)
    assert figures["bytes"] == out.stat().st_size < 22_000 < 74_000 < figures["bytes_before"]
    assert 1e-3 < figures["edit_error"] < 2e-2
    assert "is stored as int8 already" in cli(out, "-o", out, "--precision", "int8").stderr
    assert "no precision 'int4'" in cli(path, "-o", out, "--precision", "int4").stderr
    generate_key(tmp_path / "me.key", "me")
    sign(path, load_private_key(tmp_path / "me.key"))
    assert "sign the new file" in cli(path, "-o", out).stdout
    save_adapter(make_adapter("loreft", act_fn="relu"), path)
    assert cli(path, "-o", out).exit_code == 0
