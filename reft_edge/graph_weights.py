"""What an exported graph really multiplies with: its 16-bit or quantised weights, read back into a PyTorch model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.manifest import Manifest, load_manifest
from reft_edge.steering import decoder_layers

_HALF = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
_IN_BLOCK = re.compile(r"/model/layers\.(\d+)/\w+/(\w+)/MatMul(?:_Q\d)?")
_ALIASES = {"o_proj": "dense"}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_SPLIT = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


def use_exported_weights(model: Any, folder: Path, base_fingerprint: str) -> Manifest:
    """Give a float32 PyTorch model the weights of an exported folder, in place; returns the folder's manifest.

    Raises ReftEdgeError if there is no exported model in `folder`, or if it is not an export of the model that has
    `base_fingerprint`.
    """
    manifest = load_manifest(folder)
    if manifest.base_fingerprint != base_fingerprint:
        raise ReftEdgeError(
            f"{folder} is an export of {manifest.base_name} with fingerprint {manifest.base_fingerprint}, not of this "
            f"model, which has {base_fingerprint}; give the folder that this model was exported to"
        )
    if manifest.source != "export" and manifest.quantisation:
        raise ReftEdgeError(
            f"{folder} holds a quantised graph that reft-edge did not build, and cannot read the weights of; "
            "train on the model itself, or give a folder that `reft-edge export` wrote"
        )
    use_graph_weights(model, folder / manifest.graph)
    return manifest


def use_graph_weights(model: Any, source: Path) -> None:
    """Give the float32 PyTorch model the weights of the graph file `source`, in place.

    16-bit weights are the model's own, rounded; quantised ones are read from the file and
    dequantised. Raises ReftEdgeError if a quantised matrix has no counterpart in the model.
    """
    graph = ir.load(source).graph
    stored = {value.dtype for value in graph.initializers.values()}
    norms = {value.dtype for name, value in graph.initializers.items() if name.endswith("norm.weight")}
    for half, dtype in _HALF.items():
        if half in stored:
            round_model(model, dtype, round_norms=half in norms)
    blocks = decoder_layers(model)
    for node in graph:
        if node.op_type == "GatherBlockQuantized":
            bits = int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4
            data, scales, zeros = _array(node.inputs[0]), _array(node.inputs[2]), _array(_optional(node, 3))
            embedding = model.get_input_embeddings()
            _assign(embedding, _dequantise(data, scales, zeros, bits, embedding.weight.shape))
        if node.op_type != "MatMulNBits":
            continue
        number = {name: int(node.attributes[name].as_int()) for name in ("bits", "K", "N")}
        weight = _dequantise(
            _array(node.inputs[1]),
            _array(node.inputs[2]),
            _array(_optional(node, 3)),
            number["bits"],
            (number["N"], number["K"]),
        )
        match = _IN_BLOCK.fullmatch(node.name or "")
        if match:
            _assign_in_block(blocks[int(match[1])], match[2], weight)
        elif (node.name or "").startswith("/lm_head/"):
            _assign(model.get_output_embeddings(), weight)
        else:
            raise ReftEdgeError(
                f"cannot check the quantised matrix {node.name}: it is in no block of the model"
            )


def round_model(model: nn.Module, dtype: torch.dtype, round_norms: bool = True) -> None:
    """Round weights and rotary cosines of a float32 model to what a 16-bit graph stores, in place.

    `round_norms`: whether the graph's norms are in 16 bits, too.
    """
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        # Gemma's and Nemotron's norms multiply by 1 + weight, and the graph stores that sum.
        offset = 1.0 if re.search("Gemma.*Norm|Norm1P", type(module).__name__) else 0.0
        for parameter in module.parameters(recurse=False):
            plus = offset if parameter is getattr(module, "weight", None) else 0.0
            if round_norms or not is_norm:
                parameter.data = (parameter.data + plus).to(dtype).float() - plus
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(
                lambda _module, _inputs, out: tuple(x.to(dtype).float() for x in out)
            )


def _assign_in_block(block: nn.Module, name: str, weight: Tensor) -> None:
    linear = {
        path.rsplit(".", 1)[-1]: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    name = name if name in linear else _ALIASES.get(name, name)
    if name in linear:
        _assign(linear[name], weight)
    elif name in _FUSED and all(part in linear for part in _FUSED[name]):
        parts = [linear[part] for part in _FUSED[name]]
        for part, rows in zip(parts, torch.split(weight, [part.out_features for part in parts]), strict=True):
            _assign(part, rows)
    elif name in _SPLIT and _SPLIT[name][0] in linear:
        whole, half = _SPLIT[name]
        size = linear[whole].out_features // 2
        weight = _without_means(weight, linear[whole].in_features)
        linear[whole].weight.data[half * size : (half + 1) * size] = weight
    else:
        raise ReftEdgeError(
            f"cannot check the quantised matrix {name}: the block has {', '.join(sorted(linear))}"
        )


def _without_means(weight: Tensor, columns: int) -> Tensor:
    """`[out, columns]` of a matrix that also multiplies the mean of each 32 activations, with further columns
    (`reft_edge.export.gguf_blocks`)."""
    means = columns // 32
    if weight.shape[1] not in (columns + means, columns + means + -means % 32):
        return weight
    of_means = weight[:, columns : columns + means]
    return weight[:, :columns] + of_means.repeat_interleave(32, dim=1) / 32


def _assign(module: Any, weight: Tensor) -> None:
    weight = _without_means(weight, module.weight.shape[1])
    if module.weight.shape != weight.shape:
        raise ReftEdgeError(
            f"a quantised matrix is {list(weight.shape)}, the model's {list(module.weight.shape)}"
        )
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)


def _dequantise(data: Any, scales: Any, zeros: Any, bits: int, shape: tuple[int, ...]) -> Tensor:
    """ONNX Runtime's blockwise layout: (q − zero point) · scale, low bits first, blocks along the last axis."""
    rows, columns = shape
    q = _unpack(data.reshape(rows, -1), bits)
    scales = scales.reshape(rows, -1)
    blocks = scales.shape[1]
    size = q.shape[1] // blocks
    zero = (
        np.full((rows, blocks), 1 << (bits - 1))
        if zeros is None
        else _unpack(zeros.reshape(rows, -1), bits)[:, :blocks]
    )
    values = (q.reshape(rows, blocks, size) - zero[..., None].astype(np.float32)) * scales[..., None].astype(
        np.float32
    )
    return torch.from_numpy(values.reshape(rows, -1)[:, :columns].astype(np.float32))


def _unpack(data: Any, bits: int) -> NDArray[np.float32]:
    if bits == 8:
        return data.astype(np.float32)  # type: ignore[no-any-return]
    low, high = data & 0xF, data >> 4
    return np.stack([low, high], axis=-1).reshape(len(data), -1).astype(np.float32)  # type: ignore[no-any-return]


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _array(value: ir.Value | None) -> Any:
    """An initializer's content as bytes or floats, looked up through a reshape; None if the input is absent."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape":
        return _array(producer.inputs[0])
    if value.const_value is None:
        raise ReftEdgeError(f"the weight {value.name} is not stored in the graph")
    return value.const_value.numpy()
