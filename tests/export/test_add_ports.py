"""Ports in graphs that reft-edge did not build."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from reft_edge.adapter.linear import fold
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.export.add_ports import add_ports, model_beside
from reft_edge.export.build import Target, build_graph
from reft_edge.export.residual import find_head_input, find_sites
from reft_edge.export.structure import find_sites_by_structure
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import load_manifest
from reft_edge.model.places import Place
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import Engine, Request, SteeredModel
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.session import GraphSession
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.foreign import export_dynamo, quantise_int4, quantise_int8, quantise_int8_all
from tests.helpers.tiny import LAYERS, make_model
from tests.helpers.torch_reference import greedy, logits, random_adapter

ROW = [5, 80, 33, 120, 7, 61, 19, 200, 44, 3, 99, 150, 12, 77, 23, 8]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def source(device_folder):
    return ModelFolder(device_folder / "hf", "tiny-llama")


@pytest.fixture(scope="module")
def cached(torch_onnx_folder):
    return torch_onnx_folder / "model.onnx"


@pytest.fixture(scope="module")
def built_by_genai(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "out").mkdir()
    build_graph(source.path, folder / "out", Target(), folder / "work")
    return folder / "out/model.onnx"


def changed(graph: Path, folder: Path, change) -> Path:
    model = ir.load(graph)
    change(model)
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="changed.data")
    return folder / "model.onnx"


def rename(graph: ir.Graph, old: str, new: str) -> None:
    next(value for value in [*graph.inputs, *graph.outputs] if value.name == old).name = new


def check_parity(model, folder, positions="f3+l3", **fields):
    manifest = load_manifest(folder)
    graph = GraphSession(folder, manifest, "cpu")
    adapter = random_adapter(model, positions=positions, **fields)
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected = logits(model, ROW).numpy()
    rows = [ROW, ROW[:5]]
    found = graph.score(rows, port_inputs(fold(adapter), manifest, graph.dtype))
    assert (
        np.abs(found[0] - expected).max() <= TOLERANCE < np.abs(expected - logits(model, ROW).numpy()).max()
    )
    assert found[1].shape == (5, expected.shape[1])


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma2"])
def test_structure_finds_what_the_builders_names_say(tmp_path, architecture):
    hf = make_model(tmp_path / "hf", architecture)
    (tmp_path / "out").mkdir()
    build_graph(hf, tmp_path / "out", Target(), tmp_path / "work")
    graph = ir.load(tmp_path / "out/model.onnx").graph
    assert find_sites_by_structure(graph) == find_sites(graph, LAYERS)


def test_a_builders_graph_keeps_its_shared_cache(source, built_by_genai, tmp_path):
    manifest = add_ports(built_by_genai, tmp_path / "ported", source).manifest
    assert (manifest.cache, manifest.precision) == ("shared", "fp32")
    assert manifest.verification["rank0_error"] == 0
    assert (tmp_path / "ported/genai_config.json").is_file()
    check_parity(load_model(source), tmp_path / "ported")


@pytest.mark.parametrize("built", ["genai", "torch.onnx"])
def test_further_kinds_of_ports(built, source, tiny_model, cached, built_by_genai, tmp_path):
    graph = built_by_genai if built == "genai" else cached
    manifest = add_ports(
        graph, tmp_path / "ported", source, port_kinds=["diagonal", "affine", "act"]
    ).manifest
    assert manifest.port_kinds == ("affine", "act", "diagonal")
    assert manifest.verification["rank0_bitwise"]
    for fields in (
        {"intervention": "red"},
        {"act_fn": "gelu"},
        {"intervention": "nodireft", "act_fn": "silu"},
    ):
        check_parity(tiny_model, tmp_path / "ported", **fields)


MORE = [pytest.mark.real, pytest.mark.slow]  # torch.onnx takes ten seconds for a graph


@pytest.mark.parametrize(
    "architecture",
    ["gemma2", "olmo2", "phi", *(pytest.param(name, marks=MORE) for name in ("llama", "qwen3", "granite"))],
)
def test_torch_onnx_graphs_without_a_cache_score_and_do_not_generate(tmp_path, architecture):
    source = ModelFolder(make_model(tmp_path / "hf", architecture), architecture)
    model = load_model(source)
    ported = add_ports(export_dynamo(model, tmp_path / "onnx"), tmp_path / "ported", source)
    figures = ported.manifest.verification
    assert figures["rank0_bitwise"]
    assert max(figures["base_error"], figures["steered_error"]) <= TOLERANCE < figures["effect"]
    assert [place.layer for place in ported.outputs] == list(range(LAYERS))
    assert ported.manifest.cache == "none"
    check_parity(model, tmp_path / "ported")
    check_parity(model, tmp_path / "ported", "all+gen")
    steered_model = SteeredModel(tmp_path / "ported", "cpu")
    assert np.abs(steered_model.logits([ROW])[0] - logits(model, ROW).numpy()).max() <= TOLERANCE
    with pytest.raises(ReftEdgeError, match="no KV cache, so it can score text"):
        steered_model.generate("Who are you?")


def test_a_growing_cache_generates_what_pytorch_does(cached, source, tiny_model, device_folder, tmp_path):
    manifest = add_ports(cached, tmp_path / "ported", source).manifest
    assert (manifest.cache, manifest.precision, manifest.layers) == ("growing", "fp32", (0, 1, 2))
    assert manifest.verification["decode_error"] <= TOLERANCE
    assert sorted(file.name for file in (tmp_path / "ported").iterdir()) == [
        "chat_template.jinja",
        "model.onnx",
        "model.onnx.data",
        "reft_edge.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    check_parity(tiny_model, tmp_path / "ported")
    expected = json.loads((device_folder / "expected.json").read_text())
    model = SteeredModel(tmp_path / "ported", "cpu")
    for name in ("first", "everywhere"):
        model.load_adapter(device_folder / f"{name}.safetensors")
    for name in (None, "first", "everywhere", None):
        answer = model.stream("Who are you?", name, max_tokens=24)
        answer.text()
        assert answer.tokens == expected[name or "base"]
    engine = Engine(model, slots=3)
    prompt = tuple(model.prompts.encode_prompt("Who are you?", "chat"))
    choices = ({}, {"first": 1.0}, {"everywhere": 1.0}) * 2
    tickets = [engine.submit(Request(prompt, choice, 24)) for choice in choices]
    found = [(list(ticket), ticket.tokens)[1] for ticket in tickets]
    engine.close()
    assert found == [expected["base"], expected["first"], expected["everywhere"]] * 2
    assert engine.batch.prefixes.hits >= len(prompt) - 1


def test_a_prompt_in_chunks(cached, source, tiny_model, tmp_path):
    manifest = add_ports(cached, tmp_path / "ported", source).manifest
    graph = GraphSession(tmp_path / "ported", manifest, "cpu")
    bound = graph.bind(graph.take_cache(1, len(ROW)), {})
    found = bound.prefill(np.array([ROW]), chunk=5)[0]
    assert np.abs(found - logits(tiny_model, ROW).numpy()[-1]).max() <= TOLERANCE
    with pytest.raises(ReftEdgeError, match="the KV cache holds 16 tokens; 17 were asked for"):
        bound.step(np.array([[3]]))


@pytest.mark.parametrize(
    ("quantise", "precision"),
    [(quantise_int8, "int8"), (quantise_int8_all, "int8"), (quantise_int4, "int4")],
)
def test_quantised_graphs(cached, source, tmp_path, quantise, precision):
    graph = quantise(cached, tmp_path / "onnx")
    manifest = add_ports(graph, tmp_path / "ported", source).manifest
    figures = manifest.verification
    assert manifest.precision == precision
    assert figures["rank0_bitwise"]
    assert figures["rank0_error"] == 0
    assert figures["port_error"] <= 1e-5
    assert 0 < figures["block_error"] < 1
    assert figures["base_error"] is None
    model = SteeredModel(tmp_path / "ported", "cpu")
    assert len(model.stream("Who are you?", max_tokens=4).text()) > 0


def test_attention_is_seen_through_every_quantised_product(cached, tmp_path):
    """Of both inputs computed, and not of a computed one and its zero point."""
    every = quantise_int8_all(cached, tmp_path / "every")
    model = ir.load(every)
    products = [node for node in model.graph if node.op_type == "MatMulInteger"]
    assert sum(node.inputs[1].producer() is not None for node in products) >= 2 * LAYERS
    assert [site.place.layer for site in find_sites_by_structure(model.graph)] == list(range(LAYERS))
    for node in model.graph:
        if node.op_type == "Softmax":
            node.op_type, node.domain = "QLinearSoftmax", "com.microsoft"
    assert len(find_sites_by_structure(model.graph)) == LAYERS
    for node in products:  # the weights' products alone do not attend
        if node.inputs[1].producer() is not None:
            node.op_type = "Mul"
    with pytest.raises(ReftEdgeError, match="before any attention does"):
        find_sites_by_structure(model.graph)


def test_fp16(cached, source, tmp_path):
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    (tmp_path / "onnx").mkdir()
    half = convert_float_to_float16(onnx.load(cached), keep_io_types=False)
    onnx.save(half, tmp_path / "onnx/model.onnx")
    manifest = add_ports(tmp_path / "onnx/model.onnx", tmp_path / "ported", source).manifest
    assert (manifest.float_type, manifest.precision) == ("fp16", "fp16")
    assert manifest.verification["block_error"] < 0.01
    assert SteeredModel(tmp_path / "ported", "cpu").generate("Who are you?", max_tokens=4)


def test_ports_only_where_asked(cached, source, tmp_path):
    ported = add_ports(cached, tmp_path / "ported", source, "1")
    assert ported.manifest.layers == (1,)
    assert len(ported.outputs) == LAYERS
    assert {name.split(".")[2] for name in ported.manifest.ports if ".layers." in name} == {"1"}


def test_a_head_that_cannot_be_told_gives_all_logits(cached, source, tmp_path):
    def hide(model):
        graph = model.graph
        logits = graph.outputs[0]
        nodes = [ir.node("Neg", [logits]), ir.node("Neg", [None])]
        nodes[1].replace_input_with(0, nodes[0].outputs[0])
        graph.extend(nodes)
        graph.outputs[0] = nodes[1].outputs[0]
        logits.name, nodes[1].outputs[0].name = "hidden", "logits"

    ported = add_ports(changed(cached, tmp_path / "onnx", hide), tmp_path / "ported", source)
    assert "reft.logits_to_keep" not in ported.manifest.ports
    model = SteeredModel(tmp_path / "ported", "cpu")
    answer = model.stream("Who are you?", max_tokens=5)
    answer.text()
    assert len(answer.tokens) == 5


def test_a_graph_that_keeps_logits_by_itself(cached, source, tmp_path):
    """`num_logits_to_keep`, as in graphs made for transformers.js."""

    def keep(model):
        graph = model.graph
        head, hidden = find_head_input(graph)
        kind = ir.TensorType(ir.DataType.INT64)
        count = ir.Value(name="num_logits_to_keep", type=kind, shape=ir.Shape([1]))
        graph.inputs.append(count)
        numbers = {"end": [np.iinfo(np.int64).max], "axis": [1]}
        end, axis = (
            ir.Value(name=name, type=kind, shape=ir.Shape([1]), const_value=ir.tensor(content, name=name))
            for name, content in numbers.items()
        )
        for value in (end, axis):
            graph.register_initializer(value)
        start = ir.node("Neg", [count])
        kept = ir.node("Slice", [hidden, start.outputs[0], end, axis])
        graph.insert_before(head, [start, kept])
        head.replace_input_with(0, kept.outputs[0])

    graph = changed(cached, tmp_path / "onnx", keep)
    manifest = add_ports(graph, tmp_path / "ported", source).manifest
    assert manifest.verification["decode_error"] <= TOLERANCE
    check_parity(load_model(source), tmp_path / "ported")


def test_another_models_weights_are_found_out(cached, tmp_path):
    other = ModelFolder(make_model(tmp_path / "hf", seed=5), "other")
    with pytest.raises(ReftEdgeError, match="without an adapter, logits differ from PyTorch's"):
        add_ports(cached, tmp_path / "ported", other)
    for quantise in (quantise_int8, quantise_int4):
        graph = quantise(cached, tmp_path / quantise.__name__)
        with pytest.raises(ReftEdgeError, match="not the one that the graph was exported from"):
            add_ports(graph, tmp_path / "ported", other)
    assert not (tmp_path / "ported").exists()


def test_another_models_shape_is_found_out(cached, tmp_path):
    deeper = ModelFolder(make_model(tmp_path / "deeper", num_hidden_layers=4), "deeper")
    with pytest.raises(ReftEdgeError, match=r"found 3 blocks in .* but deeper has 4; give the model"):
        add_ports(cached, tmp_path / "ported", deeper)
    wider = ModelFolder(make_model(tmp_path / "wider", hidden_size=128), "wider")
    with pytest.raises(ReftEdgeError, match=r"float32 of size 64; expected .* wider's size, 128"):
        add_ports(cached, tmp_path / "ported", wider)


@pytest.mark.parametrize("quantise", [None, quantise_int8])
def test_ports_in_the_wrong_place_are_found_out(cached, source, tmp_path, monkeypatch, quantise):
    """The self-check is real: ports one block off fail it, in a quantised graph, too."""
    graph = quantise(cached, tmp_path / "onnx") if quantise else cached

    def shifted(graph, num_layers):
        moved = [
            replace(site, place=Place((site.place.layer + 1) % LAYERS))
            for site in find_sites_by_structure(graph)
        ]
        return sorted(moved, key=lambda site: site.place)

    monkeypatch.setattr("reft_edge.export.add_ports.find_blocks", shifted)
    with pytest.raises(ReftEdgeError, match=r"what blocks \[0, 1, 2\] were found to add is nearer to other"):
        add_ports(graph, tmp_path / "ported", source)


def test_a_wrong_edit_is_found_out(cached, source, tmp_path, monkeypatch):
    from reft_edge.export import ports

    def open_everywhere(op, ids, mask, prompt_len, first, last, after, skips, scale):
        return gate(op, ids, mask, prompt_len, last, first, after, skips, scale)

    gate = ports._gate
    monkeypatch.setattr(ports, "_gate", open_everywhere)
    with pytest.raises(ReftEdgeError, match="a port's edit differs from numpy's by"):
        add_ports(quantise_int8(cached, tmp_path / "onnx"), tmp_path / "ported", source)


def add_input(model):
    model.graph.inputs.append(
        ir.Value(name="token_type_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "t"]))
    )


def old_opset(model):
    model.graph.opset_imports[""] = 11


def second_lookup(model):
    graph = model.graph
    lookup = next(node for node in graph if node.op_type == "Gather" and node.inputs[1].name == "input_ids")
    again = ir.node("Gather", list(lookup.inputs))
    graph.insert_after(lookup, again)


def branch(model):
    """An `If` node, which holds the whole model in Optimum's merged decoders."""
    inside = ir.node("Identity", [model.graph.inputs[0]])
    body = ir.Graph([], [inside.outputs[0]], nodes=[inside], name="body")
    condition = ir.Value(name="use_cache", const_value=ir.tensor(np.array(True), name="use_cache"))
    model.graph.register_initializer(condition)
    model.graph.append(ir.node("If", [condition], {"then_branch": body}))


