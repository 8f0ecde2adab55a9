"""The same graph in exact arithmetic.

A graph in 16 bits or with quantised weights differs from the original model by rounding, and a wrong port could hide
behind that. In float32 arithmetic, against a model that has the same rounded weights, it cannot.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_QUANTISED = ("MatMulNBits", "GatherBlockQuantized")


def write_exact(source: Path, target: Path) -> None:
    """Write `source` with float32 in place of 16-bit floats, and with float activations in quantised products.

    `target`, in the same folder, reads the weights of `source`. Those in 16 bits are converted while it runs, each where it
    is read: open it with `spare`, or all of them are in memory in float32. Only the scales of quantised weights are written
    again, to `target.data`.
    """
    model = ir.load(source)
    halves = [
        value
        for value in model.graph.initializers.values()
        if value.dtype in _HALF and value.const_value is not None
    ]
    read = dict.fromkeys(filter(_can_be_read, halves))
    written = [value for value in halves if value not in read]
    stored = any(isinstance(value.const_value, ir.ExternalTensor) for value in written)
    for value in written:
        assert value.const_value is not None
        value.const_value = _widened(value.const_value)
    values = [*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs]
    for node in model.graph:
        values += node.outputs
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALF:
                node.attributes[name] = ir.AttrTensor(name, _constant(attribute.as_tensor()))
            elif node.op_type == "Cast" and name == "to" and ir.DataType(attribute.as_int()) in _HALF:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    for value in values:
        if value.dtype in _HALF and value not in read:
            value.dtype = ir.DataType.FLOAT
    for value in read:
        for number, use in enumerate(tuple(value.uses())):
            _widen_where_read(value, use, f"{value.name}/widened_{number}")
    ir.save(model, target, external_data=f"{target.name}.data" if stored else None)


def _can_be_read(weight: ir.Value) -> bool:
    """Whether a weight can be converted where it is read."""
    quantised = any(use.node.op_type in _QUANTISED for use in weight.uses())
    return isinstance(weight.const_value, ir.ExternalTensor) and not (quantised or weight.is_graph_input())


def _widen_where_read(weight: ir.Value, use: Any, name: str) -> None:
    """Have a node read a weight in float32; of a table, only the rows that it looks up become that."""
    node = use.node
    looked_up = node.op_type == "Gather" and use.idx == 0 and not node.outputs[0].is_graph_output()
    source = node.outputs[0] if looked_up else weight
    readers = tuple(source.uses()) if looked_up else (use,)
    widened = ir.Value(name=f"{name}/output_0", type=ir.TensorType(ir.DataType.FLOAT), shape=source.shape)
    cast = ir.node("Cast", [source], {"to": int(ir.DataType.FLOAT)}, outputs=[widened], name=name)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, widened)
    assert node.graph is not None
    if looked_up:
        assert weight.dtype is not None
        source.dtype = weight.dtype
        node.graph.insert_after(node, cast)
    else:
        node.graph.insert_before(node, cast)


def _widened(stored: ir.TensorProtocol) -> ir.TensorProtocol:
    def widen() -> ir.TensorProtocol:
        content = stored.numpy().astype(np.float32)
        if isinstance(stored, ir.ExternalTensor):
            stored.release()  # what was read of a mapped file counts as this process's memory until then
        return ir.tensor(content)

    return ir.LazyTensor(
        widen,
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(stored.shape.numpy()),
        name=stored.name,
    )


def _constant(stored: ir.TensorProtocol) -> ir.TensorProtocol:
    """A scalar as it was before it was rounded, which the model builder leaves in its name; PyTorch never rounds it."""
    content = stored.numpy().astype(np.float32)
    match = re.fullmatch(r"/model/constants/\w+/([-+.\de]+)", stored.name or "")
    if match and content.size == 1:
        content = np.full_like(content, float(match[1]))
    return ir.tensor(content)
