"""Carrying a GGUF's own blocks into the graph: its weights are not rounded a second time.

ONNX Runtime's MatMulNBits and GatherBlockQuantized hold (q − z) · d in 4 or 8 bits, with a whole zero point z a block. Blocks
without offsets fit as they are. An offset m a block is split: d·q + m = d·(q − z) + r with z = −m/d rounded. What is left,
|r| ≤ d/2, is the same for a whole block and so multiplies the mean of its activations. The means are appended to the
activations, and the r of a row, rounded to as many bits (with 4 to d/30 at most where the blocks of the row are alike, with 8 to
d/500), to its weights, so that one product does both:

    y = [x, mean(x)] · [d·(q − z), size·r]ᵀ

A table of embeddings has no activations. There the step is made finer, d·q + m = (d/k)·(k·q − z), with the k that 8 bits have
room for: 17 for codes of 4 bits, so that the offset is rounded to d/34 at most.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import safe_open

from reft_edge.export.gguf_blocks import KINDS, Blocks, Bytes, Floats, Kind, Stored, read_matrices, read_rows
from reft_edge.files import read_text

CARRIED = "Carried blocks: "
"""What the builder's process says before the two counts of `carry_blocks`."""

_PRODUCT = re.compile(r"(/model/layers\.(\d+)/\w+/)(\w+)/MatMul")
_HEAD = "/lm_head/MatMul"
_EMBEDDING = re.compile(r"/model/embed_tokens/Gather\w*")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_NAMES = {
    "q_proj": ("attn_q", "self_attn.q_proj"),
    "k_proj": ("attn_k", "self_attn.k_proj"),
    "v_proj": ("attn_v", "self_attn.v_proj"),
    "o_proj": ("attn_output", "self_attn.o_proj"),
    "gate_proj": ("ffn_gate", "mlp.gate_proj"),
    "up_proj": ("ffn_up", "mlp.up_proj"),
    "down_proj": ("ffn_down", "mlp.down_proj"),
}
_TABLE = ("token_embd.weight", "model.embed_tokens.weight")
_FILLED_TO = 32  # columns that CUDA's kernels want a multiple of
_AT_ONCE = 1 << 22  # weights that are unpacked at a time


@dataclass(frozen=True)
class Carrying:
    """How blocks are to be stored in the graph."""

    precision: str
    """int4: codes of up to 4 bits in 4 and all others in 8. int8: all in 8."""
    accuracy_level: int
    """Of quantised products, as in `Quantisation`."""
    whole_blocks: bool
    """Whether further columns are filled up to a multiple of 32, which CUDA's kernels want."""