def mislabel(model):
    for node in model.graph:
        if node.op_type == "Add":
            node.name = "/model/layers.7/Add_1"


def scale_stream(model):
    """A model that scales its residual stream between blocks."""
    site = find_sites_by_structure(model.graph)[0]
    two = ir.Value(name="two", const_value=ir.tensor(np.array(2, np.float32), name="two"))
    model.graph.register_initializer(two)
    scaled = ir.node("Mul", [site.uses[0].value, two])
    model.graph.insert_before(site.uses[0].node, scaled)
    for use in site.uses:
        use.node.replace_input_with(use.index, scaled.outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: rename(model.graph, "logits", "scores"), "no output named `logits` .it has scores"),
        (lambda model: rename(model.graph, "attention_mask", "mask"), "no input attention_mask; it has an"),
        (add_input, "it has an input token_type_ids; expected input_ids, attention_mask, position_ids"),
        (lambda model: rename(model.graph, "present.1.key", "kept"), "no output present.1.key to go on with"),
        (lambda model: rename(model.graph, "attention_mask", "reft.first"), "has ports already"),
        (old_opset, "in ONNX opset 11; ports need 13 or later"),
        (second_lookup, "expected one lookup of input_ids in a table of embeddings, found 2"),
        (branch, r"branches or loops \(If, Loop, Scan\)"),
        (mislabel, "closes block 0, but its name says 7"),
        (scale_stream, "Mul .* does more than add a branch to it"),
    ],
)
def test_refusals_give_their_reason(cached, source, tmp_path, change, reason):
    graph = changed(cached, tmp_path / "onnx", change)
    with pytest.raises(ReftEdgeError, match=reason):
        add_ports(graph, tmp_path / "ported", source)
    assert not (tmp_path / "ported").exists()


