"""Packed adapters in stock ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest

from reft_edge.adapter.file import save_adapter
from reft_edge.convert.onnx_adapter import from_onnx_adapter, pack_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.bench import random_adapter
from tests.helpers.stock import stock_logits


@pytest.mark.parametrize("name", ["first", "everywhere"])
def test_stock_onnxruntime_gives_the_same_logits(device_folder, tmp_path, name):
    packed = tmp_path / "task.onnx_adapter"
    assert (
        pack_adapter(device_folder / f"{name}.safetensors", device_folder / "export", packed)
        == packed.stat().st_size
    )
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(device_folder / f"{name}.safetensors")
    ids = np.random.default_rng(0).integers(2, 320, 21).tolist()
    found = stock_logits(device_folder / "export", packed, ids, model.manifest.head_size)
    assert np.array_equal(found, model.logits([ids], name)[0])


def test_a_packed_file_has_the_mode_of_any_new_file_and_an_old_one_survives(
    device_folder, tmp_path, monkeypatch
):
    packed, plain = tmp_path / "task.onnx_adapter", tmp_path / "plain"
    plain.touch()
    pack_adapter(device_folder / "first.safetensors", device_folder / "export", packed)
    assert packed.stat().st_mode == plain.stat().st_mode
    before = packed.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ReftEdgeError, match="No space left"):
        pack_adapter(device_folder / "everywhere.safetensors", device_folder / "export", packed)
    assert packed.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "task.onnx_adapter"]


def test_refusals(device_folder, tmp_path):
    with pytest.raises(ReftEdgeError, match="not an exported model"):
        pack_adapter(device_folder / "first.safetensors", tmp_path, tmp_path / "a.onnx_adapter")
    with pytest.raises(ReftEdgeError, match="cannot write"):
        pack_adapter(
            device_folder / "first.safetensors",
            device_folder / "export",
            tmp_path / "none" / "a.onnx_adapter",
        )
    assert list(tmp_path.iterdir()) == []


def test_positions_of_all_kinds_come_back(device_folder, tmp_path):
    model = SteeredModel(device_folder / "export", device="cpu")
    for number, positions in enumerate(("gen5|all-f1", "f7+l7+gen2-f1-l2", "f3+l3")):
        path, packed = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.onnx_adapter"
        adapter = random_adapter(model, 2, positions, seed=number)
        save_adapter(adapter, path)
        notes = []
        pack_adapter(path, device_folder / "export", packed, report=notes.append)
        assert any("must feed reft.prompt_len" in note for note in notes) == ("gen" in positions)
        again = from_onnx_adapter(packed, model.manifest, raw=False)
        assert again.config.spans == adapter.config.spans
        names = onnxruntime.AdapterFormat.read_adapter(str(packed)).get_parameters()
        assert ("reft.skip_first" in names) == ("-f" in positions)
