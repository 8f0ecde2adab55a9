"""Intervention ports: small edit nodes on the residual stream whose weights are overridable graph inputs.

At each port, with h the hidden state of its place (a block's output, or that of the block's attention or MLP):

    h' = h + ((h A + b) · gate[columns]) B

A port of the kind `act` puts an activation around h A + b, one of ACTS for each column. One of the kind `diagonal` adds
h ⊙ (gate[s_columns] s).

Where h is only formed inside a fused skip-and-normalise node, a graph in 32 bits has that node sum h and its edit. (In 16 bits
such a node may go on with a sum of 32 bits, which h is not: there the edit is added to the branch.)

and once for the graph, with t the absolute position and n the prompt's length:

    gate = (t < min(first, n // 2)                                            prefix
            or n − suffix ≤ t < n + after)                                    suffix and generated
           and t ≥ min(skip_first, n) and not n − skip_last ≤ t < n) · scale  left out of the prompt
    suffix = last if last is unlimited, else min(last, n // 2)

Every input below has a default of rank 0, or that leaves nothing out, under which the graph computes what it did without
ports, bit for bit.

    reft.first, reft.last, reft.after  int64  [adapter_batch, 1, gates]
    reft.skip_first, reft.skip_last    int64  [adapter_batch, 1, gates]
    reft.scale                         float  [adapter_batch, 1, gates]
    reft.prompt_len                    int64  [prompt_len_batch]   −1: the tokens in the mask if the KV cache is empty, else 0
    reft.logits_to_keep                int64  []                   0: logits for all tokens, k: for the last k
    reft.layers.i.A / .b / .B          float  [adapter_batch, d, rank_i] / [adapter_batch, 1, rank_i] / [adapter_batch, rank_i, d]
    reft.layers.i.columns              int64  [rank_i]             which gate each column uses
    reft.layers.i.acts                 int64  [rank_i]             act · rank_i + column, with act an index into ACTS
    reft.layers.i.s / .s_columns       float  [adapter_batch, rows_i, d] / int64 [rows_i]   what h is multiplied by; its gates

A port on a layer's attention or MLP has reft.layers.i.attention or reft.layers.i.mlp in place of reft.layers.i.
adapter_batch is 1 or the batch size, for another adapter in every row. `acts` are in ports of the kind act only, and always
given with A; `s` and `s_columns` are in those of the kind diagonal.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from reft_edge.adapter.algebra import ACTS
from reft_edge.adapter.positions import UNLIMITED
from reft_edge.export.residual import Site, Use, find_head_input
from reft_edge.model.places import Place

INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
_END = np.iinfo(np.int64).max
_CONTRIBUTED = "com.microsoft"
"""The domain of Gelu before opset 20."""


class _Builder:
    """Appends named nodes to a list, under one prefix."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix, self.nodes = graph, prefix, list[ir.Node]()

    def __call__(
        self, op: str, inputs: Sequence[ir.Value | None], output: str, domain: str = "", **attributes: int
    ) -> ir.Value:
        name = f"/{self.prefix}/{output}"
        node = ir.node(
            op,
            inputs,
            attributes,
            domain=domain,
            outputs=[ir.Value(name=f"{name}/output_0")],
            name=f"{name}/{op}",
        )
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, content: int | list[int]) -> ir.Value:
        return _initializer(self.graph, f"/{self.prefix}/{name}", np.array(content, np.int64))


