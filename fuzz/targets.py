"""What is fuzzed: readers of files that may come from strangers, each as a function of the file's bytes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from checkpoint_targets import checkpoint_target
from foreign_targets import (
    adapterhub_config_target,
    control_vector_target,
    gguf_model_target,
    onnx_adapter_target,
    pyreft_config_target,
    pyreft_target,
    torch_pickle_target,
    torch_zip_target,
)
from harness import Target
from http_targets import registry_target, web_target
from own_targets import adapter_target, manifest_target, signature_target, trusted_keys_target
from repository_targets import index_target, oci_manifest_target
from server_targets import server_bodies_target
from template_targets import grown_template_target, template_target

TARGETS: dict[str, Callable[[Path], Target]] = {
    "adapter": adapter_target,
    "checkpoint": checkpoint_target,
    "manifest": manifest_target,
    "trusted-keys": trusted_keys_target,
    "signature": signature_target,
    "pyreft": pyreft_target,
    "torch-zip": torch_zip_target,
    "torch-pickle": torch_pickle_target,
    "pyreft-config": pyreft_config_target,
    "control-vector": control_vector_target,
    "adapterhub-config": adapterhub_config_target,
    "gguf-model": gguf_model_target,
    "onnx-adapter": onnx_adapter_target,
    "index": index_target,
    "oci-manifest": oci_manifest_target,
    "template": template_target,
    "grown-template": grown_template_target,
    "web": web_target,
    "registry": registry_target,
    "server-bodies": server_bodies_target,
}


def make_target(name: str) -> Target:
    """A target with a scratch folder of its own, in memory where the machine has /dev/shm."""
    memory = Path("/dev/shm")
    return TARGETS[name](
        Path(tempfile.mkdtemp(prefix="reft-edge-fuzz-", dir=memory if memory.is_dir() else None))
    )
