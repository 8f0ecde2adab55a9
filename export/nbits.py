"""Quantised matrices in a graph: ONNX Runtime's MatMulNBits and GatherBlockQuantized in place of MatMul and Gather.

They hold (q − z) · d in 4 or 8 bits, in blocks along a row that share the scale d and, where there are any, the whole zero
point z.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from reft_edge.export.data_file import DataFile

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Form:
    """How the blocks of a matrix are stored."""

    bits: int
    size: int
    """Weights that share a scale."""
    zeros: bool = False
    """Whether zero points are stored; without them they are the middle."""
    means: int = 0
    """Further columns, for the means of the blocks of activations and what fills them up."""
    finer: int = 1
    """The step is divided by this."""


@dataclass(frozen=True)
class Rows:
    """Some rows as MatMulNBits has them, all `[rows, blocks, ...]`."""

    codes: Bytes
    scales: Floats
    zeros: Bytes


class Matrix(Protocol):
    """A matrix to be stored in blocks."""

    @property
    def form(self) -> Form:
        """How it is stored."""

    @property
    def rows(self) -> int:
        """How many."""

    @property
    def columns(self) -> int:
        """Without those for means."""

    def stored(self) -> Iterator[Rows]:
        """All rows, some at a time."""


def stored_blocks(matrix: Matrix) -> int:
    """In a row, those of further columns included."""
    return -(-(matrix.columns + matrix.form.means) // matrix.form.size)


def pack(codes: Bytes, bits: int) -> Bytes:
    """4-bit numbers two a byte along the last axis, the first in the lower half; 8-bit ones as they are."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def write_matrices(
    graph: ir.Graph, data: DataFile, name: str, matrices: Sequence[Matrix], floats: ir.DataType
) -> list[ir.Value]:
    """Initializers for the codes, the scales and, if there are any, the zero points of stacked matrices of one form."""
    form, blocks = matrices[0].form, stored_blocks(matrices[0])
    rows = sum(matrix.rows for matrix in matrices)
    scales, zeros = list[Any](), list[Any]()

    def codes() -> Iterator[Bytes]:
        for matrix in matrices:
            for part in matrix.stored():
                scales.append(part.scales.astype(floats.numpy()))
                zeros.append(pack(part.zeros, form.bits))
                yield pack(part.codes, form.bits)

    def add(suffix: str, shape: list[int], dtype: ir.DataType, pieces: Any) -> ir.Value:
        stored = data.append(f"{name}.{suffix}", dtype, shape, pieces)
        value = ir.Value(
            name=stored.name, const_value=stored, type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
        graph.register_initializer(value)
        return value

    packed = [rows, blocks, form.size * form.bits // 8]
    values = [
        add(f"weight_Q{form.bits}", packed, ir.DataType.UINT8, codes()),
        add("weight_scale", [rows, blocks], floats, scales),
    ]
    if form.zeros:
        values.append(add("weight_zp", [rows, -(-blocks * form.bits // 8)], ir.DataType.UINT8, zeros))
    return values


def replace_product(
    graph: ir.Graph,
    data: DataFile,
    node: ir.Node,
    parts: Sequence[tuple[str, Matrix]],
    widened: dict[tuple[ir.Value, int], ir.Value],
    accuracy_level: int,
) -> list[ir.Node]:
    """Quantised products in place of a MatMul: one if its parts, given with names, have one form, else one for each part,
    which are joined. Returns the products.

    `widened` remembers activations with means, for products of the same.
    """
    x, weight = node.inputs
    assert x is not None and weight is not None and weight.dtype is not None  # noqa: PT018
    alike = len({matrix.form for _, matrix in parts}) == 1
    groups = [(node.name or "", [matrix for _, matrix in parts])]
    if not alike:
        groups = [(name, [matrix]) for name, matrix in parts]
    products: list[ir.Node] = []
    helpers: list[ir.Node] = []
    for name, matrices in groups:
        form, columns = matrices[0].form, matrices[0].columns
        source = x
        if form.means:
            if (x, form.size) not in widened:
                new = _append_means(node, x, form.size, form.means - columns // form.size)
                helpers += new
                widened[x, form.size] = new[-1].outputs[0]
            source = widened[x, form.size]
        attributes = {
            "K": columns + form.means,
            "N": sum(matrix.rows for matrix in matrices),
            "bits": form.bits,
            "block_size": form.size,
            "accuracy_level": accuracy_level,
        }
        values = write_matrices(graph, data, name[1:].replace("/", "."), matrices, weight.dtype)
        products.append(
            ir.node(
                "MatMulNBits",
                [source, *values],
                attributes,
                domain="com.microsoft",
                outputs=[ir.Value(name=f"{name}/output_0", type=x.type)],
                name=f"{name}_Q{form.bits}",
            )
        )
    last = products
    if not alike:
        joined = [product.outputs[0] for product in products]
        last = [*products, ir.node("Concat", joined, {"axis": -1}, name=f"{node.name}/joined")]
    _swap(graph, node, [*helpers, *last])
    return products


def replace_lookup(
    graph: ir.Graph, node: ir.Node, form: Form, shape: Sequence[int], table: Sequence[ir.Value]
) -> None:
    """A lookup in a table's blocks in place of the builder's. `table`: what `write_matrices` gave for it, of `shape`."""
    ids = node.inputs[1]
    name = "/model/embed_tokens/rows"
    codes, *others = table
    constant = _constant(f"{name}/shape", [shape[0], shape[1] * form.bits // 8])
    reshape = ir.node("Reshape", [codes, constant.outputs[0]], name=f"{name}/Reshape")
    reshape.outputs[0].name = f"{name}/Reshape/output_0"
    attributes = {"bits": form.bits, "block_size": form.size, "gather_axis": 0, "quantize_axis": 1}
    lookup = ir.node(
        "GatherBlockQuantized",
        [reshape.outputs[0], ids, *others],
        attributes,
        domain="com.microsoft",
        name=f"{name}/GatherBlockQuantized",
    )
    _swap(graph, node, [constant, reshape, lookup])


def _swap(graph: ir.Graph, node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` in place of `node`; the last has its output."""
    sources = [value for value in node.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [node.outputs[0]], [new[-1].outputs[0]])
    _forget(graph, sources)


def _forget(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """Remove what nothing reads any longer: stored values, and nodes with what only they read."""
    for value in values:
        producer = value.producer()
        if value.uses() or value.is_graph_input():
            continue
        if value.is_initializer():
            del graph.initializers[str(value.name)]
        elif producer is not None and not any(
            output.uses() or output.is_graph_output() for output in producer.outputs
        ):
            sources = [source for source in producer.inputs if source is not None]
            graph.remove(producer, safe=True)
            _forget(graph, sources)


def _append_means(node: ir.Node, x: ir.Value, size: int, filler: int) -> list[ir.Node]:
    """Nodes that append to each token's activations the mean of each block, and then `filler` numbers of any kind."""
    prefix = f"{node.name}/by_{size}"

    def add(op: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Node:
        output = ir.Value(name=f"{prefix}/{name}/output_0", type=x.type)
        return ir.node(op, inputs, attributes, outputs=[output], name=f"{prefix}/{name}")

    shape = _constant(f"{prefix}/shape", [0, 0, -1, size])
    axes = _constant(f"{prefix}/axes", [-1])
    blocks = add("Reshape", [x, shape.outputs[0]], "blocks")
    means = add("ReduceMean", [blocks.outputs[0], axes.outputs[0]], "block_means", keepdims=0)
    new, parts = [shape, axes, blocks, means], [x, means.outputs[0]]
    if filler:
        bounds = [
            _constant(f"{prefix}/{what}", [number])
            for what, number in (("from", 0), ("to", filler), ("axis", 2))
        ]
        new += [*bounds, add("Slice", [x, *(bound.outputs[0] for bound in bounds)], "filler")]
        parts.append(new[-1].outputs[0])
    return [*new, add("Concat", parts, "with_means", axis=-1)]


def _constant(name: str, content: list[int]) -> ir.Node:
    """Whole numbers in a node: a stored value may lie in the data file, where shapes are not looked for."""
    value = ir.Value(name=f"{name}/output_0", type=ir.TensorType(ir.DataType.INT64))
    return ir.node(
        "Constant", [], {"value": ir.tensor(np.array(content, np.int64))}, outputs=[value], name=name
    )


def share_external_data(model: ir.Model) -> None:
    """Have a table that is a stored weight in another shape be that part of the data file, without a Reshape.

    ONNX Runtime would hold the reshaped table in memory a second time.
    """
    for node in list(model.graph):
        if node.op_type != "GatherBlockQuantized":
            continue
        table = node.inputs[0]
        reshape = table.producer() if table is not None else None
        if reshape is None or reshape.op_type != "Reshape":
            continue
        weight, shape = reshape.inputs
        stored = None if weight is None else weight.const_value
        wanted = None if shape is None else ir.convenience.get_const_tensor(shape)
        if not isinstance(stored, ir.ExternalTensor) or wanted is None:
            continue
        dimensions = ir.Shape(wanted.numpy().tolist())
        alias = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            stored.dtype,
            shape=dimensions,
            name=f"{stored.name}_rows",
            base_dir=stored.base_dir,
        )
        rows = ir.Value(name=alias.name, const_value=alias, type=ir.TensorType(alias.dtype), shape=dimensions)
        model.graph.register_initializer(rows)
        node.replace_input_with(0, rows)
        _forget(model.graph, [reshape.outputs[0]])
