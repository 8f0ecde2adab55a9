"""Packed adapters in stock ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.pack import pack_adapter


@pytest.mark.parametrize("name", ["first", "everywhere"])
def test_stock_onnxruntime_gives_the_same_logits(device_folder, tmp_path, name):
    packed = tmp_path / "task.onnx_adapter"
    assert (
        pack_adapter(device_folder / f"{name}.safetensors", device_folder / "export", packed)
        == packed.stat().st_size
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(device_folder / "export/model.onnx"), options)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(packed))
    run = onnxruntime.RunOptions()
    run.add_active_adapter(adapter)
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(device_folder / f"{name}.safetensors")
    ids = np.random.default_rng(0).integers(2, 320, (1, 21))
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, model.manifest.head_size), np.float32) for value in pasts
    }
    found = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty}, run)[0][
        0
    ]
    assert np.array_equal(found, model.logits(ids.tolist(), name)[0])


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
