"""A GGUF's own blocks in the exported graph: its weights, Q4_1's offsets to a small part of a step, and its answers."""

import numpy as np
import pytest
import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.export import Quantisation, export_model
from reft_edge.graph_weights import use_exported_weights
from reft_edge.models import load_model, resolve_model
from tests.tiny import make_model
from tests.tiny_gguf import write_gguf

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    """`gguf_model(kind)`: a tiny Llama whose file has matrices in blocks of that kind."""
    folder = tmp_path_factory.mktemp("gguf")
    torch_model = load_model(resolve_model(str(make_model(folder / "hf", **WIDE))))
    made = {}

    def make(kind):
        if kind not in made:
            write_gguf(folder / f"{kind}.gguf", torch_model, kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("REFT_EDGE_CACHE", str(folder / "cache"))
                made[kind] = resolve_model(str(folder / f"{kind}.gguf"))
        return made[kind]

    return make


@pytest.mark.parametrize(
    ("kind", "precision", "device"),
    [("Q4_0", "int4", "cpu"), ("Q4_1", "int4", "cpu"), ("Q8_0", "int8", "cpu"), ("Q4_1", "int4", "cuda")],
)
def test_blocks_are_carried_over(gguf_model, tmp_path, kind, precision, device):
    source = gguf_model(kind)
    manifest = export_model(source, tmp_path / "export", precision, device=device)
    assert manifest.quantisation["algorithm"] == "gguf"
    assert manifest.quantisation["carried"] == manifest.quantisation["matrices"] == 5 * 3 + 1
    assert manifest.verification["base_error"] <= 1e-3
    model = load_model(source)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_exported_weights(model, tmp_path / "export", manifest.base_fingerprint)
    for name, weight in model.state_dict().items():
        # A graph for CUDA has 16-bit norms and scales.
        near = 1e-6 if device == "cpu" else 2e-3
        if kind == "Q4_1" and "_proj" in name:
            blocks = original[name].unflatten(1, (-1, 32))
            step = (blocks.amax(dim=2) - blocks.amin(dim=2)) / 15
            off = (weight - original[name]).unflatten(1, (-1, 32))
            assert (off.amax(dim=2) - off.amin(dim=2)).max() <= near  # what differs is a block's offset
            assert (off.abs().amax(dim=2) <= step.amax(dim=1, keepdim=True) / 20 + near).all()
        else:
            torch.testing.assert_close(weight, original[name], rtol=0, atol=near)


def test_carried_blocks_answer_as_the_file_does(gguf_model, tmp_path):
    """Rounding anew costs accuracy that carrying over does not."""
    source = gguf_model("Q4_1")
    agreement = {}
    for algorithm in ("gguf", "k_quant"):
        quantisation = Quantisation(algorithm, accuracy_level=1)
        manifest = export_model(source, tmp_path / algorithm, "int4", quantisation=quantisation)
        agreement[algorithm] = manifest.verification["agreement"]
    assert agreement["k_quant"] < 0.97 < agreement["gguf"]


def test_other_models_have_no_blocks_to_carry(gguf_model, tmp_path):
    with pytest.raises(ReftEdgeError, match="no GGUF file whose blocks an int8 graph can hold"):
        export_model(gguf_model("Q4_1"), tmp_path / "a", "int8", quantisation=Quantisation("gguf"))
    with pytest.raises(ReftEdgeError, match="no GGUF file whose blocks an int4 graph can hold"):
        export_model(gguf_model("F32"), tmp_path / "a", "int4", quantisation=Quantisation("gguf"))
    with pytest.raises(ReftEdgeError, match="blocks are of 32 weights, not 64; leave --block-size at 32"):
        export_model(gguf_model("Q4_1"), tmp_path / "a", "int4", quantisation=Quantisation("gguf", 64))
    assert (
        export_model(gguf_model("F32"), tmp_path / "a", "int4").quantisation["algorithm"] == "k_quant_mixed"
    )
    assert np.isfinite(export_model(gguf_model("Q4_1"), tmp_path / "b", "int8").verification["base_error"])