def test_post_norm_models_are_refused(tmp_path):
    source = ModelFolder(
        make_model(tmp_path / "hf", "opt", word_embed_proj_dim=64, ffn_dim=96, do_layer_norm_before=False),
        "opt",
    )
    graph = export_dynamo(load_model(source), tmp_path / "onnx")
    with pytest.raises(ReftEdgeError, match=r"LayerNormalization .* does more than add a branch to it"):
        add_ports(graph, tmp_path / "ported", source)


def test_files_that_are_no_graph(source, tmp_path):
    with pytest.raises(ReftEdgeError, match="there is no file"):
        add_ports(tmp_path / "model.onnx", tmp_path / "ported", source)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ReftEdgeError, match=r"cannot read .*model.onnx"):
        add_ports(tmp_path / "model.onnx", tmp_path / "ported", source)


def test_the_model_beside_a_graph(source, tmp_path):
    shutil.copytree(source.path, tmp_path / "hub")
    (tmp_path / "hub/onnx").mkdir()
    assert model_beside(tmp_path / "hub/onnx/model.onnx").path == tmp_path / "hub"
    assert model_beside(tmp_path / "hub/model.onnx").path == tmp_path / "hub"
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ReftEdgeError, match=r"no PyTorch weights beside .*give the model .* with --model"):
        model_beside(tmp_path / "elsewhere/model.onnx")


