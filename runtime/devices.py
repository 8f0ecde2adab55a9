"""What ONNX Runtime can compute with here: its own execution providers, and those that come as wheels of their own."""

from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from reft_edge.errors import ReftEdgeError


@dataclass(frozen=True)
class Accelerator:
    """An execution provider that reft-edge knows by a short name."""

    name: str
    """What `--device` takes."""
    provider: str
    """ONNX Runtime's name."""
    runs_on: str
    install: str
    """The command that brings it."""
    module: str | None = None
    """Of the wheel with the provider's library; None for one that is built into a build of ONNX Runtime."""
    wheel: str | None = None
    """That wheel's name."""


_FIRST_WITH_WHEELS = (1, 24)
"""1.23 loads them, and then hands OpenVINO's inputs without their shapes."""
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def _plugin(name: str, provider: str, runs_on: str, wheel: str, install: str = "") -> Accelerator:
    install = install or f"pip install 'reft-edge[cpu]' {wheel}"
    return Accelerator(name, provider, runs_on, install, wheel.replace("-", "_"), wheel)


ACCELERATORS: tuple[Accelerator, ...] = (
    Accelerator("cpu", CPU, "any CPU", "pip install 'reft-edge[cpu]'"),
    Accelerator("cuda", CUDA, "NVIDIA GPUs", "pip install 'reft-edge[cuda]'"),
    _plugin(
        "openvino",
        "OpenVINOExecutionProvider",
        "Intel CPUs, GPUs and NPUs",
        "onnxruntime-ep-openvino",
        "pip install 'reft-edge[openvino]'",
    ),
    _plugin("webgpu", "WebGpuExecutionProvider", "GPUs with Vulkan, Metal or D3D12", "onnxruntime-ep-webgpu"),
    _plugin("mlx", "MLXExecutionProvider", "Apple Silicon", "onnxruntime-ep-mlx"),
    _plugin(
        "tensorrt-rtx", "NvTensorRTRTXExecutionProvider", "NVIDIA RTX GPUs", "onnxruntime-ep-nv-tensorrt-rtx"
    ),
    _plugin("qnn", "QNNExecutionProvider", "Qualcomm NPUs and GPUs", "onnxruntime-qnn"),
    Accelerator("coreml", "CoreMLExecutionProvider", "Apple devices", "pip install onnxruntime (on macOS)"),
    Accelerator("directml", "DmlExecutionProvider", "GPUs on Windows", "pip install onnxruntime-directml"),
    Accelerator("migraphx", "MIGraphXExecutionProvider", "AMD GPUs", "pip install onnxruntime-migraphx"),
)
NAMES = ("auto", *(known.name for known in ACCELERATORS))
_BY_NAME = {known.name: known for known in ACCELERATORS}


@dataclass(frozen=True)
class Choice:
    """A device that ONNX Runtime can be asked for."""

    accelerator: Accelerator
    hardware: tuple[Any, ...] = ()
    """ONNX Runtime's devices of a provider that came as a wheel; empty for one that is built in."""

    @property
    def needs_all_inputs(self) -> bool:
        """Whether a run must bring every input, since the provider may take one with a default for a constant."""
        return self.accelerator.provider not in (CPU, CUDA)


@dataclass(frozen=True)
class DeviceState:
    """What became of one accelerator on this machine."""

    name: str
    provider: str
    runs_on: str
    usable: bool
    hardware: list[str] = field(default_factory=list)
    """What it would compute with here, where it tells."""
    problem: str | None = None
    """Why it cannot be used."""
    install: str | None = None
    """The command that brings it, where that is what is missing."""


def choose(device: str, ort: Any) -> Choice:
    """The accelerator of that name, ready to be used; `auto` takes CUDA where ONNX Runtime has it, else the CPU. A name such
    as `openvino:npu` says which kind of processor is meant, where a provider that came as a wheel finds several.

    Raises ReftEdgeError for an unknown name, and for one that is not installed or finds nothing to compute with here.
    """
    device, colon, kind = device.partition(":")
    if device not in NAMES:
        raise ReftEdgeError(f"unknown device {device!r}; choose one of {', '.join(NAMES)}")
    if device == "auto":
        device = "cuda" if CUDA in ort.get_available_providers() else "cpu"
    known = _BY_NAME[device]
    if _built_in(known, ort):
        if colon:
            raise ReftEdgeError(
                f"--device {known.name}:{kind} is for a provider from a package of its own, and {known.provider} is built "
                f"into this ONNX Runtime; write --device {known.name}, and --provider-option for its options"
            )
        return Choice(known)
    if known.module is None or not _installed(known.module):
        raise _missing(known, ort)
    try:
        found = _hardware(known, ort)
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{error}; use --device cpu") from error
    wanted = [item for item in found if not colon or item.device.type.name == kind.upper()]
    if not wanted:
        kinds = ", ".join(f"{known.name}:{item.device.type.name.lower()}" for item in found)
        raise ReftEdgeError(f"{known.wheel} finds no {kind!r} here; choose one of {kinds}")
    return Choice(known, tuple(wanted))


