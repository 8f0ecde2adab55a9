"""Tables of rotary cosines and sines as nodes: ONNX Runtime computes them once, when it loads the graph.

Stored, they are 4 · head size bytes a position; of a small model with a long context, a fifth of its file.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

_TINY = 2.0**-30  # the sine of so small an angle is the angle itself


@dataclass(frozen=True)
class Rotation:
    """What a pair of tables is computed from: cos(position · frequency) and the sine, for positions from 0."""

    cosines: str
    sines: str
    """The tables' names in the graph."""
    positions: int
    frequencies: NDArray[np.float32]
    """One a column, and maybe more."""


def frequencies_of(builder: Any, tables: Any) -> Any:
    """The frequencies, one a column, that onnxruntime-genai's builder makes tables from.

    `tables` is its method for that: it is asked for the sines of position 2⁻³⁰.
    """
    settings = dict(builder.rope_attrs)
    try:
        builder.rope_attrs.update(cache_length=2, position_scale=_TINY, mscale=1.0)
        return tables(builder)[1][1] / _TINY
    finally:
        builder.rope_attrs.clear()
        builder.rope_attrs.update(settings)


def compute_tables(graph: ir.Graph, rotation: Rotation) -> None:
    """Put nodes in place of stored tables, if the tables are exactly what these frequencies give."""
    stored = [graph.initializers.get(name) for name in (rotation.cosines, rotation.sines)]
    if stored[0] is None or stored[0].const_value is None:
        return
    used = rotation.frequencies[: stored[0].const_value.shape.numpy()[1]]
    angles = torch.outer(torch.arange(rotation.positions).float(), torch.from_numpy(used))
    for value, expected in zip(stored, (angles.cos(), angles.sin()), strict=True):
        if value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
            return
        if not np.array_equal(value.const_value.numpy(), expected.numpy()):
            return
    first = next((node for node in graph), None)
    assert first is not None
    name = f"/model/rotary/{rotation.cosines}"
    numbers = [
        _constant(f"{name}/{what}", np.array(content, np.float32))
        for what, content in (("from", 0), ("to", rotation.positions), ("step", 1))
    ]
    frequencies = _constant(f"{name}/frequencies", used[None])
    axis = _constant(f"{name}/axis", np.array([1], np.int64))
    positions = _node("Range", [node.outputs[0] for node in numbers], f"{name}/positions")
    column = _node("Unsqueeze", [positions.outputs[0], axis.outputs[0]], f"{name}/column")
    angle = _node("Mul", [column.outputs[0], frequencies.outputs[0]], f"{name}/angles")
    new = [*numbers, frequencies, axis, positions, column, angle]
    for value, op in zip(stored, ("Cos", "Sin"), strict=True):
        assert value is not None
        table = _node(op, [angle.outputs[0]], f"/model/rotary/{value.name}/{op}")
        table.outputs[0].shape = value.shape
        value.replace_all_uses_with(table.outputs[0])
        del graph.initializers[str(value.name)]
        new.append(table)
    graph.insert_before(first, new)


def _node(op: str, inputs: list[ir.Value], name: str) -> ir.Node:
    output = ir.Value(name=f"{name}/output_0", type=ir.TensorType(ir.DataType.FLOAT))
    return ir.node(op, inputs, outputs=[output], name=name)


def _constant(name: str, content: NDArray[Any]) -> ir.Node:
    tensor = ir.tensor(content)
    output = ir.Value(name=f"{name}/output_0", type=ir.TensorType(tensor.dtype))
    return ir.node("Constant", [], {"value": tensor}, outputs=[output], name=name)
