"""Which execution providers are found and used: stand-ins at the border of onnxruntime, and the real ones that are here."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import devices, onnx_runtime

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
        return self.built_in

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

    def InferenceSession(self, path, options, providers=None):  # noqa: N802
        self.asked["providers"] = providers
        names = [item if isinstance(item, str) else item[0] for item in providers or ()]
        if "hardware" in self.asked:
            names = [self.asked["hardware"][0].ep_name]
        return SimpleNamespace(get_providers=lambda: [*names, CPU] if self.starts else [CPU])


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


def test_a_wheel_is_loaded_once_and_its_best_hardware_is_used(wheels, monkeypatch):
    found = [hardware(OPENVINO, kind) for kind in ("NPU", "CPU", "GPU")]
    fake = FakeRuntime([*found, hardware(f"{OPENVINO}.AUTO", "GPU")])
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    for _ in range(2):
        onnx_runtime.open_graph(Path("model.onnx"), "openvino", provider_options={"cache_dir": "here"})
    assert fake.libraries == [(OPENVINO, "/wheels/libopenvino.so")]
    assert list(fake.asked["hardware"]) == found[2:]
    assert fake.asked["options"] == {"cache_dir": "here"}
    assert fake.asked["providers"] is None


def test_a_provider_of_the_build_itself_is_used_by_its_name(monkeypatch):
    fake = FakeRuntime(built_in=["CoreMLExecutionProvider", CPU])
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    onnx_runtime.open_graph(Path("model.onnx"), "coreml")
    assert fake.asked["providers"] == [("CoreMLExecutionProvider", {}), CPU]
    fake.starts = False
    with pytest.raises(ReftEdgeError, match="could not start its CoreMLExecutionProvider"):
        onnx_runtime.open_graph(Path("model.onnx"), "coreml")


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
    with pytest.raises(ReftEdgeError, match=r"onnxruntime 1.20.0 cannot load .* install onnxruntime 1.23"):
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
