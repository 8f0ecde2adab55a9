"""What an ONNX decoder that somebody else exported says of itself, and whether a runtime can feed it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.ports import ATTENTION_MASK, INPUT_IDS
from reft_edge.export.residual import find_head_input

_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)")
_OTHER_INPUTS = (INPUT_IDS, ATTENTION_MASK, "position_ids", "num_logits_to_keep")
_LEAST_OPSET = 13


@dataclass(frozen=True)
class ForeignGraph:
    """What can be read off a graph before it runs."""

    cache: str
    """How it keeps keys and values, as in the manifest."""
    cached_layers: int | None
    """Layers that have a KV cache; None without one."""
    head: str | None
    """The value that the head reads, if that can be told; without it, the graph gives logits for all tokens."""
    head_size: int | None
    """Of a KV cache; None where the graph does not say."""
    precision: str
    """Of quantised weights; empty where they are floats."""
    quantisation: dict[str, Any]


def load_graph(source: Path) -> ir.Model:
    """The graph, its functions inlined. Raises ReftEdgeError if it cannot be read or its opset is too old for ports."""
    if not source.is_file():
        raise ReftEdgeError(f"there is no file {source}; give an ONNX graph")
    try:
        model = ir.load(source)
    except Exception as error:  # protobuf and onnx-ir raise many kinds here
        raise ReftEdgeError(f"cannot read {source}: {error}") from error
    opset = model.opset_imports.get("", 0)
    if opset < _LEAST_OPSET:
        raise ReftEdgeError(
            f"{source} is in ONNX opset {opset}; ports need {_LEAST_OPSET} or later: export the model again"
        )
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        InlinePass()(model)
    return model


def describe_graph(graph: ir.Graph) -> ForeignGraph:
    """Raises ReftEdgeError if the graph has ports already, or inputs and outputs other than a runtime can feed."""
    cache = _cache(graph)
    precision, quantisation = _quantisation(graph)
    return ForeignGraph(
        cache, _cached_layers(graph), _head(graph), _head_size(graph), precision, quantisation
    )


def _cache(graph: ir.Graph) -> str:
    """What kind of KV cache the graph has. Raises ReftEdgeError if its inputs or outputs are not what a runtime can feed."""
    names = [str(value.name) for value in graph.inputs if not value.is_initializer()]
    if any(str(value.name).startswith("reft.") for value in graph.inputs):
        raise ReftEdgeError("the graph has ports already; give the graph without them")
    missing = [name for name in (INPUT_IDS, ATTENTION_MASK) if name not in names]
    unknown = [name for name in names if name not in _OTHER_INPUTS and not _PAST.fullmatch(name)]
    if missing or unknown:
        raise ReftEdgeError(
            "the runtime cannot feed this graph: "
            + "; ".join(
                [f"it has no input {name}" for name in missing]
                + [f"it has an input {name}" for name in unknown]
            )
            + f"; expected {', '.join(_OTHER_INPUTS)} and past_key_values.N.key and .value"
        )
    for value in graph.inputs:
        if value.name in _OTHER_INPUTS and value.dtype not in (ir.DataType.INT64, None):
            raise ReftEdgeError(f"the graph's input {value.name} is {value.dtype}; expected INT64")
    pasts = [value for value in graph.inputs if _PAST.fullmatch(str(value.name))]
    outputs = {output.name for output in graph.outputs}
    for past in pasts:
        present = str(past.name).replace("past_key_values", "present")
        if present not in outputs:
            raise ReftEdgeError(f"the graph has an input {past.name} but no output {present} to go on with")
        shape = past.shape
        if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
            raise ReftEdgeError(
                f"the graph's input {past.name} is {shape}; expected [batch, heads, tokens, head size] with a "
                "number for heads"
            )
    if not pasts:
        return "none"
    fused = all(use.node.op_type == "GroupQueryAttention" for past in pasts for use in past.uses())
    return "shared" if fused else "growing"


def _cached_layers(graph: ir.Graph) -> int | None:
    return len({match[1] for value in graph.inputs if (match := _PAST.fullmatch(str(value.name)))}) or None


def _head(graph: ir.Graph) -> str | None:
    try:
        return find_head_input(graph)[1].name
    except ReftEdgeError:
        return None


def _head_size(graph: ir.Graph) -> int | None:
    for value in graph.inputs:
        if _PAST.fullmatch(str(value.name)) and value.shape is not None and isinstance(value.shape[3], int):
            return value.shape[3]
    return None


def _quantisation(graph: ir.Graph) -> tuple[str, dict[str, Any]]:
    """The precision of quantised weights and how they are stored; empty where they are floats."""
    for node in graph:
        if node.op_type == "MatMulNBits":
            number = {
                name: int(node.attributes[name].as_int())
                for name in ("bits", "block_size")
                if name in node.attributes
            }
            bits = number.get("bits", 4)
            return f"int{bits}", {"algorithm": node.op_type, **number}
        if node.op_type in (
            "MatMulInteger",
            "MatMulIntegerToFloat",
            "DynamicQuantizeMatMul",
            "DequantizeLinear",
        ):
            return "int8", {"algorithm": node.op_type}
    return "", {}