def insert_ports(
    model: ir.Model,
    sites: Sequence[Site],
    hidden_size: int,
    dtype: np.dtype,
    keep_logits: bool = True,
    kinds: Sequence[str] = ("affine",),
) -> dict[str, list[str | int]]:
    """Add a port of these kinds at each site, in place; returns the port table: input names and their shapes.

    A site whose hidden state depends on another's within the same layer comes after it.

    `dtype` is the residual stream's. A graph with an output `logits` also gets `reft.logits_to_keep`, unless
    `keep_logits` is false. Raises ReftEdgeError if the graph has such an output and no head that leads to it.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    table: dict[str, list[str | int]] = {}
    if "act" in kinds:
        model.opset_imports.setdefault(_CONTRIBUTED, 1)

    def port(name: str, shape: list[str | int], default: np.ndarray) -> ir.Value:
        value = _initializer(graph, name, default, shape)
        graph.inputs.append(value)
        table[name] = shape
        return value

    gates: list[str | int] = ["adapter_batch", 1, "gates"]
    none = np.zeros((1, 1, 0), np.int64)
    first, last, after = (port(f"reft.{name}", gates, none) for name in ("first", "last", "after"))
    skips = [
        port(f"reft.{name}", gates, np.zeros((1, 1, 1), np.int64)) for name in ("skip_first", "skip_last")
    ]
    scale = port("reft.scale", gates, none.astype(dtype))
    prompt_len = port("reft.prompt_len", ["prompt_len_batch"], np.array([-1], np.int64))

    start = _Builder(graph, "reft")
    gate = _gate(
        start, inputs[INPUT_IDS], inputs[ATTENTION_MASK], prompt_len, first, last, after, skips, scale
    )
    graph.insert_before(graph[0], start.nodes)

    for site in sites:
        name = site.place.port
        rank = name.replace("reft.layers.", "rank_").replace(".", "_")
        a = port(f"{name}.A", ["adapter_batch", hidden_size, rank], np.zeros((1, hidden_size, 0), dtype))
        b = port(f"{name}.b", ["adapter_batch", 1, rank], np.zeros((1, 1, 0), dtype))
        back = port(f"{name}.B", ["adapter_batch", rank, hidden_size], np.zeros((1, 0, hidden_size), dtype))
        columns = port(f"{name}.columns", [rank], np.zeros((0,), np.int64))
        op = _Builder(graph, name)
        last = site.uses[0].value
        h = op("Add", [site.skip.value, last], "h") if site.skip else last
        z = op("Add", [op("MatMul", [h, a], "hA"), b], "z")
        if "act" in kinds:
            z = _activated(op, z, port(f"{name}.acts", [rank], np.zeros((0,), np.int64)))
        gated = op("Mul", [z, op("Gather", [gate, columns], "gate", axis=2)], "gated")
        delta = op("MatMul", [gated, back], "delta")
        if "diagonal" in kinds:
            rows = rank.replace("rank", "rows")
            s = port(f"{name}.s", ["adapter_batch", rows, hidden_size], np.zeros((1, 0, hidden_size), dtype))
            s_columns = port(f"{name}.s_columns", [rows], np.zeros((0,), np.int64))
            factor = op("MatMul", [op("Gather", [gate, s_columns], "s_gate", axis=2), s], "factor")
            delta = op("Add", [delta, op("Mul", [h, factor], "scaled")], "sum")
        summed = site.skip is not None and dtype == np.float32
        edited = delta if summed else op("Add", [last, delta], "edited")
        graph.insert_before(_earliest(graph, site.uses), op.nodes)
        for use in site.uses:
            use.node.replace_input_with(use.index, edited)
        if site.skip and summed:
            site.skip.node.replace_input_with(site.skip.index, h)

    if keep_logits and any(output.name == "logits" for output in graph.outputs):
        _keep_logits(graph, port("reft.logits_to_keep", [], np.array(0, np.int64)))
    return table


def _activated(op: _Builder, z: ir.Value, acts: ir.Value) -> ir.Value:
    """Each column by its activation."""
    sigmoid = op("Sigmoid", [z], "sigmoid")
    every = {
        "linear": z,
        "relu": op("Relu", [z], "relu"),
        "gelu": op("Gelu", [z], "gelu", domain=_CONTRIBUTED),
        "silu": op("Mul", [z, sigmoid], "silu"),
        "tanh": op("Tanh", [z], "tanh"),
        "sigmoid": sigmoid,
    }
    together = op("Concat", [every[act] for act in ACTS], "every", axis=2)
    return op("Gather", [together, acts], "activated", axis=2)


def edited_values(place: Place, skip: str, in_32_bits: bool, kinds: Sequence[str]) -> tuple[str, ...]:
    """Names of the values whose sum is the edited hidden state at a port; `skip` names what its site's `skip` reads, if any."""
    if skip and in_32_bits:
        delta = "sum" if "diagonal" in kinds else "delta"
        return f"/{place.port}/h/output_0", f"/{place.port}/{delta}/output_0"
    edited = f"/{place.port}/edited/output_0"
    return (edited, skip) if skip else (edited,)


