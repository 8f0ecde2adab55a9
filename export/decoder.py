"""Exporting a decoder: onnxruntime-genai's model builder, with ports where a layer's hidden states are formed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.architectures import check_architecture, check_text_alone
from reft_edge.export.build import Quantisation, Target, build_graph, stop_at, usual_block_size
from reft_edge.export.carry import can_carry, kinds_that_cannot
from reft_edge.export.check_decoder import GraphLogits, Verification, compare, run_graphs
from reft_edge.export.checks import TEXTS
from reft_edge.export.gguf_blocks import KINDS
from reft_edge.export.recipe import GRAPH, PLAIN, Places, Report, export_graph
from reft_edge.export.residual import find_part_sites, stream_type
from reft_edge.export.structure import find_blocks
from reft_edge.files import read_text
from reft_edge.model.checkpoint import Reference, open_model
from reft_edge.model.manifest import Manifest, package_versions
from reft_edge.model.places import parse_layers
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder, class_name, load_config

_LEAST_CONTEXT = 32
_NOT_ROUNDED = ("F32", "F16", "BF16", "F64")
_FIXED_ROPE = ("default", "linear", "llama3")
"""Kinds of rotary tables that are the same, only shorter, for a shorter context."""


def export_decoder(
    model: ModelFolder,
    output: Path,
    precision: str,
    layers: str,
    report: Report,
    components: tuple[str, ...],
    device: str,
    quantisation: Quantisation | None,
    context: int | None = None,
    port_kinds: tuple[str, ...] = ("affine",),
) -> Manifest:
    """Export a decoder to the folder `output`, as `export_model` says; `components` and
    `port_kinds` are in the order of COMPONENTS and PORT_KINDS.

    Raises ReftEdgeError if the model cannot be built, ported or verified.
    """
    quantised = Target(precision, device, quantisation or Quantisation(), context).quantised
    config = load_config(model)
    check_text_alone(model)
    check_architecture(config, model.name, quantised)
    target = Target(precision, device, _quantisation(model, precision, quantisation, config), context)
    if context is not None:
        _check_context(model, config, context)
    chosen = parse_layers(layers, int(config.num_hidden_layers))

    def build(folder: Path) -> _Decoder:
        report("building the frozen graph")
        carried = _build(model, target, folder, report)
        manifest = _describe(model, target, config, folder)
        manifest = replace(manifest, layers=chosen, components=components, port_kinds=port_kinds)
        if target.quantised:
            manifest = replace(manifest, quantisation={**asdict(target.quantisation), **carried})
        prompts = load_prompts(folder)
        return _Decoder(model, manifest, [prompts.encode_raw(text) for text in TEXTS])

    return export_graph(output, build, report)[1]


@dataclass(frozen=True)
class _Decoder:
    """A graph of the model builder's; see `recipe.Draft`."""

    model: ModelFolder
    manifest: Manifest
    rows: Sequence[Sequence[int]]
    """Token ids that the graphs are run on."""

    def place(self, graph: ir.Graph) -> Places:
        blocks = find_blocks(graph, self.manifest.num_layers)
        chosen = self.manifest.layers
        sites = []
        for component in reversed(self.manifest.components):
            if component == "block":
                sites += [block for block in blocks if block.place.layer in chosen]
            else:
                sites += find_part_sites(graph, component, chosen)
        return Places(sites, stream_type(blocks))

    def run(self, folder: Path, manifest: Manifest) -> GraphLogits:
        return run_graphs(folder, folder / PLAIN, manifest, self.rows)

    def load(self, report: Report) -> tuple[Reference, str]:
        report("loading the PyTorch model")
        model = open_model(self.model)
        return model, model.base_fingerprint

    def compare(self, said: GraphLogits, folder: Path, manifest: Manifest, model: Reference) -> Verification:
        return compare(said, folder / GRAPH, manifest, model, self.rows)


def _build(model: ModelFolder, target: Target, folder: Path, report: Report) -> dict[str, int]:
    """Write PLAIN, its weights, the tokenizer and onnxruntime-genai's settings; how many of a GGUF's matrices are its own."""
    gguf = model.gguf if target.quantised and target.quantisation.algorithm == "gguf" else None
    carried = build_graph(model.path, folder, target, folder / ".work", report, gguf)
    (folder / GRAPH).rename(folder / PLAIN)
    return carried


