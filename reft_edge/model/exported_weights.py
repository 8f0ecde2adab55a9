"""What an exported graph really multiplies with: its 16-bit or quantised weights, read back into a PyTorch model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.manifest import Manifest, load_manifest

_HALF = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
_IN_BLOCK = re.compile(r"/model/layers\.(\d+)/\w+/(\w+)/MatMul(?:_Q\d)?")
_ALIASES = {"o_proj": "dense"}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_AT_ONCE = 1 << 22  # weights that are dequantised at a time
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
    table: _Quantised | None = None
    for node in graph:
        if node.op_type == "GatherBlockQuantized":
            table = _Quantised.of_lookup(node, model.get_input_embeddings().weight.shape)
            _assign(model.get_input_embeddings(), table)
        if node.op_type != "MatMulNBits":
            continue
        weight = _Quantised.of_product(node)
        match = _IN_BLOCK.fullmatch(node.name or "")
        if match:
            _assign_in_block(blocks[int(match[1])], match[2], weight)
        elif (node.name or "").startswith("/lm_head/"):
            _assign_head(model, weight, table)
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


@dataclass(frozen=True)
class _Quantised:
    """A matrix in ONNX Runtime's blockwise layout: (q − zero point) · scale, low bits first, blocks along the last axis."""

    data: Any
    """uint8, `bits` a number"""
    place: tuple[Any, ...] | None
    """Of `data`: its file, offset and length, if it is in a file of its own."""
    scales: Any
    zeros: Any
    """None for the middle."""
    bits: int
    size: int
    """Columns that share a scale."""
    rows: int
    columns: int
    """With those that multiply means (`reft_edge.export.carry`)."""

    @classmethod
    def of_product(cls, node: ir.Node) -> "_Quantised":
        """The weight of a MatMulNBits."""
        bits, size, rows, columns = (
            int(node.attributes[name].as_int()) for name in ("bits", "block_size", "N", "K")
        )
        data, scales, zeros = (_array(_optional(node, index)) for index in (1, 2, 3))
        return cls(data, _place(node.inputs[1]), scales, zeros, bits, size, rows, columns)

    @classmethod
    def of_lookup(cls, node: ir.Node, shape: Sequence[int]) -> "_Quantised":
        """The table of a GatherBlockQuantized, of a model whose embedding has `shape`."""
        bits = int(node.attributes["bits"].as_int()) if "bits" in node.attributes else 4
        data, scales, zeros = (_array(_optional(node, index)) for index in (0, 2, 3))
        size = int(node.attributes["block_size"].as_int())
        return cls(data, _place(node.inputs[0]), scales, zeros, bits, size, shape[0], shape[1])

    def equals(self, other: "_Quantised | None") -> bool:
        """Whether both are the same numbers."""
        if other is None:
            return False
        pairs = [(self.scales, other.scales), (self.zeros, other.zeros)]
        if self.place is None or self.place != other.place:
            pairs.append((self.data, other.data))
        return all(
            a is b or (a is not None and b is not None and np.array_equal(a.reshape(-1), b.reshape(-1)))
            for a, b in pairs
        )

    def dequantised(self, start: int, stop: int) -> NDArray[np.float32]:
        """Some of the rows, `[stop − start, columns]`."""
        rows = slice(start, stop)
        scales = self.scales.reshape(self.rows, -1)[rows].astype(np.float32)[..., None]
        q = _unpack(self.data.reshape(self.rows, -1)[rows], self.bits).reshape(*scales.shape[:2], -1)
        zeros: Any = np.float32(1 << (self.bits - 1))
        if self.zeros is not None:
            unpacked = _unpack(self.zeros.reshape(self.rows, -1)[rows], self.bits)
            zeros = unpacked[:, : scales.shape[1], None].astype(np.float32)
        values = q.astype(np.float32)
        values -= zeros
        values *= scales
        found: NDArray[np.float32] = values.reshape(len(values), -1)[:, : self.columns]
        return found


def _assign_head(model: Any, weight: _Quantised, table: _Quantised | None) -> None:
    """Give the model's head its weight, on its own where PyTorch shares it with an embedding that the graph has otherwise."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        if weight.equals(table):
            return
        head.weight = nn.Parameter(torch.empty_like(embedding.weight), requires_grad=False)
    _assign(head, weight)


def _assign_in_block(block: nn.Module, name: str, weight: _Quantised) -> None:
    linear = {
        path.rsplit(".", 1)[-1]: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    name = name if name in linear else _ALIASES.get(name, name)
    if name in linear:
        _assign(linear[name], weight)
    elif name in _FUSED and all(part in linear for part in _FUSED[name]):
        _copy([linear[part].weight for part in _FUSED[name]], weight)
    elif name in _SPLIT and _SPLIT[name][0] in linear:
        whole, half = _SPLIT[name]
        _copy([linear[whole].weight.data.chunk(2)[half]], weight)
    else:
        raise ReftEdgeError(
            f"cannot check the quantised matrix {name}: the block has {', '.join(sorted(linear))}"
        )


def _assign(module: Any, weight: _Quantised) -> None:
    _copy([module.weight], weight)


def _copy(targets: Sequence[Tensor], weight: _Quantised) -> None:
    """Write a matrix's rows over those of one tensor after the other, some at a time: it may be larger than what memory has
    left."""
    rows, columns = sum(len(target) for target in targets), targets[0].shape[1]
    first = _without_means(weight.dequantised(0, 1), columns, weight.size)
    if (weight.rows, first.shape[1]) != (rows, columns):
        raise ReftEdgeError(
            f"a quantised matrix is {[weight.rows, first.shape[1]]}, the model's {[rows, columns]}"
        )
    step = max(1, _AT_ONCE // weight.columns)
    begin = 0
    for target in targets:
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            values = weight.dequantised(begin + start, begin + stop)
            target.data[start:stop] = torch.from_numpy(_without_means(values, columns, weight.size))
        begin += len(target)


def _without_means(weight: NDArray[np.float32], columns: int, size: int) -> NDArray[np.float32]:
    """`[out, columns]` of a matrix that also multiplies the mean of each `size` activations, with further columns
    (`reft_edge.export.carry`)."""
    means = columns // size
    if weight.shape[1] not in (columns + means, columns + means + -means % 32):
        return weight
    of_means = weight[:, columns : columns + means]
    whole: NDArray[np.float32] = weight[:, :columns] + of_means.repeat(size, axis=1) / np.float32(size)
    return whole


def _unpack(data: Any, bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return np.asarray(data)
    return np.stack([data & 0xF, data >> 4], axis=-1).reshape(len(data), -1)


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _place(value: ir.Value | None) -> tuple[Any, ...] | None:
    stored = None if value is None else _initializer(value).const_value
    return (stored.path, stored.offset, stored.length) if isinstance(stored, ir.ExternalTensor) else None


def _initializer(value: ir.Value) -> ir.Value:
    """What a value is stored in, looked up through a reshape."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        return _initializer(producer.inputs[0])
    return value


def _array(value: ir.Value | None) -> Any:
    """An initializer's content as bytes or floats; None if the input is absent."""
    if value is None:
        return None
    stored = _initializer(value).const_value
    if stored is None:
        raise ReftEdgeError(f"the weight {value.name} is not stored in the graph")
    return stored.numpy()
