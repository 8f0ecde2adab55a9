"""The same graph in exact arithmetic.

A graph in 16 bits or with quantised weights differs from the original model by rounding, and a wrong port could hide
behind that. In float32 arithmetic, against a model that has the same rounded weights, it cannot.
"""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def write_exact(source: Path, target: Path) -> None:
    """Write `source` with float32 in place of 16-bit floats, and with float activations in quantised products.

    Weights are converted one at a time; `target.data` beside it holds them. Where none are in 16 bits, `target`, in the same
    folder, reads those of `source`.
    """
    model = ir.load(source)
    halves = [
        value
        for value in model.graph.initializers.values()
        if value.dtype in _HALF and value.const_value is not None
    ]
    for value in halves:
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
        if value.dtype in _HALF:
            value.dtype = ir.DataType.FLOAT
    ir.save(model, target, external_data=f"{target.name}.data" if halves else None)


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
