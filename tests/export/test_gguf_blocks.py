"""A GGUF's own blocks in the exported graph: its weights, offsets to a small part of a step, and its answers."""

from dataclasses import replace

import gguf
import numpy as np
import onnx_ir as ir
import pytest
import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.export import Quantisation, carry, export_model
from reft_edge.export.checks import largest_difference, torch_logits
from reft_edge.export.gguf_blocks import KINDS, Stored, read_rows
from reft_edge.export.nbits import Form
from reft_edge.model.loading import load_model
from reft_edge.model.source import resolve_model
from reft_edge.runtime.model import SteeredModel
from tests.helpers.tiny import make_model
from tests.helpers.tiny_gguf import quantised, random_blocks, write_gguf
from tests.helpers.torch_reference import take_graph_weights

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXACT = ["Q8_0", "Q5_0", "Q6_K", "Q3_K", "Q4_0"]
WITH_OFFSETS = ["Q4_K", "Q4_1", "Q5_K", "Q5_1", "Q2_K"]
ROW = [5, 17, 33, 4, 90, 211, 8]


def in_turn(kinds, embedding="Q8_0", head="Q6_K"):
    """Of a file's matrices, the first in the first kind, and so on; the kinds of one layer differ."""
    kind_of = {"token_embd.weight": embedding, "output.weight": head}

    def choose(name):
        return kind_of.setdefault(name, kinds[(len(kind_of) - 2) % len(kinds)])

    return choose


FILES = {
    "F32": "F32",
    "exact": in_turn(EXACT, embedding="Q6_K"),
    "with offsets": in_turn(WITH_OFFSETS, embedding="Q4_K", head="Q4_K"),
    "all": in_turn([*EXACT, *WITH_OFFSETS], embedding="Q5_1"),
    "half": in_turn(["Q5_K", "F16", "Q5_0"], embedding="F16"),
    "tables": in_turn(["IQ4_NL"]),
}
UNTIED = ("all", "with offsets")


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    """`gguf_model(name)`: a tiny Llama whose file has matrices as FILES says."""
    folder = tmp_path_factory.mktemp("gguf")
    made, plain = {}, {}

    def make(name):
        tied = name not in UNTIED
        if tied not in plain:
            made_here = make_model(folder / f"hf{tied}", **WIDE, tie_word_embeddings=tied)
            plain[tied] = load_model(resolve_model(str(made_here)))
        if name not in made:
            file = folder / f"{name}.gguf"
            write_gguf(file, plain[tied], FILES[name])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("REFT_EDGE_CACHE", str(folder / "cache"))
                made[name] = resolve_model(str(file))
        return made[name]

    return make


@pytest.fixture(scope="module")
def exported(gguf_model, tmp_path_factory):
    """`exported(name, precision, device)`: a folder with that file's graph, whose products do not round activations, and its
    manifest."""
    made = {}

    def export(name, precision="int4", device="cpu"):
        if (name, precision, device) not in made:
            folder = tmp_path_factory.mktemp("exported") / "e"
            quantisation = Quantisation(accuracy_level=1)
            manifest = export_model(
                gguf_model(name), folder, precision, device=device, quantisation=quantisation
            )
            made[name, precision, device] = folder, manifest
        return made[name, precision, device]

    return export