def test_the_command(cached, source, device_folder, tmp_path):
    target = str(tmp_path / "ported")
    done = CliRunner().invoke(app, ["add-ports", str(cached), "-o", target, "--model", str(source.path)])
    assert done.exit_code == 0, done.output
    table = [line.split() for line in done.output.splitlines()[: LAYERS + 1]]
    assert table[0] == ["layer", "node", "value", "port"]
    assert [row[0] for row in table[1:]] == ["0", "1", "2"]
    assert "bitwise equal to the graph without ports" in done.output
    adapter = str(device_folder / "first.safetensors")
    done = CliRunner().invoke(app, ["run", target, "Who are you?", "-a", adapter, "--max-tokens", "5"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["add-ports", str(cached), "-o", target])
    assert done.exit_code == 1
    assert "no PyTorch weights beside" in done.output


OPTIMUM = ["optimum-onnx>=0.1", "transformers<4.58"]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture
def optimum_scripts(tmp_path):
    """Scripts of an environment with Optimum, whose releases need an older transformers: $REFT_EDGE_OPTIMUM or a new one."""
    import torch

    if given := os.environ.get("REFT_EDGE_OPTIMUM"):
        return Path(given) / SCRIPTS
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    site = next(environment.rglob("site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", *OPTIMUM]
    subprocess.run([environment / SCRIPTS / "python", *install], check=True)
    return environment / SCRIPTS


@pytest.mark.real
def test_an_optimum_export(tmp_path, source, device_folder, tiny_model, optimum_scripts):
    """A graph that Optimum exported elsewhere with an older transformers, ported here."""
    exported = tmp_path / "exported"
    task = ["--task", "text-generation-with-past"]
    command = [optimum_scripts / "optimum-cli", "export", "onnx", "--model", source.path, *task, exported]
    subprocess.run(command, check=True)
    graph = exported / "model.onnx"
    assert ir.load(graph).producer_name == "pytorch"

    ported = add_ports(graph, tmp_path / "ported", source)
    assert [place.node for place in ported.outputs] == [f"Add /model/layers.{i}/Add_1" for i in range(LAYERS)]
    assert ported.manifest.cache == "growing"
    assert ported.manifest.verification["rank0_error"] == 0
    check_parity(tiny_model, tmp_path / "ported")
    model = SteeredModel(tmp_path / "ported", "cpu")
    model.load_adapter(device_folder / "first.safetensors")
    expected = json.loads((device_folder / "expected.json").read_text())
    for name, tokens in (("first", expected["first"]), (None, expected["base"])):
        answer = model.stream("Who are you?", name, max_tokens=24)
        answer.text()
        assert answer.tokens == tokens
    ids = model.prompts.encode_prompt("Who are you?", "chat")
    assert greedy(tiny_model, ids, 24) == expected["base"]

    for quantise in (quantise_int8, quantise_int4):
        rounded = quantise(graph, tmp_path / quantise.__name__)
        figures = add_ports(rounded, tmp_path / "ported", source).manifest.verification
        assert figures["rank0_bitwise"]
        assert figures["port_error"] <= 1e-5
