"""Which execution providers are found and used: stand-ins at the border of onnxruntime, and the real ones that are here."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredEncoder, SteeredModel, devices, onnx_runtime, session
from reft_edge.runtime.required_ports import require_ports

OPENVINO = "OpenVINOExecutionProvider"
CPU = "CPUExecutionProvider"


def hardware(provider: str, kind: str, name: str = "", vendor: str = "Intel"):
    return SimpleNamespace(
        ep_name=provider,
        ep_metadata={"FULL_DEVICE_NAME": name} if name else {},
        device=SimpleNamespace(type=SimpleNamespace(name=kind), vendor=vendor),
    )


class FakeRuntime:
    """As much of onnxruntime as finding devices and opening a graph needs; a wheel's library brings `brought`."""

    __version__ = "1.99.0"

    def __init__(self, brought=(), built_in=(CPU,), fails=None, starts=True) -> None:
        self.brought, self.built_in, self.fails, self.starts = list(brought), list(built_in), fails, starts
        self.found, self.libraries, self.asked = [hardware(CPU, "CPU", vendor="AMD")], [], {}

    def get_available_providers(self):
        return [*self.built_in, *({item.ep_name for item in self.brought} if self.libraries else ())]

    def get_ep_devices(self):
        return self.found

    def register_execution_provider_library(self, name, path):
        if self.fails:
            raise RuntimeError(self.fails)
        self.libraries.append((name, path))
        self.found = [*self.found, *self.brought]

    def SessionOptions(self):  # noqa: N802
        asked = self.asked

        class Options:
            def add_session_config_entry(self, name, value):
                asked[name] = value

            def add_provider_for_devices(self, found, options):
                asked["hardware"], asked["options"] = found, options

        return Options()

    def InferenceSession(self, path, options, providers=None, enable_fallback=True):  # noqa: N802
        self.asked["providers"] = providers
        names = [item if isinstance(item, str) else item[0] for item in providers or ()]
        if "hardware" in self.asked:
            names = [self.asked["hardware"][0].ep_name]
        return SimpleNamespace(get_providers=lambda: [*names, CPU] if self.starts else [CPU])


@pytest.fixture
def graph(device_folder) -> Path:
    return device_folder / "export" / "model.onnx"


@pytest.fixture
def wheels(monkeypatch):
    """Of the wheels that bring a provider, only openvino's is installed."""
    module = ModuleType("onnxruntime_ep_openvino")
    module.get_library_path = lambda: "/wheels/libopenvino.so"
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", module)
    monkeypatch.setattr(devices, "_installed", lambda name: name == "onnxruntime_ep_openvino")


def test_auto_is_cuda_or_the_cpu_and_never_a_wheel(wheels):
    fake = FakeRuntime([hardware(OPENVINO, "GPU")])
    assert devices.choose("auto", fake).accelerator.name == "cpu"
    assert fake.libraries == []
    cuda = FakeRuntime(built_in=["CUDAExecutionProvider", OPENVINO, CPU])
    assert devices.choose("auto", cuda).accelerator.name == "cuda"
    assert devices.choose("openvino", cuda) == devices.Choice(devices._BY_NAME["openvino"])


def test_a_wheel_is_loaded_once_and_its_best_hardware_is_used(wheels, graph, monkeypatch):
    found = [hardware(OPENVINO, kind) for kind in ("NPU", "CPU", "GPU")]
    fake = FakeRuntime([*found, hardware(f"{OPENVINO}.AUTO", "GPU")])
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    for _ in range(2):
        onnx_runtime.open_graph(graph, "openvino", provider_options={"cache_dir": "here"})
    assert fake.libraries == [(OPENVINO, "/wheels/libopenvino.so")]
    assert list(fake.asked["hardware"]) == found[2:]
    accurate = '{"GPU": {"EXECUTION_MODE_HINT": "ACCURACY"}}'
    assert fake.asked["options"] == {"load_config": accurate, "cache_dir": "here"}
    assert fake.asked["providers"] is None


