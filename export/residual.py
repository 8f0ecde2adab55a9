"""Finding in a decoder graph where outputs of blocks, and of their parts, are first formed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import Place

SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_PRODUCTS = ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul")
_INTEGER_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat")
_AFTER_HEAD = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")
_PARTS = {"attention": ("attn", "linear_attn", "conv"), "mlp": ("mlp", "moe")}
_NAME = re.compile(
    r"/model/layers\.(\d+)/(?:input_layernorm|operator_layernorm|final_norm_layernorm)/SkipLayerNorm"
)


@dataclass(frozen=True)
class Use:
    """One input of one node."""

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value:
        return _present(self.node.inputs[self.index])


@dataclass(frozen=True)
class Site:
    """Where a place's hidden state is formed: the value that `uses` read, plus what `skip` reads where the sum of the
    two is only formed inside a fused skip-and-normalise node."""

    place: Place
    uses: tuple[Use, ...]
    """Everything that reads the value; all of them read the edited one once there is a port."""
    skip: Use | None = None


def find_sites(graph: ir.Graph, num_layers: int) -> list[Site]:
    """The output of each block, in order, in a graph made by onnxruntime-genai's model builder.

    Block i's output is summed inside the fused norm that opens block i + 1, or in the final norm. Raises
    ReftEdgeError that says what was looked for if any of them is missing.
    """
    norms: dict[int, ir.Node] = {}
    for node in graph:
        match = _NAME.fullmatch(node.name or "")
        if match and node.op_type in SKIP_NORMS:
            norms[int(match[1]) - 1] = node
    missing = [layer for layer in range(num_layers) if layer not in norms]
    if missing:
        raise ReftEdgeError(
            f"cannot place ports after layers {missing}: looked for {' or '.join(SKIP_NORMS)} nodes named like "
            f"/model/layers.1/input_layernorm/SkipLayerNorm and found {len(norms)} of {num_layers}; "
            "this architecture's graph is not supported"
        )
    return [
        Site(Place(layer), uses=(Use(norms[layer], 1),), skip=Use(norms[layer], 0))
        for layer in range(num_layers)
    ]


def find_part_sites(graph: ir.Graph, component: str, layers: Sequence[int]) -> list[Site]:
    """The output of the attention or the MLP of each of `layers`, in a graph made by onnxruntime-genai's model builder.

    It is the one value that is computed under the part's name and read elsewhere. Raises ReftEdgeError that says what
    was looked for if a layer has none or several.
    """
    sites = []
    for layer in layers:
        inside = tuple(f"/model/layers.{layer}/{part}/" for part in _PARTS[component])
        found = []
        for node in graph:
            if (node.name or "").startswith(inside):
                uses = [tuple(Use(use.node, use.idx) for use in value.uses()) for value in node.outputs]
                found += [
                    reads
                    for reads in uses
                    if any(not (use.node.name or "").startswith(inside) for use in reads)
                ]
        if len(found) != 1:
            raise ReftEdgeError(
                f"cannot place a port on the {component} output of layer {layer}: expected one value that nodes named "
                f"{' or '.join(inside)}... compute for others, found {len(found)}; this architecture's graph has no such port"
            )
        sites.append(Site(Place(layer, component), found[0]))
    return sites


def find_head_input(graph: ir.Graph) -> tuple[ir.Node, ir.Value]:
    """The node that first reads hidden states for the language-model head, as its input 0, and these hidden states.

    It is the head's matrix product, or the node that quantises activations for it. Raises ReftEdgeError if no such
    product leads to the graph's output `logits` by way of nothing but scaling, biases and caps.
    """
    value = next((output for output in graph.outputs if output.name == "logits"), None)
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _AFTER_HEAD:
        node = _present(node.inputs[0]).producer()
    if node is not None and node.op_type in _INTEGER_PRODUCTS:
        quantised = _present(node.inputs[0])
        node = quantised.producer()
        if node is not None and (node.op_type != "DynamicQuantizeLinear" or len(quantised.uses()) != 1):
            node = None
    elif node is not None and node.op_type not in _PRODUCTS:
        node = None
    if node is None:
        raise ReftEdgeError(
            "cannot find the language-model head: no MatMul leads to an output named `logits`"
        )
    return node, _present(node.inputs[0])


def stream_type(sites: Sequence[Site]) -> ir.DataType:
    """The float type of the residual stream. Raises ReftEdgeError if the graph does not say."""
    dtype = sites[0].uses[0].value.dtype
    if dtype is None:
        raise ReftEdgeError(f"the graph gives no type for {sites[0].uses[0].value.name}, a block's output")
    return dtype


def _present(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ReftEdgeError("the graph is malformed: a node lacks a required input")
    return value
