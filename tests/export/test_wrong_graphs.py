"""The check against PyTorch is sharp: graphs that are wrong in one place are found out, whatever the rounding."""

import shutil

import onnx_ir as ir
import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.export import Quantisation, decoder, export_model, ports, recipe
from reft_edge.model.source import ModelFolder
from tests.helpers.tiny import make_model

INT4 = ("int4", Quantisation("rtn"))


@pytest.fixture(scope="module", params=[("fp32", None), ("fp16", None), INT4], ids=["fp32", "fp16", "int4"])
def export(request, tmp_path_factory):
    """`export(output, spoil)`: an export whose graph was changed by `spoil` before it got ports; it is built once."""
    root = tmp_path_factory.mktemp("wrong")
    source = ModelFolder(make_model(root / "hf", hidden_size=128, tie_word_embeddings=False), "tiny")
    build, built = decoder._build, root / "built"

    def build_once(model, target, folder, report):
        if not built.exists():
            built.mkdir()
            build(model, target, built, report)
        shutil.copytree(built, folder, dirs_exist_ok=True)
        graph = ir.load(folder / recipe.PLAIN)
        spoil_now[0](graph.graph)
        ir.save(graph, folder / recipe.PLAIN)
        return {}

    spoil_now = [lambda graph: None]

    def run(output, spoil=lambda graph: None):
        spoil_now[0] = spoil
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "_build", build_once)
            return export_model(source, output, request.param[0], quantisation=request.param[1])

    return run


def stored(graph, part):
    return next(value for name, value in graph.initializers.items() if part in name)


def swap(graph, one, other):
    """Exchange the content of stored values whose names contain these."""
    left, right = stored(graph, one), stored(graph, other)
    left.const_value, right.const_value = right.const_value, left.const_value


def swapped_layers(graph):
    for name in [name for name in graph.initializers if "layers.0.mlp.up_proj.MatMul.weight" in name]:
        swap(graph, name, name.replace("layers.0", "layers.1"))


def wrong_norm(graph):
    norm = stored(graph, "layers.1.post_attention_layernorm.weight")
    norm.const_value = ir.tensor(norm.const_value.numpy() * norm.dtype.numpy().type(1.01))


def doubled_embedding(graph):
    for node in graph:
        if node.op_type in ("Gather", "GatherBlockQuantized") and "embed_tokens" in str(node.name):
            floats = node.inputs[2 if node.op_type == "GatherBlockQuantized" else 0]
            floats.const_value = ir.tensor(floats.const_value.numpy() * floats.dtype.numpy().type(2))


def test_it_passes_as_it_was_built(export, tmp_path):
    assert export(tmp_path / "e").verification["rank0_bitwise"]


@pytest.mark.parametrize("spoil", [swapped_layers, wrong_norm, doubled_embedding])
def test_a_wrong_weight_is_found_out(export, tmp_path, spoil):
    with pytest.raises(
        ReftEdgeError, match=r"logits differ from PyTorch's|weights differ from the model's by"
    ):
        export(tmp_path / "e", spoil)
    assert not (tmp_path / "e").exists()


def test_a_port_that_edits_nothing_is_found_out(export, tmp_path, monkeypatch):
    insert = ports.insert_ports

    def unplugged(model, *choices):
        table = insert(model, *choices)
        edit = next(node for node in model.graph if node.name == "/reft.layers.1/delta/MatMul")
        nothing = ir.node("Sub", [edit.inputs[0], edit.inputs[0]])
        model.graph.insert_before(edit, nothing)
        edit.replace_input_with(0, nothing.outputs[0])
        return table

    monkeypatch.setattr(recipe, "insert_ports", unplugged)
    with pytest.raises(ReftEdgeError, match="logits differ from PyTorch's"):
        export(tmp_path / "e")
