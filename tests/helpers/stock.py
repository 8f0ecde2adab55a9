"""Packed adapters in stock ONNX Runtime, without reft-edge's runtime."""

from pathlib import Path

import numpy as np
import onnxruntime

from reft_edge.runtime.onnx_runtime import plain_feeds


def stock_logits(folder: Path, packed: Path, ids: list[int], head_size: int) -> np.ndarray:
    """Logits `[tokens, vocabulary]` of one row of tokens, from an exported folder's graph with a packed adapter."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(packed))
    run = onnxruntime.RunOptions()
    run.add_active_adapter(adapter)
    return session.run(["logits"], plain_feeds(session, ids, head_size), run)[0][0]
