"""The export of a decoder: build the graph, insert ports, verify, write the folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.build import Quantisation, Target, build_graph, stop_at
from reft_edge.export.carry import can_carry, kinds_that_cannot, share_external_data
from reft_edge.export.gguf_blocks import KINDS
from reft_edge.export.ports import insert_ports
from reft_edge.export.residual import find_part_sites, stream_type
from reft_edge.export.structure import find_blocks
from reft_edge.export.verify import TEXTS, compare, require, run_graphs
from reft_edge.files import read_text
from reft_edge.folders import replace_folder
from reft_edge.model.encoders import is_encoder
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import MANIFEST, Manifest, package_versions, save_manifest
from reft_edge.model.places import COMPONENTS, parse_layers
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder, class_name, load_config

_FLOAT_TYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}

Report = Callable[[str], None]


def export_model(
    model: ModelFolder,
    output: Path,
    precision: str = "fp32",
    layers: str = "all",
    report: Report = lambda step: None,
    *,
    components: Sequence[str] = ("block",),
    device: str = "cpu",
    quantisation: Quantisation | None = None,
) -> Manifest:
    """Build the graph, insert ports after `layers`, verify against PyTorch, and write the folder `output`.

    `components` of each layer get a port: its `block`, its `attention`, its `mlp`. `device` is what the graph is for,
    cpu or cuda; it is built and verified on the CPU either way. `report` is told each step. Nothing is left at `output`
    unless everything succeeded; an earlier export there is replaced only then.
    Raises ReftEdgeError if the model cannot be built, ported or verified.
    """
    components = _components(components)
    if is_encoder(model):
        if components != ("block",):
            raise ReftEdgeError("an encoder has ports on its blocks only; leave --components away")
        from reft_edge.export.encoder import export_encoder

        return export_encoder(model, output, precision, layers, report)
    target = Target(precision, device, _quantisation(model, precision, quantisation))
    config = load_config(model)
    num_layers = int(config.num_hidden_layers)
    chosen = parse_layers(layers, num_layers)
    with replace_folder(output, MANIFEST) as folder:
        report("building the frozen graph")
        own_blocks = target.quantised and target.quantisation.algorithm == "gguf"
        carried = build_graph(
            model.path, folder, target, folder / ".work", report, model.gguf if own_blocks else None
        )

        report("inserting ports")
        plain, graph = folder / "plain.onnx", folder / "model.onnx"
        graph.rename(plain)
        built = ir.load(plain)
        genai = json.loads(read_text(folder / "genai_config.json"))["model"]
        blocks = find_blocks(built.graph, num_layers)
        sites = [
            site
            for component in reversed(components)
            for site in (
                find_part_sites(built.graph, component, chosen)
                if component != "block"
                else [block for block in blocks if block.place.layer in chosen]
            )
        ]
        float_type = stream_type(blocks)
        ports = insert_ports(built, sites, genai["decoder"]["hidden_size"], float_type.numpy())
        share_external_data(built)
        ir.save(built, graph)
        del built, blocks, sites

        prompts = load_prompts(folder)
        eos = genai.get("eos_token_id")
        stops = prompts.stop_ids_with(eos if isinstance(eos, list) else [] if eos is None else [eos])
        stop_at(folder / "genai_config.json", stops)
        manifest = Manifest(
            base_name=model.name,
            base_fingerprint="",
            architecture=class_name(config),
            precision=precision,
            hidden_size=genai["decoder"]["hidden_size"],
            num_layers=num_layers,
            layers=chosen,
            components=components,
            head_size=genai["decoder"]["head_size"],
            context_length=genai["context_length"],
            eos_token_ids=stops,
            ports=ports,
            versions=package_versions(
                "reft-edge", "onnxruntime", "onnxruntime-genai", "onnx-ir", "torch", "transformers"
            ),
            float_type=_FLOAT_TYPES[float_type],
            device=device,
            quantisation={**asdict(target.quantisation), **carried} if target.quantised else {},
        )
        report("running the graph")
        rows = [prompts.encode_raw(text) for text in TEXTS]
        found = run_graphs(folder, plain, manifest, rows)

        report("loading the PyTorch model")
        torch_model = load_model(model)
        manifest = replace(manifest, base_fingerprint=fingerprint(torch_model))
        report("verifying against PyTorch")
        verification = compare(found, graph, manifest, torch_model, rows)
        require(verification)
        plain.unlink()
        manifest = replace(manifest, verification=asdict(verification))
        save_manifest(manifest, folder)
    return manifest


def _components(chosen: Sequence[str]) -> tuple[str, ...]:
    """In the order of COMPONENTS, block first. Raises ReftEdgeError for an unknown one or none."""
    if unknown := sorted(set(chosen) - set(COMPONENTS)):
        raise ReftEdgeError(
            f"unknown components {', '.join(map(repr, unknown))}; choose among {', '.join(COMPONENTS)}"
        )
    if not chosen:
        raise ReftEdgeError(f"no components were named; choose among {', '.join(COMPONENTS)}")
    return tuple(component for component in COMPONENTS if component in chosen)


def _quantisation(model: ModelFolder, precision: str, chosen: Quantisation | None) -> Quantisation:
    """What was chosen, or the file's own blocks where the model is a GGUF that has them, or the default."""
    if chosen is None or chosen.algorithm == "auto":
        chosen = chosen or Quantisation()
        own = model.gguf is not None and chosen.block_size == 32 and can_carry(model.gguf)
        rounded = "k_quant_mixed" if precision == "int4" else "k_quant"
        return replace(chosen, algorithm="gguf" if own else rounded)
    if chosen.algorithm == "gguf":
        _require_blocks(model)
    return chosen


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