def test_a_provider_of_the_build_itself_is_used_by_its_name(graph, monkeypatch):
    fake = FakeRuntime(built_in=["CoreMLExecutionProvider", CPU])
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    onnx_runtime.open_graph(graph, "coreml")
    assert fake.asked["providers"] == [("CoreMLExecutionProvider", {}), CPU]
    fake.starts = False
    with pytest.raises(ReftEdgeError, match="could not start its CoreMLExecutionProvider"):
        onnx_runtime.open_graph(graph, "coreml")


def test_a_kind_of_processor_can_be_named(wheels):
    fake = FakeRuntime([hardware(OPENVINO, "GPU"), hardware(OPENVINO, "NPU")])
    assert [item.device.type.name for item in devices.choose("openvino:npu", fake).hardware] == ["NPU"]
    for kind in ("cpu", ""):
        with pytest.raises(ReftEdgeError, match=rf"finds no '{kind}' here; .* openvino:gpu, openvino:npu"):
            devices.choose(f"openvino:{kind}", fake)
    with pytest.raises(
        ReftEdgeError, match=r"cpu:0 is for .* built into this ONNX Runtime; write --device cpu"
    ):
        devices.choose("cpu:0", fake)


@pytest.mark.parametrize(
    ("device", "fake", "message"),
    [
        ("tpu", FakeRuntime(), "unknown device 'tpu'; choose one of auto, cpu, cuda, openvino"),
        (
            "webgpu",
            FakeRuntime(),
            r"not installed; it comes with: pip install 'reft-edge\[cpu\]' onnxruntime-ep-webgpu; .* here: cpu \(",
        ),
        ("openvino", FakeRuntime(), "onnxruntime-ep-openvino is installed, but finds nothing here"),
        (
            "openvino",
            FakeRuntime(fails="needs API 40\nmore"),
            r"1.99.0 cannot load onnxruntime-ep-openvino[\d. ]*: needs API 40; ",
        ),
    ],
)
def test_a_device_that_cannot_be_used_says_why(wheels, device, fake, message):
    with pytest.raises(ReftEdgeError, match=message):
        devices.choose(device, fake)


def test_an_old_onnxruntime_is_named(wheels):
    old = SimpleNamespace(__version__="1.20.0", get_available_providers=lambda: [CPU])
    with pytest.raises(ReftEdgeError, match=r"onnxruntime 1.20.0 cannot run .* install onnxruntime 1.24"):
        devices.choose("openvino", old)
    assert [state.name for state in devices.list_devices(old) if state.usable] == ["cpu"]


def test_the_list_tells_what_is_here_and_what_each_other_needs(wheels):
    found = devices.list_devices(
        FakeRuntime([hardware(OPENVINO, "GPU", "Intel Arc"), hardware(OPENVINO, "CPU")])
    )
    states = {state.name: state for state in found}
    assert [state.name for state in found if state.usable] == ["cpu", "openvino"]
    assert states["openvino"].hardware == ["GPU, Intel Arc", "CPU, Intel"]
    assert states["mlx"].install.endswith("onnxruntime-ep-mlx")
    assert states["cuda"].install == "pip install 'reft-edge[cuda]'"


def test_the_command_prints_the_list():
    lines = CliRunner().invoke(app, ["devices"], env={"COLUMNS": "200"}).output
    assert "cpu" in lines
    assert "onnxruntime-ep-mlx" in lines or "mlx: " in lines
    printed = json.loads(CliRunner().invoke(app, ["devices", "--json"]).output)
    assert [state["name"] for state in printed["devices"]] == list(devices.NAMES[1:])
    assert printed["devices"][0]["usable"]