@dataclass(frozen=True)
class _Form:
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
class _Matrix:
    """A quantised tensor of the file, its rows in PyTorch's order, and how it is stored in the graph."""

    data: Bytes
    """[rows, bytes]"""
    kind: Kind
    order: NDArray[np.int64] | None
    form: _Form

    @property
    def rows(self) -> int:
        return len(self.data)

    @property
    def columns(self) -> int:
        return int(self.data.shape[1]) // self.kind.stored * self.kind.weights

    @property
    def stored_blocks(self) -> int:
        """In a row, those of the further columns included."""
        return -(-(self.columns + self.form.means) // self.form.size)

    def chunks(self) -> Iterator[tuple[slice, Blocks]]:
        """The blocks of some rows at a time."""
        step = max(1, _AT_ONCE // self.columns)
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            yield rows, read_rows(self.data, self.kind, rows if self.order is None else self.order[rows])


@dataclass(frozen=True)
class _Rows:
    """Rows as MatMulNBits has them, all `[rows, blocks, ...]`."""

    codes: Bytes
    scales: Floats
    zeros: Bytes


def can_carry(gguf: Path) -> bool:
    """Whether most of the file's matrices are in blocks that a graph can hold."""
    kinds = _matrix_kinds(gguf)
    return sum(kind in KINDS for kind in kinds) > len(kinds) / 2


def kinds_that_cannot(gguf: Path) -> list[str]:
    """The names of the other kinds among the file's matrices, such as IQ4_NL."""
    return sorted({kind for kind in _matrix_kinds(gguf) if kind not in KINDS})


def _matrix_kinds(gguf: Path) -> list[str]:
    return [matrix.kind for matrix in read_matrices(gguf).values()]


def carry_blocks(graph: ir.Graph, gguf: Path, model: Path, how: Carrying) -> tuple[int, int]:
    """Put the file's blocks in place of a graph's matrices; returns how many were, and of how many.

    `graph` is what onnxruntime-genai's builder made before it quantises. `model` is the Hugging Face folder that `gguf`
    was converted to. A matrix is only carried if its blocks give that folder's weights, so a file whose rows are in
    another order than expected is quantised anew, never wrong. The blocks are read when the graph is saved.
    """
    file = _File(read_matrices(gguf), _Weights(model), how)
    table = file.find(*_TABLE, gathered=True)
    widened: dict[tuple[ir.Value, int], ir.Value] = {}
    head: tuple[ir.Value, ...] | None = None
    carried = of = 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[1].const_value is None:
            continue
        of += 1
        parts = file.parts(node, table)
        if not parts:
            continue
        products = _replace_product(graph, node, parts, widened, how)
        carried += 1
        if node.name == _HEAD and parts[0][1] is table:
            head = tuple(value for value in products[0].inputs[1:] if value is not None)
    lookup = next((node for node in graph if _EMBEDDING.fullmatch(node.name or "")), None)
    if lookup is not None:
        of += 1
        if table is not None:
            _replace_lookup(graph, lookup, table, head)
            carried += 1
    return carried, of


class _File:
    """What a GGUF holds of a model."""

    def __init__(self, tensors: Mapping[str, Stored], weights: "_Weights", how: Carrying) -> None:
        self._tensors, self._weights, self._how = tensors, weights, how

    def parts(self, node: ir.Node, table: _Matrix | None) -> list[tuple[str, _Matrix]]:
        """The matrices that are stacked in a product, with the names of the products that they are; none if not all
        can be carried."""
        name = node.name or ""
        if name == _HEAD:
            untied = "output.weight" in self._tensors
            matrix = self.find("output.weight", "lm_head.weight") if untied else table
            return [] if matrix is None else [(name, matrix)]
        match = _PRODUCT.fullmatch(name)
        if not match:
            return []
        found = []
        for part in _FUSED.get(match[3], (match[3],)):
            if part not in _NAMES:
                return []
            ours, theirs = _NAMES[part]
            matrix = self.find(f"blk.{match[2]}.{ours}.weight", f"model.layers.{match[2]}.{theirs}.weight")
            if matrix is None:
                return []
            found.append((f"{match[1]}{part}/MatMul", matrix))
        return found

    def find(self, name: str, expected: str, gathered: bool = False) -> _Matrix | None:
        """A tensor by its name, if it is in blocks and is PyTorch's `expected`. `gathered`: rows are looked up in it."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.kind not in KINDS:
            return None
        kind = KINDS[tensor.kind]
        plain = _Matrix(tensor.data, kind, None, _Form(8, kind.size))
        for order in (None, *_rotary_orders(plain.rows, self._weights.heads)):
            matrix = replace(plain, order=order)
            if self._weights.equal(expected, matrix):
                form = _choose_form(matrix, self._how, gathered)
                return None if form is None else replace(matrix, form=form)
        return None


def _rotary_orders(rows: int, heads: Sequence[int]) -> list[NDArray[np.int64]]:
    """With each head's rotary halves, which llama.cpp's converter interleaves for Llama, apart again."""
    return [
        np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1)
        for count in dict.fromkeys(heads)
        if rows % (2 * count) == 0
    ]


def _choose_form(matrix: _Matrix, how: Carrying, gathered: bool) -> _Form | None:
    kind = matrix.kind
    bits = 4 if how.precision == "int4" and kind.levels <= 16 else 8
    if not kind.has_offsets:
        return _Form(bits, kind.size)
    if gathered:
        room = 255 // (kind.levels - 1)
        finer = (_Form(8, kind.size, zeros=True, finer=room >> shift) for shift in range(room.bit_length()))
        return next((form for form in finer if _whole_zeros_fit(matrix, form)), None)
    means = matrix.columns // kind.size
    filled = -(-means // _FILLED_TO) * _FILLED_TO if how.whole_blocks else means
    form = _Form(bits, kind.size, zeros=True, means=filled)
    return form if bits == 8 or _whole_zeros_fit(matrix, form) else replace(form, bits=8)


def _whole_zeros_fit(matrix: _Matrix, form: _Form) -> bool:
    """Whether zero points leave no more than half a step of each offset."""
    for _, blocks in matrix.chunks():
        step, _, _, left = _split_offsets(blocks, matrix.kind.levels, form)
        if (np.abs(left) > 0.501 * np.abs(step)).any():
            return False
    return True


def _split_offsets(blocks: Blocks, levels: int, form: _Form) -> tuple[Floats, Bytes, Bytes, Floats]:
    """Of blocks with offsets: the step, what is added to codes, the zero point, and what is left, `[rows, blocks]` each:

    d·q + m = step · (finer·q + added − zero) + left.
    """
    assert blocks.offsets is not None
    constant = blocks.scales == 0  # as (0 − 1) · −m, exactly
    step = np.where(constant, -blocks.offsets, blocks.scales / np.float32(form.finer)).astype(np.float32)
    zero = np.rint(-blocks.offsets / np.where(step == 0, 1, step))
    most = (1 << form.bits) - 1
    added = np.clip(-zero, 0, most - form.finer * (levels - 1))
    zero = np.clip(zero + added, 0, most)
    left = blocks.offsets - step * (added - zero).astype(np.float32)
    return step, added.astype(np.uint8), zero.astype(np.uint8), left


def _store(blocks: Blocks, matrix: _Matrix) -> _Rows:
    form = matrix.form
    middle = 1 << (form.bits - 1)
    if blocks.offsets is None:
        zeros = np.full(blocks.scales.shape, middle, np.uint8)
        return _Rows(blocks.codes + np.uint8(middle - blocks.middle), blocks.scales, zeros)
    step, added, zero, left = _split_offsets(blocks, matrix.kind.levels, form)
    codes = np.where(blocks.scales[..., None] == 0, 0, blocks.codes * np.uint8(form.finer))
    codes = codes.astype(np.uint8) + added[..., None]
    if not form.means:
        return _Rows(codes, step, zero)
    rows, count = left.shape
    further = matrix.stored_blocks - count
    columns = np.zeros((rows, further * form.size), np.float32)
    columns[:, :count] = form.size * left
    q, scales = _round(columns.reshape(rows, further, form.size), middle)
    return _Rows(
        np.concatenate([codes, q], axis=1),
        np.concatenate([step, scales], axis=1),
        np.concatenate([zero, np.full((rows, further), middle, np.uint8)], axis=1),
    )


def _round(values: Floats, middle: int) -> tuple[Bytes, Floats]:
    """`values [..., size]` as (q − middle) · scale; of a few scales for each block, the one with the least squared error."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    best_q, best_scale = np.full(values.shape, middle, np.uint8), np.zeros_like(largest)
    best_error = np.square(values).sum(axis=-1, keepdims=True)
    for level in (*np.linspace(middle - 2.5, middle + 0.5, 7), *np.linspace(-middle - 0.5, 2.5 - middle, 7)):
        scale = np.where(largest == 0, 1, largest / np.float32(level))
        q = np.clip(np.rint(values / scale) + middle, 0, 2 * middle - 1)
        error = np.square((q - middle) * scale - values).sum(axis=-1, keepdims=True)
        better = error < best_error
        best_q = np.where(better, q.astype(np.uint8), best_q)
        best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    return best_q, best_scale[..., 0].astype(np.float32)


def _pack(codes: Bytes, bits: int) -> Bytes:
    """4-bit numbers two a byte along the last axis, the first in the lower half; 8-bit ones as they are."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def _weight_values(
    graph: ir.Graph, name: str, matrices: Sequence[_Matrix], floats: ir.DataType
) -> list[ir.Value]:
    """Initializers for the codes, the scales and, if there are any, the zero points of stacked matrices of one form."""
    first = matrices[0]
    rows, blocks = sum(matrix.rows for matrix in matrices), first.stored_blocks

    def add(suffix: str, shape: list[int], dtype: ir.DataType, part: Callable[[_Rows], Any]) -> ir.Value:
        def read() -> ir.TensorProtocol:
            content, start = np.empty(shape, dtype.numpy()), 0
            for matrix in matrices:
                for chunk, loaded in matrix.chunks():
                    content[start + chunk.start : start + chunk.stop] = part(_store(loaded, matrix))
                start += matrix.rows
            return ir.tensor(content, dtype=dtype)

        tensor = ir.LazyTensor(read, dtype, ir.Shape(shape), name=f"{name}.{suffix}")
        value = ir.Value(
            name=tensor.name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
        graph.register_initializer(value)
        return value

    bits = first.form.bits
    codes = [rows, blocks, first.form.size * bits // 8]
    values = [
        add(f"weight_Q{bits}", codes, ir.DataType.UINT8, lambda stored: _pack(stored.codes, bits)),
        add("weight_scale", [rows, blocks], floats, lambda stored: stored.scales),
    ]
    if first.form.zeros:
        zeros = [rows, -(-blocks * bits // 8)]
        values.append(add("weight_zp", zeros, ir.DataType.UINT8, lambda stored: _pack(stored.zeros, bits)))
    return values


def _replace_product(
    graph: ir.Graph,
    node: ir.Node,
    parts: Sequence[tuple[str, _Matrix]],
    widened: dict[tuple[ir.Value, int], ir.Value],
    how: Carrying,
) -> list[ir.Node]:
    """Quantised products in place of a MatMul: one if its parts have one form, else one for each part, which are joined.
    Returns the products."""
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
            "accuracy_level": how.accuracy_level,
        }
        values = _weight_values(graph, name[1:].replace("/", "."), matrices, weight.dtype)
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


def _replace_lookup(
    graph: ir.Graph, node: ir.Node, table: _Matrix, head: tuple[ir.Value, ...] | None
) -> None:
    """A lookup in the table's blocks in place of the builder's; they are the head's own where it is the same matrix."""
    ids, found = node.inputs[1], node.outputs[0]
    name = "/model/embed_tokens/rows"
    codes, *others = head or _weight_values(
        graph, "model.embed_tokens", [table], found.dtype or ir.DataType.FLOAT
    )
    shape = _constant(f"{name}/shape", [table.rows, table.columns * table.form.bits // 8])
    reshape = ir.node("Reshape", [codes, shape.outputs[0]], name=f"{name}/Reshape")
    reshape.outputs[0].name = f"{name}/Reshape/output_0"
    attributes = {
        "bits": table.form.bits,
        "block_size": table.form.size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    lookup = ir.node(
        "GatherBlockQuantized",
        [reshape.outputs[0], ids, *others],
        attributes,
        domain="com.microsoft",
        name=f"{name}/GatherBlockQuantized",
    )
    _swap(graph, node, [shape, reshape, lookup])


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

    means = add("AveragePool", [x], "block_means", kernel_shape=[size], strides=[size])
    new, parts = [means], [x, means.outputs[0]]
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


class _Weights:
    """Tensors of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        config = json.loads(read_text(folder / "config.json"))
        heads = int(config["num_attention_heads"])
        self.heads = (heads, int(config.get("num_key_value_heads") or heads))
        self._files: dict[str, Any] = {
            name: file
            for path in sorted(folder.glob("*.safetensors"))
            for file in [_open(path)]
            for name in file.keys()  # noqa: SIM118
        }

    def equal(self, name: str, matrix: _Matrix) -> bool:
        """Whether a tensor is `matrix`, a millionth of its largest weights apart."""
        file = self._files.get(name)
        if file is None:
            return False
        stored = file.get_slice(name)
        if list(stored.get_shape()) != [matrix.rows, matrix.columns]:
            return False
        for rows, blocks in matrix.chunks():
            expected = stored[rows.start : rows.stop].astype(np.float32, copy=False)
            near = 1e-6 * np.abs(expected).max()
            if not np.allclose(blocks.dequantised(), expected, rtol=0, atol=near):
                return False
        return True


def _open(path: Path) -> Any:
    return safe_open(path, "np")
