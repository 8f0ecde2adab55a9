"""Edits as inputs of ports: what the graph's float type cannot hold is refused, not run."""

from dataclasses import replace

import numpy as np
import pytest

from reft_edge.adapter.algebra import concat, scale
from reft_edge.adapter.linear import fold
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.binding import decode_edit, decode_inputs, port_inputs
from tests.adapter.test_algebra import LAYERS, D, make_adapter

MANIFEST = Manifest("base", "0" * 16, "llama", "fp16", D, LAYERS, tuple(range(LAYERS)), 4, 64, (1,), {})
HALF, WHOLE = np.dtype(np.float16), np.dtype(np.float32)


@pytest.mark.filterwarnings("error")
def test_what_fp16_cannot_hold_is_refused():
    adapter = make_adapter("steering", positions="all+gen")
    adapter.tensors["v"][:] = 70_000
    edit = fold(adapter)
    assert port_inputs(edit, MANIFEST, WHOLE)["reft.layers.0.B"].dtype == WHOLE
    for inputs in (
        lambda: port_inputs(edit, MANIFEST, HALF),
        lambda: decode_inputs([decode_edit(edit)], HALF),
        lambda: port_inputs(scale(fold(make_adapter("loreft")), 1e5), MANIFEST, HALF),
    ):
        with pytest.raises(ReftEdgeError, match=r"not finite in this folder's float16; .*fp32"):
            inputs()


@pytest.mark.filterwarnings("error")
def test_scales_that_leave_float32_are_refused():
    edit = fold(make_adapter("steering", positions="all+gen"))
    for factor in (1e39, -1e300, float("inf"), float("nan")):
        with pytest.raises(ReftEdgeError, match="not finite in float32"):
            scale(edit, factor)
    adapter = make_adapter("steering", positions="all+gen")
    adapter.tensors["v"][:] = 100
    with pytest.raises(ReftEdgeError, match="not finite in float32"):
        decode_edit(scale(fold(adapter), 1e37))
    small = port_inputs(scale(edit, 1e-44), MANIFEST, WHOLE)
    assert 0 < small["reft.scale"].max() < 1e-40


def test_a_folder_from_before_exclusions_takes_adapters_without_them():
    plain = fold(make_adapter("loreft", positions="all+gen2"))
    leaves_out = fold(make_adapter("loreft", positions="all-f1|f3-l2"))
    inputs = port_inputs(plain, MANIFEST, WHOLE)
    assert not any("skip" in name for name in inputs)
    with pytest.raises(ReftEdgeError, match=r"no reft\.skip_first; export the model again"):
        port_inputs(leaves_out, MANIFEST, WHOLE)
    with pytest.raises(ReftEdgeError, match=r"no reft\.skip_first"):
        port_inputs(concat([plain, leaves_out]), MANIFEST, WHOLE)
    shape = ["adapter_batch", 1, "gates"]
    now = replace(MANIFEST, ports={**MANIFEST.ports, "reft.skip_first": shape, "reft.skip_last": shape})
    inputs = port_inputs(concat([plain, leaves_out]), now, WHOLE)
    assert inputs["reft.skip_first"].ravel().tolist() == [0, 0, 1, 0]
    assert inputs["reft.skip_last"].ravel().tolist() == [0, 0, 0, 2]
    assert not any("skip" in name for name in port_inputs(plain, now, WHOLE))
