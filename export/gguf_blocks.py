"""Carrying a GGUF's own quantised blocks into the graph; of its weights only Q4_1's offsets are rounded a second time.

GGUF quantises rows in blocks of 32: Q4_0 as d·(q − 8), Q4_1 as d·q + m, Q8_0 as d·q with signed q (ggml's
`block_q4_0`, `block_q4_1`, `block_q8_0`). ONNX Runtime's MatMulNBits holds d·(q − z) with a whole zero point z, so the first
and the last fit as they are. Q4_1 is split: d·q + m = d·(q − z) + r with z = −m/d rounded. What is left, |r| ≤ d/2, is the same
for a whole block and so multiplies the mean of its 32 activations. The means are appended to the activations, and the r of
a row, rounded to 4 bits (to d/30 at most where the blocks of the row are alike), to its weights, so that one product does both:

    y = [x, mean32(x)] · [d·(q − z), 32·r]ᵀ
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import safe_open

from reft_edge.files import read_text

BLOCK_SIZE = 32
_NODE = re.compile(r"/model/layers\.(\d+)/\w+/(\w+)/MatMul(?:_Q\d)?")
_PARTS = {
    "qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "q_proj": ("attn_q",),
    "k_proj": ("attn_k",),
    "v_proj": ("attn_v",),
    "o_proj": ("attn_output",),
    "gate_proj": ("ffn_gate",),
    "up_proj": ("ffn_up",),
    "down_proj": ("ffn_down",),
}
_HUGGING_FACE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HELD = {"int4": ("Q4_0", "Q4_1", "Q8_0"), "int8": ("Q8_0",)}


@dataclass(frozen=True)
class Blocks:
    """A matrix `[out, in]` in blocks: (q − zero point) · scale, plus an offset a block."""

    q: NDArray[np.uint8]
    """[out, blocks, 32], 0 to 15 for 4 bits, 0 to 255 for 8; the zero point is the middle, 8 or 128."""
    scales: NDArray[np.float32]
    """[out, blocks]"""
    offsets: NDArray[np.float32] | None
    """[out, blocks], for Q4_1."""
    bits: int

    def dequantised(self) -> NDArray[np.float32]:
        values = (self.q.astype(np.float32) - (1 << (self.bits - 1))) * self.scales[..., None]
        if self.offsets is not None:
            values += self.offsets[..., None]
        return values.reshape(len(values), -1)


def can_carry(gguf: Path, precision: str) -> bool:
    """Whether most of the file's matrices are in blocks that a graph of this precision can hold."""
    types = [tensor.tensor_type.name for tensor in _tensors(gguf).values() if len(tensor.shape) == 2]
    held = sum(name in _HELD.get(precision, ()) for name in types)
    return held > len(types) / 2


def carry_blocks(
    path: Path, data: Path, gguf: Path, model: Path, precision: str, device: str = "cpu"
) -> tuple[int, int]:
    """Put the file's blocks in place of a graph's quantised matrices; returns how many were, and of how many.

    The graph file `path` and its external data file are rewritten. `model` is the Hugging Face folder that `gguf` was
    converted to. A matrix is only carried if its blocks give that folder's weights, so a file whose rows are in another
    order than expected is quantised anew, never wrong.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        for file in (path, data):
            file.rename(Path(temporary) / file.name)
        graph = ir.load(Path(temporary) / path.name)
        counts = _carry(
            graph.graph, _tensors(gguf), _Weights(model), _HELD[precision], whole_blocks=device == "cuda"
        )
        ir.save(graph, path, external_data=data.name)
    return counts


def _carry(
    graph: ir.Graph,
    tensors: Mapping[str, Any],
    weights: "_Weights",
    held: tuple[str, ...],
    whole_blocks: bool,
) -> tuple[int, int]:
    """`whole_blocks`: fill rows up to a multiple of 32, which CUDA's kernels want."""
    widened: dict[ir.Value, ir.Value] = {}
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    carried = 0
    for node in nodes:
        parts = [_find(tensors, weights, gguf, name, held) for gguf, name in _sources(node, tensors)]
        found = [part for part in parts if part is not None]
        if not found or len(found) < len(parts) or len({part.bits for part in found}) > 1:
            continue
        is_head = (node.name or "").startswith("/lm_head/")
        if is_head and (found[0].offsets is not None or found[0].bits != node.attributes["bits"].as_int()):
            continue
        _replace(graph, node, _stack(found), widened, whole_blocks)
        carried += 1
    return carried, len(nodes)


