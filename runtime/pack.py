"""Packing an adapter for stock runtimes: a `.onnx_adapter` for onnxruntime and onnxruntime-genai.

Such a runtime sets no prompt length: a position spec is right for the first prompt of a conversation, given in one run.
"""

import tempfile
from pathlib import Path

from reft_edge.adapter import fold, load_adapter
from reft_edge.algebra import scale
from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically
from reft_edge.manifest import load_manifest
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.session import HOST_TYPES, import_onnxruntime, ort_value


def pack_adapter(adapter_path: Path, folder: Path, output: Path, factor: float = 1.0) -> int:
    """Write `output` for the exported `folder`; returns its size in bytes.

    Raises AdapterFileError, BaseMismatchError, or ReftEdgeError if the adapter does not fit or the file cannot be written.
    """
    ort = import_onnxruntime()
    manifest = load_manifest(folder)
    adapter = load_adapter(adapter_path)
    manifest.check_base(adapter.config.base_fingerprint, str(adapter_path), adapter.config.base_name)
    if adapter.config.labels:
        raise ReftEdgeError(
            f"{adapter_path} has a classification head, which an .onnx_adapter cannot carry; "
            "run it with reft-edge"
        )
    inputs = port_inputs(scale(fold(adapter), factor), manifest, HOST_TYPES[manifest.float_type])
    packed = ort.AdapterFormat()
    packed.set_adapter_version(1)
    packed.set_model_version(1)
    bf16 = manifest.float_type == "bf16"
    packed.set_parameters({name: ort_value(array, bf16) for name, array in inputs.items()})
    with tempfile.TemporaryDirectory() as folder_of_one:
        temporary = Path(folder_of_one) / "packed"
        packed.export_adapter(str(temporary))
        content = temporary.read_bytes()
    write_atomically(output, content)
    return len(content)