def list_devices(ort: Any) -> list[DeviceState]:
    """The state of every accelerator that reft-edge knows, in the order of `--device`."""
    return [_state(known, ort) for known in ACCELERATORS]


def _state(known: Accelerator, ort: Any) -> DeviceState:
    def state(usable: bool, **found: Any) -> DeviceState:
        return DeviceState(known.name, known.provider, known.runs_on, usable, **found)

    if _built_in(known, ort):
        return state(True)
    if known.module is None or not _installed(known.module):
        return state(False, problem="not installed", install=known.install)
    try:
        found = _hardware(known, ort)
    except ReftEdgeError as error:
        return state(False, problem=str(error))
    return state(True, hardware=[_described(item) for item in found])


def _missing(known: Accelerator, ort: Any) -> ReftEdgeError:
    if known.name == "cuda":
        return ReftEdgeError(
            f"this ONNX Runtime has no CUDA provider (it has {', '.join(ort.get_available_providers())}); "
            "install reft-edge[cuda] in place of reft-edge[cpu], or use --device cpu"
        )
    usable = ", ".join(state.name for state in list_devices(ort) if state.usable)
    return ReftEdgeError(
        f"--device {known.name} ({known.runs_on}) is not installed; it comes with: {known.install}; "
        f"or use one that works here: {usable} (`reft-edge devices` lists them all)"
    )


def _built_in(known: Accelerator, ort: Any) -> bool:
    """Whether this build of ONNX Runtime has the provider; one that was loaded from a wheel is listed like its own."""
    loaded = known.module is not None and hasattr(ort, "get_ep_devices") and _devices_of(known.provider, ort)
    return known.provider in ort.get_available_providers() and not loaded


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _hardware(known: Accelerator, ort: Any) -> list[Any]:
    """ONNX Runtime's devices of a provider whose wheel is installed, the best first.

    Raises ReftEdgeError if its library cannot be loaded or it finds nothing to compute with.
    """
    release = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if release < _FIRST_WITH_WHEELS:
        raise ReftEdgeError(
            f"onnxruntime {ort.__version__} cannot run {known.wheel}; install onnxruntime 1.24 or newer"
        )
    if not (found := _devices_of(known.provider, ort)):
        _register(known, ort)
        found = _devices_of(known.provider, ort)
    if not found:
        raise ReftEdgeError(
            f"{known.wheel} is installed, but finds nothing here that it can compute with "
            f"(it is for {known.runs_on})"
        )
    order = {"GPU": 0, "CPU": 1}
    return sorted(found, key=lambda item: order.get(item.device.type.name, 2))


def _devices_of(provider: str, ort: Any) -> list[Any]:
    return [item for item in ort.get_ep_devices() if item.ep_name == provider]


def _register(known: Accelerator, ort: Any) -> None:
    """Have ONNX Runtime load the provider's library; once more is no error."""
    try:
        module = import_module(str(known.module))
        path = getattr(module, "get_library_path", None) or module.library_path
        ort.register_execution_provider_library(known.provider, path())
    except Exception as error:  # ONNX Runtime's exceptions share no class, and each wheel has its own
        if "already registered" in str(error):
            return
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ReftEdgeError(
            f"ONNX Runtime {ort.__version__} cannot load {known.wheel}{_release(known)}: {reason}; "
            "install versions that go together"
        ) from error


def _release(known: Accelerator) -> str:
    try:
        return f" {version(str(known.wheel))}"
    except PackageNotFoundError:
        return ""


def _described(item: Any) -> str:
    """Such as `GPU, Intel Arc`."""
    name = item.ep_metadata.get("FULL_DEVICE_NAME") or item.device.vendor
    return f"{item.device.type.name}, {name}" if name else str(item.device.type.name)
