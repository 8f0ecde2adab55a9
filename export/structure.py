"""Finding the residual stream by structure, in a decoder graph whose names tell nothing.

Between the embedding lookup and the logits, the nodes that every path runs through are, in a decoder with a residual
stream, the sums that form it: each block adds a branch to a value that it also carries past the branch, so no node inside
the branch lies on all paths. Walking these sums from the embedding on, a sum whose branch attends to other tokens opens
a block, and the last sum before the next such one closes it. Two sums a block, or one where attention and MLP
are parallel, both come out; scaled branches and norms inside them do not matter.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.residual import SKIP_NORMS, Site, Use, find_sites
from reft_edge.model.places import Place

_ATTENTION = (
    "Attention", "DecoderMaskedMultiHeadAttention", "GroupQueryAttention", "MultiHeadAttention", "PagedAttention",
    "QAttention", "SparseAttention",
)  # fmt: skip
_PRODUCTS = {
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "Einsum": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
}
"""Products of two matrices, and which inputs these are: others are scales and zero points."""
_SOFTMAX = ("Softmax", "QLinearSoftmax")
_SAME = ("Cast", "Dropout", "Identity")
_SHAPE_ONLY = {"Shape": (0,), "Size": (0,), "CastLike": (1,), "ConstantOfShape": (0,)}
"""Inputs of which a node takes the shape or type, not the content."""
_REARRANGED = (*_SAME, "Clip", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
_LAYER = re.compile(r"(?:^|[./])(?:layers|layer|h|blocks)[./](\d+)[./]")
_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)")
_SKIP_SUM, _SKIP_BIAS = 3, 4


@dataclass(frozen=True)
class _Sum:
    """A node that adds a branch to the residual stream."""

    node: ir.Node
    branch: int
    """Which input the branch comes in by."""
    attends: bool
    caches: frozenset[int]
    """Numbers of the KV caches that the branch reads."""

    @property
    def fused(self) -> bool:
        return self.node.op_type in SKIP_NORMS


def find_blocks(graph: ir.Graph, num_layers: int | None) -> list[Site]:
    """The output of each block, in order: by name where onnxruntime-genai's builder gave the names, else by structure.

    Raises ReftEdgeError that says what was looked for, and what was found, if neither way leads to `num_layers` blocks
    (where that number is known).
    """
    if num_layers is None:
        return find_sites_by_structure(graph)
    try:
        return find_sites(graph, num_layers)
    except ReftEdgeError as error:
        unnamed = f"by name: {error}"
    try:
        sites = find_sites_by_structure(graph)
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{error} ({unnamed})") from error
    if len(sites) != num_layers:
        raise ReftEdgeError(
            f"cannot place ports: found {len(sites)} blocks by structure, expected {num_layers} ({unnamed})"
        )
    return sites


def find_sites_by_structure(graph: ir.Graph) -> list[Site]:
    """The output of each block, in order.

    Raises ReftEdgeError that says what was found and what was expected wherever the graph is not plainly a decoder with
    one residual stream: then no port can be placed with certainty.
    """
    path = _path(graph)
    blocks = _blocks(_sums(path))
    if not blocks:
        raise ReftEdgeError(
            "cannot find the residual stream: no sum between the embedding and the logits adds an attention branch to "
            "a value that also goes past it"
        )
    _check_caches(graph, blocks)
    sites = [_site(layer, block[-1]) for layer, block in enumerate(blocks)]
    for site, block in zip(sites, blocks, strict=True):
        for number in _named_layers(block):
            if number != site.place.layer:
                raise ReftEdgeError(
                    f"cannot place ports: by structure, {block[-1].node.name} closes block {site.place.layer}, but its name says {number}"
                )
    return sites


def _path(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that carry content from the embedding to the logits, in the graph's order, the embedding first."""
    if any(node.op_type in ("If", "Loop", "Scan") for node in graph):
        raise ReftEdgeError(
            "the graph has branches or loops (If, Loop, Scan), as in Optimum's merged decoders (decoder_model_merged.onnx); "
            "give one that is not merged, such as the model.onnx of a newer export"
        )
    logits = next((output for output in graph.outputs if output.name == "logits"), None)
    if logits is None:
        names = ", ".join(str(output.name) for output in graph.outputs)
        raise ReftEdgeError(
            f"the graph has no output named `logits` (it has {names}); give a language model's graph"
        )
    last = logits.producer()
    embedding = _embedding(graph)
    after = _reachable([embedding])
    before = _ancestors(last)
    return [node for node in graph if node in after and node in before]