def _describe(model: ModelFolder, target: Target, config: Any, folder: Path) -> Manifest:
    """What the builder's settings in `folder` say of the model; they are given all of the tokens that end an answer."""
    settings = folder / "genai_config.json"
    genai = json.loads(read_text(settings))["model"]
    eos = genai.get("eos_token_id")
    stops = load_prompts(folder).stop_ids_with(eos if isinstance(eos, list) else [] if eos is None else [eos])
    stop_at(settings, stops)
    return Manifest(
        base_name=model.name,
        base_fingerprint="",
        architecture=class_name(config),
        precision=target.precision,
        hidden_size=genai["decoder"]["hidden_size"],
        num_layers=int(config.num_hidden_layers),
        layers=(),
        head_size=genai["decoder"]["head_size"],
        context_length=genai["context_length"],
        eos_token_ids=stops,
        ports={},
        versions=package_versions(
            "reft-edge", "onnxruntime", "onnxruntime-genai", "onnx-ir", "torch", "transformers"
        ),
        device=target.device,
        cache="growing" if _has_states(folder / PLAIN) else "shared",
    )


def _has_states(graph: Path) -> bool:
    """Whether layers keep a state of their own kind, which cannot be a buffer that past and present share."""
    return any((value.name or "").startswith("past.") for value in ir.load(graph).graph.inputs)


def _check_context(model: ModelFolder, config: Any, context: int) -> None:
    """Raise ReftEdgeError for a context that the model does not have, or that would change what it computes."""
    longest = int(getattr(config, "max_position_embeddings", None) or 0)
    if not _LEAST_CONTEXT <= context <= longest:
        raise ReftEdgeError(
            f"--context is {context}; {model.name} has {longest}, so give {_LEAST_CONTEXT} to {longest}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for kind in (part.get("rope_type", "default") for part in sets):
        if kind not in _FIXED_ROPE:
            raise ReftEdgeError(
                f"the rotary tables of {model.name} ({kind}) depend on its context; leave --context out"
            )


def _quantisation(
    model: ModelFolder, precision: str, chosen: Quantisation | None, config: Any
) -> Quantisation:
    """What was chosen, or the file's own blocks where the model is a GGUF that has them, or the default."""
    chosen = chosen or Quantisation()
    if chosen.algorithm == "gguf":
        _require_blocks(model)
    if precision not in ("int4", "int8"):
        return chosen
    if chosen.algorithm == "auto":
        _refuse_tables(model)
        own = model.gguf is not None and chosen.block_size in (None, 32) and can_carry(model.gguf)
        rounded = "k_quant_mixed" if precision == "int4" else "k_quant"
        chosen = replace(chosen, algorithm="gguf" if own else rounded)
    if chosen.block_size is not None:
        return chosen
    size = 32 if chosen.algorithm == "gguf" else usual_block_size(_weights_of(config), config.hidden_size)
    return replace(chosen, block_size=size)


def _weights_of(config: Any) -> int:
    """How many numbers a model of this configuration has."""
    from accelerate import init_empty_weights
    from transformers.models.auto import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return int(model.num_parameters())


def _refuse_tables(model: ModelFolder) -> None:
    """Raise ReftEdgeError for a GGUF with matrices that would be rounded a second time without anybody having said so."""
    found = [] if model.gguf is None else kinds_that_cannot(model.gguf)
    if rounded := [kind for kind in found if kind not in _NOT_ROUNDED]:
        raise ReftEdgeError(
            f"{model.name} has matrices of the kind {', '.join(rounded)}, which no graph can hold as they are; take a file of "
            "another kind, such as Q4_K_M, or have them rounded a second time: --algorithm k_quant rounds all matrices, gguf "
            "only these (where they are fewer than half)"
        )


def _require_blocks(model: ModelFolder) -> None:
    if model.gguf is None:
        raise ReftEdgeError(
            f"{model.name} is no GGUF file, so it has no blocks to keep; choose another --algorithm"
        )
    if not can_carry(model.gguf):
        raise ReftEdgeError(
            f"most matrices of {model.gguf.name} are not in blocks that a graph can hold: they are "
            f"{', '.join(kinds_that_cannot(model.gguf))}, and {', '.join(KINDS)} can be kept; choose another --algorithm"
        )
