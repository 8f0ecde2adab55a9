"""Ports for an ONNX decoder that somebody else exported: find the residual stream, insert, verify, write a folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.check_ports import (
    Found,
    PortVerification,
    Probe,
    Tap,
    compare,
    probe,
    run_graphs,
    tap,
)
from reft_edge.export.checks import TEXTS
from reft_edge.export.foreign_graph import ForeignGraph, describe_graph, load_graph
from reft_edge.export.recipe import FLOAT_TYPES, GRAPH, PLAIN, Places, Report, export_graph, port_kinds_of
from reft_edge.export.residual import Site
from reft_edge.export.structure import find_blocks
from reft_edge.files import read_text
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import Manifest, package_versions
from reft_edge.model.places import parse_layers
from reft_edge.model.prompts import load_prompts, read_end_ids
from reft_edge.model.source import ModelFolder, class_name, load_config

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


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
    port_kinds: Sequence[str] = ("affine",),
) -> Ported:
    """Write a folder that holds the decoder graph `source` with a port of these kinds after each of `layers`.

    `model` is the PyTorch model that the graph was exported from. `report` is told each step. Nothing is left at
    `output` unless everything succeeded; an earlier folder there is replaced only then. Weights are copied one at a
    time. Raises ReftEdgeError that says why if the runtime cannot feed the graph, if its residual stream cannot be
    found with certainty, or if verification fails.
    """

    kinds = port_kinds_of(port_kinds)

    def build(folder: Path) -> _Foreign:
        report("reading the graph")
        config = load_config(model)
        graph = load_graph(source)
        read = describe_graph(graph.graph)
        sites = _find_blocks(graph.graph, read, source, model, int(config.num_hidden_layers))
        outputs, taps = [_block_output(site) for site in sites], [tap(site) for site in sites]
        chosen = parse_layers(layers, len(sites))
        _copy_texts(source, model, folder)
        report("copying weights")
        ir.save(graph, folder / PLAIN, external_data=f"{GRAPH}.data")
        del graph, sites

        report("reading the residual stream")
        head_size = read.head_size or _head_size(config)
        prompts = load_prompts(folder)
        rows = [prompts.encode_raw(text) for text in TEXTS]
        found = probe(folder / PLAIN, taps, read.head, rows, head_size)
        _check_stream(found, model, config.hidden_size)
        manifest = Manifest(
            base_name=model.name,
            base_fingerprint="",
            architecture=class_name(config),
            precision=read.precision or FLOAT_TYPES[ir.DataType.from_numpy(found.dtype)],
            hidden_size=found.hidden_size,
            num_layers=len(taps),
            layers=chosen,
            head_size=head_size,
            context_length=config.max_position_embeddings,
            eos_token_ids=prompts.stop_ids_with(read_end_ids(model.path)),
            ports={},
            versions=package_versions("reft-edge", "onnxruntime", "onnx-ir", "torch", "transformers"),
            quantisation=read.quantisation,
            cache=read.cache,
            source="add-ports",
            port_kinds=kinds,
        )
        return _Foreign(model, manifest, read, outputs, taps, rows, found)

    draft, manifest = export_graph(output, build, report)
    return Ported(draft.outputs, manifest)


@dataclass(frozen=True)
class _Foreign:
    """A graph from elsewhere; see `recipe.Draft`."""

    model: ModelFolder
    manifest: Manifest
    read: ForeignGraph
    outputs: list[BlockOutput]
    taps: Sequence[Tap]
    """Where to read every block's output."""
    rows: Sequence[Sequence[int]]
    """Token ids that the graphs are run on."""
    found: Probe
    """What the graph without ports computes for them."""

    def place(self, graph: ir.Graph) -> Places:
        blocks = find_blocks(graph, self.read.cached_layers)
        sites = [site for site in blocks if site.place.layer in self.manifest.layers]
        return Places(sites, ir.DataType.from_numpy(self.found.dtype), self.found.head_reads_all)

    def run(self, folder: Path, manifest: Manifest) -> Found:
        ported = [part for part in self.taps if part.layer in manifest.layers]
        return run_graphs(folder, PLAIN, manifest, ported, self.rows)

    def load(self, report: Report) -> tuple[Any, str]:
        report("loading the PyTorch model")
        model = load_model(self.model)
        return model, fingerprint(model)

    def compare(self, said: Found, folder: Path, manifest: Manifest, model: Any) -> PortVerification:
        return compare(said, self.found.streams, manifest, model, self.rows)


def _find_blocks(
    graph: ir.Graph, read: ForeignGraph, source: Path, model: ModelFolder, expected: int
) -> list[Site]:
    """The output of every block. Raises ReftEdgeError unless there are as many as the model has."""
    sites = find_blocks(graph, read.cached_layers)
    if len(sites) != expected:
        raise ReftEdgeError(
            f"found {len(sites)} blocks in {source}, but {model.name} has {expected}; "
            "give the model that the graph was exported from with --model"
        )
    return sites


def _block_output(site: Site) -> BlockOutput:
    node = site.uses[0].node if site.skip else site.uses[0].value.producer()
    assert node is not None
    return BlockOutput(site.place.layer, f"{node.op_type} {node.name}", str(site.uses[0].value.name))


def _check_stream(found: Probe, model: ModelFolder, hidden_size: int) -> None:
    if found.hidden_size != hidden_size or found.dtype.name not in ("float32", "float16"):
        raise ReftEdgeError(
            f"the residual stream found is {found.dtype.name} of size {found.hidden_size}; expected float32 or float16 of "
            f"{model.name}'s size, {hidden_size}"
        )


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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