def _embedding(graph: ir.Graph) -> ir.Node:
    """The lookup of `input_ids` in a table of weights."""
    found = []
    for node in graph:
        if node.op_type not in ("Gather", "GatherBlockQuantized"):
            continue
        table, indices = node.inputs[0], node.inputs[1]
        if table is not None and _is_weight(table) and _from_ids(indices):
            found.append(node)
    if len(found) != 1:
        raise ReftEdgeError(
            f"cannot find the residual stream: expected one lookup of input_ids in a table of embeddings, found {len(found)}"
            + (f" ({', '.join(str(node.name) for node in found)})" if found else "")
        )
    return found[0]


def _is_weight(value: ir.Value) -> bool:
    """Whether a value depends on nothing but what is stored in the graph."""
    producer = value.producer()
    if producer is None:
        return value.is_initializer()
    return all(_is_weight(source) for source in producer.inputs if source is not None)


def _from_ids(value: ir.Value | None) -> bool:
    while value is not None:
        producer = value.producer()
        if producer is None:
            return value.name == "input_ids"
        if producer.op_type not in _REARRANGED:
            return False
        value = producer.inputs[0]
    return False


def _content(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes whose content `node` reads."""
    for index, value in enumerate(node.inputs):
        if value is not None and index not in _SHAPE_ONLY.get(node.op_type, ()):
            producer = value.producer()
            if producer is not None:
                yield producer


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that read the content of `node`."""
    for output in node.outputs:
        for use in output.uses():
            if use.idx not in _SHAPE_ONLY.get(use.node.op_type, ()):
                yield use.node


def _reachable(start: Sequence[ir.Node]) -> set[ir.Node]:
    found, waiting = set(start), list(start)
    while waiting:
        for reader in _readers(waiting.pop()):
            if reader not in found:
                found.add(reader)
                waiting.append(reader)
    return found


def _ancestors(node: ir.Node | None) -> set[ir.Node]:
    found = {node} if node is not None else set()
    waiting = list(found)
    while waiting:
        for source in _content(waiting.pop()):
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _passages(path: Sequence[ir.Node]) -> Iterator[tuple[ir.Node, list[ir.Node]]]:
    """Each node that all paths run through, with the nodes between the one before and it.

    In the graph's order, which is topological, these are the nodes that no edge jumps over.
    """
    position = {node: number for number, node in enumerate(path)}
    furthest, between = 0, list[ir.Node]()
    for number, node in enumerate(path):
        if furthest <= number:
            yield node, between
            between = []
        else:
            between.append(node)
        furthest = max([furthest, *(position[reader] for reader in _readers(node) if reader in position)])


def _sums(path: Sequence[ir.Node]) -> list[_Sum]:
    """The sums that form the residual stream, in order."""
    found: list[_Sum] = []
    on_path = set(path)
    stream: ir.Node | None = None
    changed: ir.Node | None = None
    for node, inside in _passages(path):
        computed = [value is not None and value.producer() in on_path for value in node.inputs[:2]]
        if node.op_type in ("Add", *SKIP_NORMS) and computed == [True, True]:
            carried = [index for index in (0, 1) if _carries(node.inputs[index], stream)]
            if changed is not None or len(carried) != 1:
                by = f"{changed.op_type} {changed.name}" if changed else f"{node.op_type} {node.name}"
                raise ReftEdgeError(
                    f"cannot follow the residual stream: {by} does more than add a branch to it; models that "
                    "normalise or scale the stream itself between blocks are not supported"
                )
            _refuse_bias(node)
            found.append(_Sum(node, 1 - carried[0], _attends(inside), frozenset(_cache_numbers(inside))))
            stream = node
        elif not found:
            stream = node
        elif node.op_type not in _SAME:
            changed = changed or node
    return found


def _refuse_bias(node: ir.Node) -> None:
    bias = node.inputs[_SKIP_BIAS] if len(node.inputs) > _SKIP_BIAS else None
    if node.op_type == "SkipLayerNormalization" and bias is not None:
        raise ReftEdgeError(
            f"{node.name} adds a bias to the residual stream inside a fused norm, where no port can be placed; "
            "give a graph without that fusion"
        )


def _carries(value: ir.Value | None, stream: ir.Node | None) -> bool:
    """Whether `value` is the residual stream as `stream` left it."""
    while value is not None:
        producer = value.producer()
        if producer is stream:
            return producer is not None and (
                producer.op_type not in SKIP_NORMS or value is producer.outputs[_SKIP_SUM]
            )
        if producer is None or producer.op_type not in _SAME:
            return False
        value = producer.inputs[0]
    return False


def _attends(branch: Sequence[ir.Node]) -> bool:
    """Whether a branch mixes tokens: a fused attention node, or a softmax and a product of two computed matrices."""
    if any(node.op_type in _ATTENTION for node in branch):
        return True
    inside = set(branch)
    return any(node.op_type in _SOFTMAX for node in branch) and any(
        all(_is_from(node, index, inside) for index in _PRODUCTS[node.op_type])
        for node in branch
        if node.op_type in _PRODUCTS
    )


def _is_from(node: ir.Node, index: int, nodes: set[ir.Node]) -> bool:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is not None and value.producer() in nodes


def _cache_numbers(branch: Sequence[ir.Node]) -> Iterator[int]:
    for node in branch:
        for value in node.inputs:
            if value is not None and (match := _PAST.fullmatch(value.name or "")):
                yield int(match[1])


def _blocks(sums: Sequence[_Sum]) -> list[list[_Sum]]:
    blocks: list[list[_Sum]] = []
    for found in sums:
        if found.attends:
            blocks.append([found])
        elif blocks:
            blocks[-1].append(found)
        else:
            raise ReftEdgeError(
                f"cannot tell the blocks apart: {found.node.name} adds to the residual stream before any attention does"
            )
    return blocks


def _check_caches(graph: ir.Graph, blocks: Sequence[Sequence[_Sum]]) -> None:
    numbers = {int(match[1]) for value in graph.inputs if (match := _PAST.fullmatch(value.name or ""))}
    if not numbers:
        return
    if len(numbers) != len(blocks):
        raise ReftEdgeError(
            f"cannot place ports: found {len(blocks)} blocks by structure, but the graph has KV caches of {len(numbers)} layers"
        )
    for layer, block in enumerate(blocks):
        read = frozenset().union(*(part.caches for part in block))
        if read != {layer}:
            raise ReftEdgeError(
                f"cannot place ports: block {layer}, found by structure, reads the KV caches of layers {sorted(read)}"
            )


def _named_layers(block: Sequence[_Sum]) -> Iterator[int]:
    for part in block:
        if not part.fused and (match := _LAYER.search(part.node.name or "")):
            yield int(match[1])


def _site(layer: int, closing: _Sum) -> Site:
    if closing.fused:
        return Site(Place(layer), (Use(closing.node, closing.branch),), Use(closing.node, 1 - closing.branch))
    return Site(Place(layer), tuple(Use(use.node, use.idx) for use in closing.node.outputs[0].uses()))