def _keep_logits(graph: ir.Graph, keep: ir.Value) -> None:
    """Let the head read only the last `keep` tokens' hidden states."""
    head, hidden = find_head_input(graph)
    op = _Builder(graph, "reft/head")
    kept = op(
        "Slice",
        [
            hidden,
            op("Unsqueeze", [op("Neg", [keep], "from"), op.constant("zero", [0])], "starts"),
            op.constant("end", [_END]),
            op.constant("sequence", [1]),
        ],
        "kept",
    )
    graph.insert_before(head, op.nodes)
    head.replace_input_with(0, kept)
    logits = next(output for output in graph.outputs if output.name == "logits")
    vocabulary = logits.shape[2:] if logits.shape is not None else ()
    for node in _after(graph, head):
        for output in node.outputs:
            output.shape = None
    logits.shape = ir.Shape(["batch_size", "logits_length", *vocabulary]) if vocabulary else None


def _after(graph: ir.Graph, start: ir.Node) -> list[ir.Node]:
    found = {start}
    for node in graph:
        if any(value is not None and value.producer() in found for value in node.inputs):
            found.add(node)
    return list(found)


def _earliest(graph: ir.Graph, uses: Sequence[Use]) -> ir.Node:
    if len(uses) == 1:
        return uses[0].node
    nodes = {use.node for use in uses}
    return next(node for node in graph if node in nodes)


def _gate(
    op: _Builder,
    ids: ir.Value,
    mask: ir.Value,
    prompt_len: ir.Value,
    first: ir.Value,
    last: ir.Value,
    after: ir.Value,
    skips: Sequence[ir.Value],
    scale: ir.Value,
) -> ir.Value:
    """`[batch, sequence, gates]`, in the graph's float type."""
    zero, one, two = (op.constant(name, content) for name, content in (("zero", 0), ("one", 1), ("two", 2)))
    sequence = op("Gather", [op("Shape", [ids], "ids_shape"), one], "sequence")
    total = op("Gather", [op("Shape", [mask], "mask_shape"), one], "total")
    past = op("Sub", [total, sequence], "past")
    t = op("Unsqueeze", [op("Range", [past, total, one], "positions"), op.constant("around", [0, 2])], "t")

    filled = op("ReduceSum", [mask, op.constant("row", [1])], "filled", keepdims=0)
    derived = op("Where", [op("Equal", [past, zero], "fresh"), filled, zero], "derived_len")
    length = op("Where", [op("Less", [prompt_len, zero], "unset"), derived, prompt_len], "prompt_len")
    n = op("Unsqueeze", [length, op.constant("inner", [1, 2])], "n")
    half = op("Div", [n, two], "half")

    prefix = op("Less", [t, op("Min", [first, half], "prefix_end")], "prefix")
    unlimited = op("GreaterOrEqual", [last, op.constant("unlimited", UNLIMITED)], "last_unlimited")
    suffix = op("Where", [unlimited, last, op("Min", [last, half], "last_in_half")], "suffix_len")
    since = op("GreaterOrEqual", [t, op("Sub", [n, suffix], "suffix_start")], "since_suffix")
    before = op("Less", [t, op("Add", [n, after], "generated_end")], "before_end")
    reached = op("Or", [prefix, op("And", [since, before], "rest")], "reached")

    skip_first, skip_last = skips
    begun = op("GreaterOrEqual", [t, op("Min", [skip_first, n], "skipped")], "begun")
    early = op("Less", [t, op("Sub", [n, skip_last], "kept_end")], "before_skipped")
    kept = op("Or", [early, op("GreaterOrEqual", [t, n], "in_answer")], "kept")
    opened = op("And", [op("And", [reached, begun], "reached_later"), kept], "open")
    assert scale.dtype is not None
    return op("Mul", [op("Cast", [opened], "open_as_float", to=scale.dtype), scale], "gate")


def _initializer(
    graph: ir.Graph, name: str, content: np.ndarray, shape: Sequence[int | str] | None = None
) -> ir.Value:
    tensor = ir.tensor(content, name=name)
    type_, shape_ = ir.TensorType(tensor.dtype), ir.Shape(content.shape if shape is None else shape)
    value = ir.Value(name=name, const_value=tensor, type=type_, shape=shape_)
    graph.register_initializer(value)
    return value