def steps(model):
    """Of each matrix of a GGUF by its Hugging Face name: its kind, and the largest step of its blocks."""
    names = {"attn_output": "o_proj", "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
    names |= {f"attn_{part}": f"{part}_proj" for part in "qkv"}
    found = {}
    for tensor in gguf.GGUFReader(model.gguf).tensors:
        kind = tensor.tensor_type.name
        if kind in KINDS:
            parts = tensor.name.split(".")
            place = names.get(parts[2], "") if parts[0] == "blk" else ""
            where = {"token_embd": "embed_tokens", "output": "lm_head"}.get(parts[0], f"{parts[1]}.{place}")
            blocks = read_rows(tensor.data, KINDS[kind], slice(None))
            found[where] = kind, float(np.abs(blocks.scales).max())
    return found


def step_of(found, name):
    """The kind and step of a tensor of the PyTorch model, or none."""
    parts = name.split(".")
    key = f"{parts[2]}.{parts[4]}" if "layers" in parts and len(parts) > 5 else parts[-2]
    return found.get(key, (None, 0.0))


@pytest.mark.parametrize("kind", [*KINDS])
def test_blocks_are_read_as_gguf_reads_them(kind):
    blocks = random_blocks((6, 512), kind, seed=3)
    rows = np.array([4, 0, 5])
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read_rows(blocks, KINDS[kind], slice(None)).dequantised(), expected)
    np.testing.assert_array_equal(read_rows(blocks, KINDS[kind], rows).dequantised(), expected[rows])


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("kind", [*KINDS])
def test_codes_and_scales_of_each_kind_are_stored_as_they_are(tmp_path, kind, precision):
    """In 4 bits where the kind has 4 or fewer; of the rest only a block's offset is rounded, to a part of its step."""
    blocks = random_blocks((5, 512), kind, seed=1)
    (tmp_path / "file").write_bytes(b"before" + blocks.tobytes())
    stored = Stored(kind, 5, 512, tmp_path / "file", 6, blocks.shape[1])
    plain = carry._Matrix(stored, KINDS[kind], np.array([1, 0, 2, 4, 3]), Form(8, KINDS[kind].size))
    how = carry.Carrying(precision, 4, whole_blocks=False)
    form = carry._choose_form(plain, how, gathered=False)
    (rows,) = replace(plain, form=form).stored()
    own = read_rows(blocks, KINDS[kind], np.array([1, 0, 2, 4, 3]))
    count, whole = own.scales.shape[1], own.scales != 0
    np.testing.assert_array_equal(rows.scales[:, :count][whole], own.scales[whole])
    added = (rows.codes[:, :count] - own.codes)[whole]
    assert (added == added[:, :1]).all()
    values = (rows.codes.astype(np.float32) - rows.zeros[..., None]) * rows.scales[..., None]
    of_means = values[:, count:].reshape(5, -1)[:, : form.means]
    found = values[:, :count] + (of_means / form.size)[..., None] if form.means else values[:, :count]
    off = np.abs(found.reshape(5, -1) - own.dequantised())
    assert (form.bits == 4) == (precision == "int4" and KINDS[kind].levels <= 16) or KINDS[kind].has_offsets
    if KINDS[kind].has_offsets:
        assert off.max() <= np.abs(own.scales).max() * (1 / 15 if form.bits == 4 else 1 / 250)
    else:
        np.testing.assert_array_equal(off, 0)


@pytest.mark.parametrize(
    ("file", "precision", "device"),
    [
        ("exact", "int4", "cpu"),
        ("with offsets", "int4", "cpu"),
        ("all", "int8", "cpu"),
        ("all", "int4", "cuda"),
    ],
)
def test_blocks_are_carried_over(gguf_model, exported, file, precision, device):
    source = gguf_model(file)
    folder, manifest = exported(file, precision, device)
    assert manifest.quantisation["algorithm"] == "gguf"
    assert manifest.quantisation["carried"] == manifest.quantisation["matrices"] == 5 * 3 + 2
    assert manifest.verification["base_error"] <= 1e-3
    model = load_model(source)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    take_graph_weights(model, folder)
    found = steps(source)
    for name, weight in model.state_dict().items():
        kind, step = step_of(found, name)
        # A graph for CUDA has 16-bit norms and scales.
        near = 1e-6 if device == "cpu" else 2e-3
        if kind is None or not KINDS[kind].has_offsets:
            torch.testing.assert_close(weight, original[name], rtol=0, atol=near)
            continue
        # What differs is a block's offset, and by how much is what its bits say.
        off = (weight - original[name]).unflatten(1, (-1, KINDS[kind].size))
        assert (off.amax(dim=2) - off.amin(dim=2)).max() <= max(near, 1e-5 * step)
        of_step = 1 / 15 if kind in ("Q4_K", "Q4_1", "Q2_K") and precision == "int4" else 1 / 15.9
        assert off.abs().max() <= of_step * step + near


def test_exact_kinds_answer_as_pytorch_on_the_dequantised_file(gguf_model, exported):
    found = SteeredModel(exported("exact")[0], device="cpu").logits([ROW])[0]
    expected = torch_logits(load_model(gguf_model("exact")), ROW)
    assert largest_difference([found], [expected]) <= 1e-3 * np.abs(expected).max()


def test_carried_blocks_answer_as_the_file_does(gguf_model, exported, tmp_path):
    """Rounding anew costs accuracy that carrying over does not."""
    source = gguf_model("with offsets")
    expected = torch_logits(load_model(source), ROW)
    rounded = Quantisation("k_quant", accuracy_level=1)
    export_model(source, tmp_path / "e", "int4", quantisation=rounded)
    error = {
        name: np.abs(SteeredModel(folder, device="cpu").logits([ROW])[0] - expected).mean()
        for name, folder in (("gguf", exported("with offsets")[0]), ("k_quant", tmp_path / "e"))
    }
    assert error["gguf"] < error["k_quant"] / 3


def test_a_tied_table_is_stored_once(exported):
    graph = ir.load(exported("exact")[0] / "model.onnx").graph
    lookup = next(node for node in graph if node.op_type == "GatherBlockQuantized")
    head = next(node for node in graph if (node.name or "").startswith("/lm_head/"))
    table, weight = lookup.inputs[0].const_value, head.inputs[1].const_value
    assert (table.location, table.offset, table.length) == (weight.location, weight.offset, weight.length)
    assert lookup.inputs[2] is head.inputs[2]
    assert not any(node.op_type == "Reshape" for node in graph)