def _sources(node: ir.Node, tensors: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The GGUF and Hugging Face names of the matrices that are stacked in a node."""
    match = _NODE.fullmatch(node.name or "")
    if match:
        block = f"model.layers.{match[1]}"
        return [
            (f"blk.{match[1]}.{part}.weight", f"{block}.{_HUGGING_FACE[part]}.weight")
            for part in _PARTS.get(match[2], ())
        ]
    if (node.name or "").startswith("/lm_head/"):
        untied = "output.weight" in tensors
        return [
            ("output.weight", "lm_head.weight")
            if untied
            else ("token_embd.weight", "model.embed_tokens.weight")
        ]
    return []


def _find(
    tensors: Mapping[str, Any], weights: "_Weights", gguf_name: str, name: str, held: tuple[str, ...]
) -> Blocks | None:
    tensor = tensors.get(gguf_name)
    expected = weights.get(name)
    if tensor is None or expected is None or tensor.tensor_type.name not in held:
        return None
    blocks = _read(tensor.data, tensor.tensor_type.name)
    for order in _row_orders(len(blocks.q), weights.heads):
        candidate = Blocks(
            blocks.q[order],
            blocks.scales[order],
            None if blocks.offsets is None else blocks.offsets[order],
            blocks.bits,
        )
        found = candidate.dequantised()
        if found.shape == expected.shape and np.allclose(
            found, expected, rtol=0, atol=1e-6 * np.abs(expected).max()
        ):
            return candidate
    return None


def _row_orders(rows: int, heads: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """As stored, and with each head's rotary halves, which llama.cpp's converter interleaves for Llama, apart again."""
    plain = np.arange(rows)
    orders = [plain]
    for count in heads:
        if rows % (2 * count) == 0:
            orders.append(plain.reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1))
    return orders


def _read(data: NDArray[np.uint8], kind: str) -> Blocks:
    """`data [out, bytes]` of ggml blocks: float16 d (and m), then 32 values, 4-bit ones as low and high halves of 16 bytes."""
    rows = len(data)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = np.ascontiguousarray(data).reshape(rows, -1, size)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    if kind == "Q8_0":
        return Blocks(
            blocks[..., 2:] + np.uint8(128), d, None, 8
        )  # two's complement, shifted by wrapping around
    packed = blocks[..., size - 16 :]
    q = np.concatenate([packed & 0xF, packed >> 4], axis=-1)
    if kind == "Q4_0":
        return Blocks(q, d, None, 4)
    m = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
    return Blocks(q, d, m + 8 * d, 4)


def _stack(parts: list[Blocks]) -> Blocks:
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = np.concatenate(
            [np.zeros_like(part.scales) if part.offsets is None else part.offsets for part in parts]
        )
    return Blocks(
        np.concatenate([part.q for part in parts]),
        np.concatenate([part.scales for part in parts]),
        offsets,
        parts[0].bits,
    )


def _replace(
    graph: ir.Graph, node: ir.Node, blocks: Blocks, widened: dict[ir.Value, ir.Value], whole_blocks: bool
) -> None:
    x, weight, scales, zeros = node.inputs[:4]
    assert x is not None and weight is not None and scales is not None and zeros is not None  # noqa: PT018
    assert scales.dtype is not None
    if blocks.bits == 8:
        packed, zero_points = blocks.q, np.full(blocks.scales.shape, 128, np.uint8)
    elif blocks.offsets is None:
        packed, zero_points = _pack(blocks.q), _pack(np.full(blocks.scales.shape, 8, np.uint8))
    else:
        blocks, zero = _widen(blocks)
        packed, zero_points = _pack(blocks.q), _pack(zero)
        columns = node.attributes["K"].as_int()
        means = columns // BLOCK_SIZE
        filler = -means % BLOCK_SIZE if whole_blocks else 0
        node.attributes["K"] = ir.AttrInt64("K", columns + means + filler)
        if x not in widened:
            new = _append_means(graph, node, x, filler)
            graph.insert_before(node, new)
            widened[x] = new[-1].outputs[0]
        node.replace_input_with(0, widened[x])
    _set(weight, packed)
    _set(scales, blocks.scales.astype(scales.dtype.numpy()))
    _set(zeros, zero_points)
    node.attributes["bits"] = ir.AttrInt64("bits", blocks.bits)


def _widen(blocks: Blocks) -> tuple[Blocks, NDArray[np.uint8]]:
    """Q4_1 blocks with whole zero points `[out, blocks]`, and columns for what those leave of the offsets.

    d·q + m = d·(q − z) + r with z = −m/d rounded, and |r| ≤ d/2 for a whole block. The r of a row, rounded to 4 bits
    as further columns, multiply the means of the blocks of activations, which are appended to x.
    """
    assert blocks.offsets is not None
    step = np.where(blocks.scales == 0, 1, blocks.scales)
    zero = np.clip(np.rint(8 - blocks.offsets / step), 0, 15)
    left = BLOCK_SIZE * (blocks.offsets + (zero - 8) * blocks.scales)
    rows, count = left.shape
    further = -(-count // BLOCK_SIZE)
    columns = np.zeros((rows, further * BLOCK_SIZE), np.float32)
    columns[:, :count] = left
    columns = columns.reshape(rows, further, BLOCK_SIZE)
    q, scales = _to_4_bits(columns)
    return (
        Blocks(
            np.concatenate([blocks.q, q], axis=1),
            np.concatenate([blocks.scales, scales], axis=1).astype(np.float32),
            None,
            4,
        ),
        np.concatenate([zero, np.full((rows, further), 8)], axis=1).astype(np.uint8),
    )


def _to_4_bits(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """`values [..., 32]` as (q − 8) · scale; of a few scales for each 32, the one with the least squared error."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    best_q, best_scale = np.full(values.shape, 8, np.uint8), np.zeros_like(largest)
    best_error = np.square(values).sum(axis=-1, keepdims=True)
    for level in (*np.linspace(5.5, 8.5, 7), *np.linspace(-8.5, -5.5, 7)):
        scale = np.where(largest == 0, 1, largest / np.float32(level))
        q = np.clip(np.rint(values / scale) + 8, 0, 15)
        error = np.square((q - 8) * scale - values).sum(axis=-1, keepdims=True)
        better = error < best_error
        best_q = np.where(better, q.astype(np.uint8), best_q)
        best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    return best_q, best_scale[..., 0].astype(np.float32)


def _append_means(graph: ir.Graph, node: ir.Node, x: ir.Value, filler: int) -> list[ir.Node]:
    """Nodes that append to each token's activations the mean of each block, and then `filler` numbers of any kind."""

    def add(op: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Node:
        output = ir.Value(name=f"{node.name}/{name}/output_0", type=x.type)
        return ir.node(op, inputs, attributes, outputs=[output], name=f"{node.name}/{name}")

    def constant(name: str, content: int) -> ir.Value:
        tensor = ir.tensor(np.array([content], np.int64), name=f"{node.name}/{name}")
        value = ir.Value(
            name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1])
        )
        graph.register_initializer(value)
        return value

    means = add("AveragePool", [x], "block_means", kernel_shape=[BLOCK_SIZE], strides=[BLOCK_SIZE])
    new, parts = [means], [x, means.outputs[0]]
    if filler:
        bounds = [constant("from", 0), constant("to", filler), constant("axis", 2)]
        new.append(add("Slice", [x, *bounds], "filler"))
        parts.append(new[-1].outputs[0])
    return [*new, add("Concat", parts, "with_means", axis=-1)]


def _pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit numbers a byte along the last axis, the first in the lower half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: NDArray[np.uint8] = codes[..., 0::2] | (codes[..., 1::2] * np.uint8(16))
    return packed


def _set(value: ir.Value, content: NDArray[Any]) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(content), name=value.name)
    value.shape = ir.Shape(content.shape)


def _tensors(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}


class _Weights:
    """Tensors of a Hugging Face folder, read one at a time."""

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

    def get(self, name: str) -> NDArray[np.float32] | None:
        file = self._files.get(name)
        if file is None:
            return None
        weight: NDArray[np.float32] = file.get_tensor(name).astype(np.float32, copy=False)
        return weight


def _open(path: Path) -> Any:
    return safe_open(path, "np")
