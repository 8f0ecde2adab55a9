"""Ports for an ONNX decoder that somebody else exported: find the residual stream, insert, verify, write a folder."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.check_ports import compare, probe, require, run_graphs, tap
from reft_edge.export.ports import ATTENTION_MASK, INPUT_IDS, insert_ports
from reft_edge.export.residual import Site, find_head_input
from reft_edge.export.structure import find_blocks
from reft_edge.export.verify import TEXTS
from reft_edge.files import read_text
from reft_edge.folders import replace_folder
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import MANIFEST, Manifest, package_versions, save_manifest
from reft_edge.model.places import parse_layers
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder, class_name, load_config

GRAPH = "model.onnx"
_PLAIN = "plain.onnx"
_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)")
_OTHER_INPUTS = (INPUT_IDS, ATTENTION_MASK, "position_ids", "num_logits_to_keep")
_LEAST_OPSET = 13
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_FLOAT_TYPES = {"float32": "fp32", "float16": "fp16"}

Report = Callable[[str], None]


@dataclass(frozen=True)
class BlockOutput:
    """Where a block's output is formed in the graph."""

    layer: int
    node: str
    """The node that forms it: a sum, or a fused norm."""
    value: str
    """The value that a port edits."""


@dataclass(frozen=True)
class Ported:
    """What `add_ports` found and wrote."""

    outputs: list[BlockOutput]
    """The output of every block, also of those that got no port."""
    manifest: Manifest


def model_beside(graph: Path) -> ModelFolder:
    """The PyTorch model in the folder of an ONNX file, or above a folder named `onnx`, as model hubs lay them out.

    Raises ReftEdgeError that says what to give if there is none.
    """
    for folder in _folders(graph):
        if (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            return ModelFolder(folder, folder.name)
    raise ReftEdgeError(
        f"there are no PyTorch weights beside {graph}; give the model that it was exported from with --model "
        "(an adapter is bound to that model's fingerprint, and the graph is checked against it)"
    )


def add_ports(
    source: Path,
    output: Path,
    model: ModelFolder,
    layers: str = "all",
    report: Report = lambda step: None,
) -> Ported:
    """Write a folder that holds the decoder graph `source` with a port after each of `layers`.

    `model` is the PyTorch model that the graph was exported from. `report` is told each step. Nothing is left at
    `output` unless everything succeeded; an earlier folder there is replaced only then. Weights are copied one at a
    time. Raises ReftEdgeError that says why if the runtime cannot feed the graph, if its residual stream cannot be
    found with certainty, or if verification fails.
    """
    report("reading the graph")
    config = load_config(model)
    built = _load(source)
    cache = _cache(built.graph)
    num_layers = _layers_with_cache(built.graph)
    sites = find_blocks(built.graph, num_layers)
    outputs = [
        BlockOutput(site.place.layer, _forming_node(site), str(site.uses[0].value.name)) for site in sites
    ]
    if len(sites) != config.num_hidden_layers:
        raise ReftEdgeError(
            f"found {len(sites)} blocks in {source}, but {model.name} has {config.num_hidden_layers}; "
            "give the model that the graph was exported from with --model"
        )
    chosen = parse_layers(layers, len(sites))
    precision, quantisation = _quantisation(built.graph)
    head = _head(built.graph)
    taps = [tap(site) for site in sites]

    with replace_folder(output, MANIFEST) as folder:
        _copy_texts(source, model, folder)
        report("copying weights")
        ir.save(built, folder / _PLAIN, external_data=f"{GRAPH}.data")
        head_size = _head_size(built.graph, config)
        del built, sites

        report("running the graph")
        prompts = load_prompts(folder)
        rows = [prompts.encode_raw(text) for text in TEXTS]
        found = probe(folder / _PLAIN, taps, head, rows, head_size)
        if found.hidden_size != config.hidden_size or found.dtype.name not in _FLOAT_TYPES:
            raise ReftEdgeError(
                f"the residual stream found is {found.dtype.name} of size {found.hidden_size}; expected float32 or float16 of "
                f"{model.name}'s size, {config.hidden_size}"
            )

        report("inserting ports")
        built = ir.load(folder / _PLAIN)
        sites = [site for site in find_blocks(built.graph, num_layers) if site.place.layer in chosen]
        ports = insert_ports(built, sites, found.hidden_size, found.dtype, keep_logits=found.head_reads_all)
        ir.save(built, folder / GRAPH)
        del built, sites

        float_type = _FLOAT_TYPES[found.dtype.name]
        manifest = Manifest(
            base_name=model.name,
            base_fingerprint="",
            architecture=class_name(config),
            precision=precision or float_type,
            hidden_size=found.hidden_size,
            num_layers=len(taps),
            layers=chosen,
            head_size=head_size,
            context_length=config.max_position_embeddings,
            eos_token_ids=(),
            ports=ports,
            versions=package_versions("reft-edge", "onnxruntime", "onnx-ir", "torch", "transformers"),
            float_type=float_type,
            quantisation=quantisation,
            cache=cache,
            source="add-ports",
        )
        report("running the graph with ports")
        ported = run_graphs(folder, _PLAIN, manifest, [part for part in taps if part.layer in chosen], rows)

        report("loading the PyTorch model")
        torch_model = load_model(model)
        manifest = replace(
            manifest,
            base_fingerprint=fingerprint(torch_model),
            eos_token_ids=prompts.stop_ids_with(_eos(torch_model, config)),
        )
        report("verifying against PyTorch")
        verification = compare(ported, found.streams, manifest, torch_model, rows)
        require(verification)
        (folder / _PLAIN).unlink()
        manifest = replace(manifest, verification=asdict(verification))
        save_manifest(manifest, folder)
    return Ported(outputs, manifest)


def _load(source: Path) -> ir.Model:
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


def _layers_with_cache(graph: ir.Graph) -> int | None:
    return len({match[1] for value in graph.inputs if (match := _PAST.fullmatch(str(value.name)))}) or None


def _forming_node(site: Site) -> str:
    node = site.uses[0].node if site.skip else site.uses[0].value.producer()
    assert node is not None
    return f"{node.op_type} {node.name}"


def _head(graph: ir.Graph) -> str | None:
    """The value that the head reads, if that can be told; without it, the graph gives logits for all tokens."""
    try:
        return find_head_input(graph)[1].name
    except ReftEdgeError:
        return None


def _head_size(graph: ir.Graph, config: Any) -> int:
    for value in graph.inputs:
        if _PAST.fullmatch(str(value.name)) and value.shape is not None and isinstance(value.shape[3], int):
            return value.shape[3]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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


def _eos(model: Any, config: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)


def _folders(source: Path) -> list[Path]:
    folder = source.absolute().parent
    return [folder, folder.parent] if folder.name == "onnx" else [folder]


def _copy_texts(source: Path, model: ModelFolder, folder: Path) -> None:
    """The tokenizer and chat template, of the model where it has them; onnxruntime-genai's settings if there are any."""
    homes = [home for home in (model.path, *_folders(source)) if (home / "tokenizer.json").is_file()]
    if not homes:
        raise ReftEdgeError(
            f"there is no tokenizer.json in {model.path} nor beside {source}; save the model's fast tokenizer there"
        )
    for name in _TOKENIZER:
        if (homes[0] / name).is_file():
            shutil.copyfile(homes[0] / name, folder / name)
    settings = source.absolute().parent / "genai_config.json"
    if settings.is_file():
        content = json.loads(read_text(settings))
        content["model"]["decoder"]["filename"] = GRAPH
        (folder / settings.name).write_text(json.dumps(content, indent=4), encoding="utf-8")