def test_rotary_tables_are_computed_and_not_stored(exported):
    """The exports' verification against PyTorch says that they are right."""
    graph = ir.load(exported("exact")[0] / "model.onnx").graph
    assert not [name for name in graph.initializers if "cos" in name or "sin" in name]
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention")
    made_by = [
        value.producer().op_type for value in attention.inputs if value is not None and value.producer()
    ]
    assert made_by[-2:] == ["Cos", "Sin"]


def test_offsets_that_4_bits_have_no_room_for_get_8(tmp_path, monkeypatch):
    """Blocks of one sign, far from zero: the zero point would lie beyond 15."""
    model = load_model(resolve_model(str(make_model(tmp_path / "hf", **WIDE))))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.abs_().add_(0.6)
        model.model.layers[1].mlp.gate_proj.weight.abs_().add_(0.6).neg_()
    write_gguf(tmp_path / "far.gguf", model, "Q4_1")
    monkeypatch.setenv("REFT_EDGE_CACHE", str(tmp_path / "cache"))
    source = resolve_model(str(tmp_path / "far.gguf"))
    export_model(source, tmp_path / "e", "int4")
    bits = {
        node.name: node.attributes["bits"].as_int()
        for node in ir.load(tmp_path / "e" / "model.onnx").graph
        if node.op_type == "MatMulNBits" and "/mlp/" in str(node.name)
    }
    assert {name for name, count in bits.items() if count == 8} == {
        "/model/layers.0/mlp/up_proj/MatMul_Q8",
        "/model/layers.1/mlp/gate_proj/MatMul_Q8",
    }
    model = load_model(source)
    expected = model.model.layers[0].mlp.up_proj.weight.clone()
    take_graph_weights(model, tmp_path / "e")
    off = (model.model.layers[0].mlp.up_proj.weight - expected).abs().max()
    assert off <= steps(source)["0.up_proj"][1] / 200


def test_what_is_in_no_blocks_is_rounded_and_the_rest_is_kept(gguf_model, tmp_path):
    source = gguf_model("half")
    manifest = export_model(source, tmp_path / "e", "int4")
    assert manifest.quantisation["algorithm"] == "gguf"
    assert 0 < manifest.quantisation["carried"] < manifest.quantisation["matrices"] == 5 * 3 + 2
    assert manifest.verification["base_error"] <= 1e-3
    model = load_model(source)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    take_graph_weights(model, tmp_path / "e")
    kinds = {name: step_of(steps(source), name)[0] for name in original}
    # q, k and v are one product; it is kept only if all three can be.
    kept = [name for name, kind in kinds.items() if kind == "Q5_0" and "mlp" in name]
    assert kept
    for name in kept:
        torch.testing.assert_close(model.state_dict()[name], original[name], rtol=0, atol=1e-6)


def test_files_without_blocks_to_keep(gguf_model, tmp_path):
    hugging_face = resolve_model(str(make_model(tmp_path / "hf")))
    with pytest.raises(ReftEdgeError, match="hf is no GGUF file, so it has no blocks to keep"):
        export_model(hugging_face, tmp_path / "a", "int8", quantisation=Quantisation("gguf"))
    with pytest.raises(ReftEdgeError, match="not in blocks that a graph can hold: they are F32, and Q4_0, "):
        export_model(gguf_model("F32"), tmp_path / "a", "int4", quantisation=Quantisation("gguf"))
    with pytest.raises(ReftEdgeError, match="they are IQ4_NL, and"):
        export_model(gguf_model("tables"), tmp_path / "a", "int4", quantisation=Quantisation("gguf"))
    with pytest.raises(ReftEdgeError, match="blocks keep their own sizes, 16 or 32 weights, not 64"):
        export_model(gguf_model("exact"), tmp_path / "a", "int4", quantisation=Quantisation("gguf", 64))
    for precision in ("int4", "int8"):
        with pytest.raises(
            ReftEdgeError, match=r"tables has matrices of the kind IQ4_NL, which no graph can hold as"
        ):
            export_model(gguf_model("tables"), tmp_path / "a", precision)
    assert not (tmp_path / "a").exists()
    chosen = Quantisation("k_quant_mixed")
    rounded = export_model(gguf_model("tables"), tmp_path / "a", "int4", quantisation=chosen)
    assert rounded.verification["base_error"] <= 1e-3


def test_tiny_k_blocks_are_near_the_weights_they_were_made_of():
    """Else the tests above would say nothing about files as people have them."""
    weights = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    for kind, most in (("Q4_K", 0.1), ("Q5_K", 0.05)):
        found = gguf.quants.dequantize(quantised(weights, kind), gguf.GGMLQuantizationType[kind])
        assert np.std(found - weights) < most