def test_ports_without_defaults_answer_as_before(device_folder, graph, monkeypatch):
    """As providers that compile the graph get it; here the CPU does."""
    plain = SteeredModel(device_folder / "export", "cpu")
    monkeypatch.setattr(devices.Choice, "needs_all_inputs", True)
    model = SteeredModel(device_folder / "export", "cpu")
    assert plain.graph.session.get_overridable_initializers()
    assert not model.graph.session.get_overridable_initializers()
    _, defaults = require_ports(graph)
    assert set(defaults) == {value.name for value in plain.graph.session.get_overridable_initializers()}
    assert defaults["reft.prompt_len"].tolist() == [-1]
    assert defaults["reft.layers.0.A"].shape == (1, 64, 0)
    for name in ("first", "everywhere"):
        plain.load_adapter(device_folder / f"{name}.safetensors")
        model.load_adapter(device_folder / f"{name}.safetensors")
    for name in (None, "first", "everywhere"):
        rows = [[1, 2, 3, 4], [5, 6]]
        for ours, theirs in zip(model.logits(rows, name), plain.logits(rows, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert model.generate("Who are you?", name, max_tokens=8) == plain.generate(
            "Who are you?", name, max_tokens=8
        )


def test_an_encoder_without_defaults_answers_as_before(device_folder, monkeypatch):
    texts = ["I loved it.", "Dull."]
    found = []
    for needs in (False, True):
        monkeypatch.setattr(devices.Choice, "needs_all_inputs", needs)
        encoder = SteeredEncoder(device_folder / "encoder", "cpu")
        name = encoder.load_adapter(device_folder / "labels.safetensors")
        found.append([item.probabilities for item in encoder.classify(texts, name)])
    assert found[0] == found[1]


def test_a_provider_that_loses_the_cache_is_refused(device_folder, monkeypatch):
    step = session.BoundSession.step

    def forgetful(self, ids):
        self._cache.length = 0
        return step(self, ids)

    monkeypatch.setattr(session.BoundSession, "step", forgetful)
    monkeypatch.setattr(devices.Choice, "needs_all_inputs", True)
    with pytest.raises(
        ReftEdgeError, match="cpu gives wrong answers with this model: five tokens get other logits"
    ):
        SteeredModel(device_folder / "export", "cpu")


@pytest.mark.parametrize("content", [b"not a graph", b"", b"\x3a\x7f\x01", b"\xff" * 30])
def test_a_damaged_graph_is_a_plain_error(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ReftEdgeError, match="no whole ONNX model"):
        require_ports(tmp_path / "model.onnx")
    with pytest.raises(ReftEdgeError, match=r"cannot read .*: No such file"):
        require_ports(tmp_path / "none.onnx")


@pytest.fixture
def openvino() -> None:
    import onnxruntime

    try:
        devices.choose("openvino", onnxruntime)
    except ReftEdgeError as error:
        pytest.skip(str(error))


def test_openvino_agrees_with_the_cpu(openvino, device_folder):
    models = [SteeredModel(device_folder / "export", device) for device in ("cpu", "openvino")]
    assert models[1].device == "openvino"
    for model in models:
        for name in ("first", "everywhere"):
            model.load_adapter(device_folder / f"{name}.safetensors")
    for adapter in (None, "first", "everywhere", {"first": 0.5, "everywhere": 1.0}):
        rows = [[1, 2, 3, 4, 5], [6, 7]]
        ours, theirs = (model.logits(rows, adapter) for model in models)
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), atol=1e-4)
        ours, theirs = (model.generate("Who are you?", adapter, max_tokens=12) for model in models)
        assert ours == theirs


def test_openvino_multiplies_int4_weights_exactly(openvino, tmp_path):
    from reft_edge.export import Quantisation, export_model
    from reft_edge.model.source import ModelFolder
    from tests.helpers.tiny import make_model

    source = ModelFolder(make_model(tmp_path / "hf", hidden_size=128, intermediate_size=256), "tiny")
    export_model(source, tmp_path / "int4", "int4", quantisation=Quantisation("rtn", accuracy_level=1))
    ours, theirs = (
        SteeredModel(tmp_path / "int4", device).logits([[1, 2, 3, 4, 5]])[0] for device in ("cpu", "openvino")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_openvino_agrees_on_an_encoder(openvino, device_folder):
    found = []
    for device in ("cpu", "openvino"):
        encoder = SteeredEncoder(device_folder / "encoder", device)
        name = encoder.load_adapter(device_folder / "labels.safetensors")
        found.append(encoder.classify(["I loved it."], name)[0].probabilities)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
