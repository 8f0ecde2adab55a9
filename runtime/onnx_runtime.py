"""ONNX Runtime itself: opening a graph, devices, values in the graph's number types, and failures in plain words."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.devices import CPU, CUDA, Choice, choose
from reft_edge.runtime.memory import NoMemoryError
from reft_edge.runtime.required_ports import require_ports

HOST_TYPES: dict[str, np.dtype[np.generic]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),
}
"""What numpy holds in place of each float type of a graph."""
ONNX_BFLOAT16 = 16
ELEMENT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ONNX_BFLOAT16,
    "tensor(int8)": np.int8,
}
OWN_KEEP = "num_logits_to_keep"
"""An input of some graphs from elsewhere: how many of the last tokens get logits, 0 for all."""
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a graph that is given as bytes has its weights."""
_NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory")
"""How ONNX Runtime says so, of which it has no exception."""


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module. Raises ReftEdgeError that names the two extras if it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ReftEdgeError(
            "ONNX Runtime is not installed; install reft-edge with one of its extras: "
            "pip install 'reft-edge[cpu]' or pip install 'reft-edge[cuda]'"
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


def check_cpu(manifest: Manifest) -> None:
    """Raise ReftEdgeError if the folder's graph can only run on a GPU."""
    if manifest.precision == "bf16":
        raise ReftEdgeError(
            f"this folder holds {manifest.base_name} in bf16, for which ONNX Runtime has no CPU kernels; "
            "run it with --device cuda, or export with --precision fp32, fp16, int8 or int4"
        )


def open_graph(
    path: Path,
    device: str = "auto",
    threads: int | None = None,
    prepack: bool = True,
    fuse: bool = True,
    provider_options: Mapping[str, str] | None = None,
    changed: bytes | None = None,
    spare: bool = False,
) -> Any:
    """An InferenceSession. `threads`: intra-op threads, by default one a core this process may use. They wait for work by
    spinning, but not where there are more of them than cores, since spinning threads would then keep others from their work.

    `provider_options`: of the device's execution provider, beside or in place of what is chosen here (CUDA: TF32 off, an
    arena that grows as asked; OpenVINO: its accuracy mode).
    `prepack`: keep weights in the layout that is fastest to multiply with, at the cost of memory for a second copy.
    `changed`: the graph to run in place of the one in `path`, with the weights that are beside that.
    `fuse`: let ONNX Runtime merge neighbouring nodes into one that may round otherwise.
    `spare`: as little memory as possible. Nodes run as they stand, in the graph's order, and memory is given back at once.

    Raises ReftEdgeError if the graph cannot be loaded, if a device was asked for and did not start, for fewer than 1 thread,
    or for options of a provider that is not used.
    """
    if threads is not None and threads < 1:
        raise ReftEdgeError(f"threads is {threads}; expected 1 or more, or none for one a core")
    ort = import_onnxruntime()
    chosen = choose(device, ort)
    if provider_options and chosen.accelerator.provider == CPU:
        raise ReftEdgeError(
            f"provider options ({', '.join(provider_options)}) are for CUDA and other accelerators, and this runs on the "
            "CPU; leave them out"
        )
    options = _session_options(ort, threads, prepack, fuse)
    if spare:
        _spare_memory(ort, options)
    model: str | bytes = str(path) if changed is None else changed
    if chosen.needs_all_inputs:
        model = require_ports(path)[0]
    if not isinstance(model, str):
        options.add_session_config_entry(_DATA_FOLDER, str(path.parent))
    with plain_failure():
        session = ort.InferenceSession(model, options, **_providers(chosen, options, provider_options or {}))
    if device != "auto" and chosen.accelerator.provider not in session.get_providers():
        raise _not_started(chosen)
    return session


def _session_options(ort: Any, threads: int | None, prepack: bool, fuse: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = (
        4  # else a warning for every overridable initializer; errors come as exceptions
    )
    cores = _usable_cores()
    options.intra_op_num_threads = threads or cores
    if options.intra_op_num_threads > cores:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not fuse:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _spare_memory(ort: Any, options: Any) -> None:
    # By default what depends on no input, such as weights in another type, is computed before all else and kept.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False


def _providers(chosen: Choice, options: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """What InferenceSession is told of a provider that is built in; one from a wheel is told to `options`."""
    provider = chosen.accelerator.provider
    if provider == CPU:
        return {"providers": [CPU]}
    settings = {**_exact(chosen), **given}
    if chosen.hardware:
        options.add_provider_for_devices(list(chosen.hardware[:1]), settings)
        return {"enable_fallback": False}
    asked = {"providers": [(provider, settings), CPU]}
    return asked if provider == CUDA else {**asked, "enable_fallback": False}


def _exact(chosen: Choice) -> dict[str, str]:
    """Options that keep a provider from computing in fewer bits than the graph says."""
    if chosen.accelerator.provider == CUDA:
        return {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    if chosen.accelerator.name == "openvino":
        kind = chosen.hardware[0].device.type.name if chosen.hardware else "CPU"
        return {"load_config": json.dumps({kind: {"EXECUTION_MODE_HINT": "ACCURACY"}})}
    return {}


def _not_started(chosen: Choice) -> ReftEdgeError:
    name, provider = chosen.accelerator.name, chosen.accelerator.provider
    if provider == CUDA:
        return ReftEdgeError(
            "CUDA was asked for, but ONNX Runtime could not start its CUDA provider; "
            "check the driver and the CUDA libraries, or use --device cpu"
        )
    return ReftEdgeError(
        f"{name} was asked for, but ONNX Runtime could not start its {provider}; check its driver, or use --device cpu"
    )


def ort_value(array: NDArray[np.generic], bf16: bool = False, device: str = "cpu") -> Any:
    """An OrtValue of an array; its float32 numbers rounded to bfloat16 if `bf16`. On the CPU, others than those lie in the
    array's own memory."""
    ort_value_type = import_onnxruntime().OrtValue
    if bf16 and array.dtype == np.float32:
        value = ort_value_type.ortvalue_from_shape_and_type(list(array.shape), ONNX_BFLOAT16, device)
        value.update_inplace(_round_to_bfloat16(array.astype(np.float32, copy=False)))
        return value
    return ort_value_type.ortvalue_from_numpy(array, device)


def zero_value(shape: Sequence[int], kind: Any, device: str) -> Any:
    """An OrtValue of zeros. `kind`: a numpy type, or ONNX's number of one that numpy lacks."""
    value = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(shape), kind, device)
    value.update_inplace(np.zeros(shape, np.uint16 if kind == ONNX_BFLOAT16 else kind))
    return value


def _round_to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def plain_feeds(session: Any, row: Sequence[int], head_size: int) -> dict[str, NDArray[np.generic]]:
    """What a session's graph needs to run one row of tokens without a KV cache behind it; no ports."""
    ids = np.array([row], np.int64)
    feeds: dict[str, NDArray[np.generic]] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name == OWN_KEEP:
            feeds[value.name] = np.zeros([1] * len(value.shape), np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(len(row))[None]
        elif value.name.startswith("past_key_values."):
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = np.zeros((1, value.shape[1], 0, head_size), kind)
    return feeds


@contextmanager
def plain_failure() -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which share no class but Exception, into a ReftEdgeError with their first line, and
    into a NoMemoryError those that say that there is no memory."""
    try:
        yield
    except ReftEdgeError:
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        missing = isinstance(error, MemoryError) or any(said in text for said in _NO_MEMORY)
        kind = NoMemoryError if missing else ReftEdgeError
        raise kind(f"ONNX Runtime failed: {text.splitlines()[0]}") from error


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
