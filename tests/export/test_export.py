"""Exported graphs against PyTorch, on a tiny random model of every supported architecture."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.adapter.algebra import concat, scale
from reft_edge.adapter.config import INTERVENTIONS
from reft_edge.adapter.linear import fold
from reft_edge.errors import ReftEdgeError
from reft_edge.export import ALGORITHMS, Quantisation, build, export_model
from reft_edge.export.check_decoder import Verification
from reft_edge.export.exact import write_exact
from reft_edge.export.residual import find_sites
from reft_edge.export.structure import find_blocks
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import load_manifest
from reft_edge.model.places import COMPONENTS, PORT_KINDS, Place
from reft_edge.model.source import ModelFolder
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.onnx_runtime import _round_to_bfloat16, ort_value
from reft_edge.runtime.session import GraphSession
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.tiny import ARCHITECTURES, LAYERS, VOCABULARY, make_model
from tests.helpers.torch_reference import greedy, logits, random_adapter

ROW = [5, 80, 33, 120, 7, 61, 19, 200, 44, 3, 99, 150, 12, 77, 23, 8]
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=[name for name in ARCHITECTURES if name != "llama"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = ModelFolder(make_model(folder / "hf", request.param), request.param)
    manifest = export_model(source, folder / "export", components=COMPONENTS, port_kinds=PORT_KINDS)
    return load_model(source), GraphSession(folder / "export", manifest, "cpu"), manifest


@pytest.fixture(scope="module")
def llama(device_folder, tiny_model):
    manifest = load_manifest(device_folder / "export")
    return tiny_model, GraphSession(device_folder / "export", manifest, "cpu"), manifest


def decode(graph, manifest, edit, ids, count):
    ports = graph.to_device(
        {**port_inputs(edit, manifest, graph.dtype), "reft.prompt_len": np.array([len(ids)])}
    )
    cache = graph.take_cache(1, len(ids) + count)
    bound = graph.bind(cache, ports)
    rows = [bound.prefill(np.array([ids]))[0]]
    tokens = []
    while len(tokens) < count and int(rows[-1].argmax()) not in manifest.eos_token_ids:
        tokens.append(int(rows[-1].argmax()))
        rows.append(bound.step(np.array([[tokens[-1]]]))[0])
    return tokens


def check_parity(model, graph, manifest, **fields):
    adapter = random_adapter(model, **fields)
    edit = fold(adapter)
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected, tokens = logits(model, ROW).numpy(), greedy(model, ROW, 12)
    found = graph.score([ROW], port_inputs(edit, manifest, graph.dtype))[0]
    assert np.abs(found - expected).max() <= TOLERANCE
    assert np.abs(expected - logits(model, ROW).numpy()).max() > 0.1
    assert decode(graph, manifest, edit, ROW, 12) == tokens


@pytest.mark.parametrize("positions", ["f7+l7", "all+gen"])
def test_every_architecture_in_prefill_and_decode(exported, positions):
    check_parity(*exported, positions=positions)


def test_every_component_of_every_architecture(exported):
    """Adapters on attention, MLP and block outputs at once."""
    model, graph, manifest = exported
    adapters = [random_adapter(model, seed=i, component=name) for i, name in enumerate(COMPONENTS)]
    expected = [logits(model, ROW).numpy()]
    for adapter in adapters:
        with steered(model, (Interventions.from_adapter(adapter), 1.0)):
            expected.append(logits(model, ROW).numpy())
    with steered(model, *((Interventions.from_adapter(adapter), 1.0) for adapter in adapters)):
        expected.append(logits(model, ROW).numpy())
    edits = [fold(adapter) for adapter in adapters]
    for edit, wanted in zip([*edits, concat(edits)], expected[1:], strict=True):
        found = graph.score([ROW], port_inputs(edit, manifest, graph.dtype))[0]
        assert np.abs(found - wanted).max() <= TOLERANCE
        assert np.abs(wanted - expected[0]).max() > 0.01


def test_a_component_without_a_port_is_refused(llama):
    model, graph, manifest = llama
    edit = fold(random_adapter(model, component="mlp", layers=(1,)))
    with pytest.raises(ReftEdgeError, match=r"layers 1 \(mlp\), which have no port .* --components"):
        port_inputs(edit, manifest, graph.dtype)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"act_fn": "silu"}, r"act_fn is 'silu', for which this folder has no ports; .* --ports affine,act$"),
        (
            {"intervention": "red"},
            r"elementwise, for which this folder has no ports; .* --ports affine,diagonal$",
        ),
    ],
)
def test_an_adapter_without_its_kind_of_port_is_refused(llama, fields, expected):
    model, graph, manifest = llama
    with pytest.raises(ReftEdgeError, match=expected):
        port_inputs(fold(random_adapter(model, **fields)), manifest, graph.dtype)


@pytest.mark.parametrize(
    ("kinds", "expected"), [(("affine", "acts"), "unknown ports 'acts'"), (("act",), "every port is affine")]
)
def test_kinds_of_ports_are_checked(tmp_path, device_folder, kinds, expected):
    with pytest.raises(ReftEdgeError, match=expected):
        export_model(ModelFolder(device_folder / "hf", "tiny"), tmp_path / "out", port_kinds=kinds)


@pytest.mark.parametrize(
    ("components", "expected"), [((), "no components"), (("heads",), "unknown components 'heads'")]
)
def test_components_are_checked(tmp_path, components, expected):
    source = ModelFolder(make_model(tmp_path / "hf"), "tiny")
    with pytest.raises(ReftEdgeError, match=expected):
        export_model(source, tmp_path / "out", components=components)


def test_rank_0_is_bitwise_the_plain_graph(exported):
    assert exported[2].verification["rank0_bitwise"] is True


@pytest.mark.parametrize(
    ("intervention", "act_fn"),
    [("nodireft", "silu"), ("loreft", "gelu"), ("direft", "relu"), ("noreft", "tanh"), ("red", "linear")],
)
def test_every_kind_of_port_of_every_architecture(exported, intervention, act_fn):
    fields = {"intervention": intervention, "act_fn": act_fn, "positions": "l3+gen"}
    check_parity(*exported, **fields, component="attention", strength=3)
    check_parity(*exported, **fields)


@pytest.mark.parametrize("intervention", [kind for kind in INTERVENTIONS if kind != "red"])
def test_every_intervention(llama, intervention):
    check_parity(*llama, intervention=intervention, positions="f3+l3")


@pytest.mark.parametrize(
    "positions",
    [
        "f3",
        "l2",
        "f7+l7",
        "f20+l20",
        "all",
        "gen",
        "all+gen",
        "l2+gen",
        "gen3",
        "all+gen1",
        "all-f1",
        "all+gen-f2-l1",
        "f7+l7-f1-l2",
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_position_spec(llama, positions, tied):
    model, graph, manifest = llama
    adapter = random_adapter(model, positions=positions, tied=tied)
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected, tokens = logits(model, ROW).numpy(), greedy(model, ROW, 12)
    found = graph.score([ROW], port_inputs(fold(adapter), manifest, graph.dtype))[0]
    assert np.abs(found - expected).max() <= TOLERANCE
    assert decode(graph, manifest, fold(adapter), ROW, 12) == tokens


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_short_prompts_are_clamped_as_in_pyreft(llama, length):
    model, graph, manifest = llama
    adapter = random_adapter(model, positions="f7+l7")
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected = logits(model, ROW[:length]).numpy()
    found = graph.score([ROW[:length]], port_inputs(fold(adapter), manifest, graph.dtype))[0]
    assert np.abs(found - expected).max() <= TOLERANCE


def test_two_scaled_adapters_of_unlike_shape(llama):
    model, graph, manifest = llama
    one = random_adapter(model, seed=1, positions="f2+l2", layers=(0, 2), rank=2)
    two = random_adapter(model, "direft", seed=2, positions="all", layers=(1, 2), rank=5)
    with steered(model, (Interventions.from_adapter(one), 0.7), (Interventions.from_adapter(two), -0.4)):
        expected = logits(model, ROW).numpy()
    edit = concat([scale(fold(one), 0.7), scale(fold(two), -0.4)])
    found = graph.score([ROW], port_inputs(edit, manifest, graph.dtype))[0]
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny model whose matrices are wide enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("wide") / "hf"
    return ModelFolder(make_model(folder, hidden_size=128, intermediate_size=256), "tiny")


@pytest.mark.parametrize(
    ("precision", "device"),
    [
        ("fp16", "cpu"),
        ("fp16", "cuda"),
        ("bf16", "cuda"),
        ("int8", "cpu"),
        ("int8", "cuda"),
        ("int4", "cuda"),
    ],
)
def test_every_precision_is_verified(wide, tmp_path, precision, device):
    manifest = export_model(wide, tmp_path / "export", precision, device=device)
    checked = manifest.verification
    assert checked["rank0_bitwise"]
    assert max(checked["base_error"], checked["steered_error"]) <= TOLERANCE < checked["effect"]
    assert (manifest.precision, manifest.device) == (precision, device)
    expected = (
        "fp32" if precision.startswith("int") and device == "cpu" else precision.replace("int8", "fp16")
    )
    assert manifest.float_type == expected.replace("int4", "fp16")
    settings = json.loads((tmp_path / "export/genai_config.json").read_text())["model"]["decoder"]
    assert bool(settings["session_options"]["provider_options"]) == (device == "cuda")
    assert load_manifest(tmp_path / "export") == manifest


def test_fp16_generates_on_a_cpu(wide, tmp_path):
    manifest = export_model(wide, tmp_path / "export", "fp16")
    graph = GraphSession(tmp_path / "export", manifest, "cpu")
    model = load_model(wide)
    adapter = random_adapter(model, positions="f3+l3")
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected = logits(model, ROW).numpy()
    found = graph.score([ROW], port_inputs(fold(adapter), manifest, graph.dtype))[0]
    assert np.abs(found - expected).max() <= 0.05 < np.abs(expected - logits(model, ROW).numpy()).max()
    assert decode(graph, manifest, fold(adapter), ROW, 4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_exact_graph_reads_16_bit_weights_where_they_are(wide, tmp_path, precision):
    """A float32 copy would take twice the disk and, mapped, twice the memory."""
    folder = tmp_path / "export"
    manifest = export_model(wide, folder, precision, device="cuda")
    before = {path.name for path in folder.iterdir()}
    write_exact(folder / "model.onnx", folder / "exact.onnx")
    assert {path.name for path in folder.iterdir()} - before == {"exact.onnx"}
    graph = ir.load(folder / "exact.onnx")
    weights = [
        value
        for value in graph.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor) and value.dtype != ir.DataType.INT64
    ]
    assert {value.dtype.itemsize for value in weights} == {2}
    exact = replace(manifest, graph="exact.onnx", precision="fp32", float_type="fp32", device="cpu")
    found = GraphSession(folder, exact, "cpu", prepack=False, spare=True).score([ROW], {})[0]
    for value in weights:
        value.const_value, value.dtype = (
            ir.tensor(value.const_value.numpy().astype(np.float32)),
            ir.DataType.FLOAT,
        )
    for node in graph.graph:
        if node.op_type == "Gather" and node.inputs[0] in weights:
            node.outputs[0].dtype = ir.DataType.FLOAT
    ir.save(graph, folder / "copied.onnx")
    copied = GraphSession(folder, replace(exact, graph="copied.onnx"), "cpu", prepack=False, spare=True)
    assert np.array_equal(found, copied.score([ROW], {})[0])


def test_bf16_says_that_it_needs_a_gpu(wide, tmp_path):
    manifest = export_model(wide, tmp_path / "export", "bf16", device="cuda")
    with pytest.raises(ReftEdgeError, match="no CPU kernels; run it with --device cuda, or export with"):
        GraphSession(tmp_path / "export", manifest, "cpu")


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bf16_ports_are_rounded_as_pytorch_rounds(numbers):
    array = np.array(numbers, np.float32)
    expected = torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(_round_to_bfloat16(array), expected)
    value = ort_value(array.reshape(1, -1), bf16=True)
    assert value.data_type() == "tensor(bfloat16)"
    assert value.shape() == [1, len(numbers)]


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "gguf"])
@pytest.mark.parametrize("block_size", [32, 64])
def test_every_quantisation_is_verified_and_smaller(wide, tmp_path, algorithm, block_size):
    quantisation = Quantisation(algorithm, block_size, accuracy_level=1)
    manifest = export_model(wide, tmp_path / "int4", "int4", quantisation=quantisation)
    assert manifest.verification["rank0_bitwise"]
    assert manifest.verification["steered_error"] <= TOLERANCE < manifest.verification["effect"]
    assert manifest.verification["agreement"] < 1
    assert manifest.quantisation == asdict(quantisation)
    assert manifest.base_fingerprint == fingerprint(load_model(wide))
    original = sum(file.stat().st_size for file in wide.path.glob("*.safetensors"))
    assert (tmp_path / "int4/model.onnx.data").stat().st_size < original / 2.5


def test_blocks_may_be_wider_than_a_matrix(wide, tmp_path):
    manifest = export_model(wide, tmp_path / "export", "int4", quantisation=Quantisation("k_quant", 256, 1))
    assert manifest.verification["steered_error"] <= TOLERANCE < manifest.verification["effect"]
    assert 0 < manifest.verification["rounding"] < 0.2


def test_large_models_have_larger_blocks_where_tables_allow_it(tmp_path, monkeypatch):
    assert [build.usual_block_size(weights, 2048) for weights in (999_999_999, 1_000_000_000)] == [32, 128]
    assert build.usual_block_size(8_000_000_000, 2080) == 32
    monkeypatch.setattr(build, "_LARGE", 20_000)
    source = ModelFolder(
        make_model(tmp_path / "hf", hidden_size=128, intermediate_size=256, tie_word_embeddings=False), "tiny"
    )
    manifest = export_model(source, tmp_path / "e", "int4", quantisation=Quantisation("rtn"))
    assert manifest.quantisation["block_size"] == 128
    graph = ir.load(tmp_path / "e/model.onnx").graph
    sizes = [node.attributes["block_size"].as_int() for node in graph if "block_size" in node.attributes]
    assert set(sizes) == {128}
    assert any(node.op_type == "GatherBlockQuantized" for node in graph)


def test_a_shorter_context_has_shorter_tables(wide, tmp_path):
    manifest = export_model(wide, tmp_path / "e", context=64)
    assert manifest.context_length == load_manifest(tmp_path / "e").context_length == 64
    tables = [
        value
        for name, value in ir.load(tmp_path / "e/model.onnx").graph.initializers.items()
        if "cache" in name
    ]
    assert {value.shape[0] for value in tables} == {64}
    for context in (31, 257):
        with pytest.raises(ReftEdgeError, match=f"--context is {context}; tiny has 256, so give 32 to 256"):
            export_model(wide, tmp_path / "e", context=context)


def test_tables_that_depend_on_the_context_are_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    source = ModelFolder(make_model(tmp_path / "hf", rope_parameters=rope), "tiny")
    with pytest.raises(ReftEdgeError, match=r"the rotary tables of tiny \(dynamic\) depend on its context"):
        export_model(source, tmp_path / "e", context=64)


def test_a_table_of_its_own_is_quantised(tmp_path):
    untied = make_model(tmp_path / "hf", hidden_size=128, tie_word_embeddings=False)
    for precision, bits in (("int4", 4), ("int8", 8)):
        export_model(ModelFolder(untied, "tiny"), tmp_path / precision, precision)
        graph = ir.load(tmp_path / precision / "model.onnx").graph
        lookup = next(node for node in graph if node.op_type == "GatherBlockQuantized")
        assert lookup.attributes["bits"].as_int() == bits
        assert lookup.inputs[0].const_value.nbytes == VOCABULARY * 128 * bits // 8


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"precision": "int2"}, "unknown precision 'int2'; choose one of fp32, fp16, bf16, int8, int4"),
        ({"device": "tpu"}, "unknown device 'tpu'; choose one of cpu, cuda"),
        ({"precision": "fp32", "device": "cuda"}, "no fp32 kernel for CUDA; choose --precision fp16 or bf16"),
        ({"precision": "bf16"}, "add --device cuda, or choose --precision fp16"),
        ({"quantisation": Quantisation("gptq")}, "choose one of auto, rtn, k_quant, k_quant_mixed, gguf"),
        ({"quantisation": Quantisation(block_size=48)}, "unknown block size 48; choose one of 16, 32"),
        ({"quantisation": Quantisation(accuracy_level=2)}, "unknown accuracy level 2; choose one of 1, 4"),
    ],
)
def test_impossible_choices_say_what_to_choose(wide, tmp_path, choices, reason):
    with pytest.raises(ReftEdgeError, match=reason):
        export_model(wide, tmp_path / "export", **choices)


def test_ports_only_where_asked(tmp_path, device_folder):
    source = ModelFolder(device_folder / "hf", "tiny-llama")
    manifest = export_model(source, tmp_path / "export", layers="1")
    assert manifest.layers == (1,)
    assert [name for name in manifest.ports if name.startswith("reft.layers.")] == [
        f"reft.layers.1.{part}" for part in ("A", "b", "B", "columns")
    ]
    assert load_manifest(tmp_path / "export") == manifest
    assert sorted(file.name for file in (tmp_path / "export").iterdir()) == [
        "chat_template.jinja",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "reft_edge.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_failed_export_leaves_the_old_one(tmp_path, device_folder, monkeypatch):
    target = tmp_path / "export"
    shutil.copytree(device_folder / "export", target)
    before = (target / "reft_edge.json").read_bytes()
    monkeypatch.setattr(Verification, "failures", lambda self: ["made to fail"])
    with pytest.raises(ReftEdgeError, match="failed its verification and was not kept: made to fail"):
        export_model(ModelFolder(device_folder / "hf", "tiny-llama"), target)
    assert (target / "reft_edge.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_export_leaves_nothing(tmp_path, device_folder, signal_):
    command = [
        sys.executable,
        "-m",
        "reft_edge",
        "export",
        str(device_folder / "hf"),
        "-o",
        str(tmp_path / "e"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal_, signal.SIG_DFL
        ),  # ignored in a shell's background, or by nohup
    )
    while process.poll() is None and not list(tmp_path.glob(".reft-edge-unfinished-*/.work")):
        time.sleep(0.05)
    process.send_signal(signal_)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, list(tmp_path.iterdir())) == (130, []), said
    assert "Traceback" not in said


def test_verification_judges_its_figures():
    good = Verification(base_error=1e-5, steered_error=1e-5, effect=5, agreement=1, rank0_bitwise=True)
    assert good.failures() == []
    bad = Verification(
        base_error=float("nan"), steered_error=0.5, effect=5, agreement=0.2, rank0_bitwise=False
    )
    assert len(bad.failures()) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_port_in_the_wrong_place_fails_verification(tmp_path, wide, monkeypatch, precision):
    """The self-check is real: ports one layer off are found out, whatever the rounding."""
    sites = find_sites

    def shifted(graph, num_layers):
        found = sites(graph, num_layers)
        return [replace(site, place=Place((site.place.layer + 1) % num_layers)) for site in found]

    monkeypatch.setattr("reft_edge.export.decoder.find_blocks", shifted)
    with pytest.raises(ReftEdgeError, match="logits differ from PyTorch's"):
        export_model(wide, tmp_path / "export", precision)
    assert not (tmp_path / "export").exists()


def test_blocks_are_found_by_structure_where_names_tell_nothing(tmp_path, wide, monkeypatch):
    def nameless(graph, num_layers):
        raise ReftEdgeError("no such names")

    monkeypatch.setattr("reft_edge.export.structure.find_sites", nameless)
    manifest = export_model(wide, tmp_path / "export", components=["block"])
    assert manifest.layers == tuple(range(LAYERS))


def test_the_norm_after_a_block_sums_the_edit_in_32_bits(device_folder):
    graph = ir.load(device_folder / "export/model.onnx").graph
    for site in find_sites(graph, LAYERS):
        port = [node for node in graph if (node.name or "").startswith(f"/{site.place.port}/")]
        assert [node.op_type for node in port] == ["Add", "MatMul", "Add", "Gather", "Mul", "MatMul"]
        assert (site.skip.value, site.uses[0].value) == (port[0].outputs[0], port[-1].outputs[0])


def test_other_folders_are_not_overwritten(tmp_path, device_folder):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ReftEdgeError, match="is not empty and was not written by reft-edge"):
        export_model(ModelFolder(device_folder / "hf", "tiny-llama"), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_layer_that_the_model_lacks_is_named(tmp_path, device_folder):
    source = ModelFolder(device_folder / "hf", "tiny-llama")
    with pytest.raises(ReftEdgeError, match="no layer 9"):
        export_model(source, tmp_path / "a", layers="9")
    assert not (tmp_path / "a").exists()


def test_a_graph_without_the_residual_stream_is_refused(device_folder):
    model = ir.load(device_folder / "export/model.onnx")
    with pytest.raises(ReftEdgeError, match=rf"layers \[{LAYERS}, {LAYERS + 1}\]: looked for"):
        find_sites(model.graph, LAYERS + 2)
    with pytest.raises(
        ReftEdgeError,
        match=rf"found {LAYERS} blocks by structure, expected {LAYERS + 2} \(by name: ",
    ):
        find_blocks(model.graph, LAYERS + 2)


def test_an_export_stops_at_the_end_of_a_turn(tmp_path, device_folder):
    source = tmp_path / "hf"
    shutil.copytree(device_folder / "hf", source)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, "eos_token_id": 0}))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|start|>"}))
    manifest = export_model(ModelFolder(source, "tiny-llama"), tmp_path / "export")
    assert manifest.eos_token_ids == (0, 1)
    genai = json.loads((tmp_path / "export/genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [0, 1]
