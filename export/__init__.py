"""Exporting a frozen model once to ONNX with intervention ports. Needs the extra `export`."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir

from reft_edge.errors import ReftEdgeError
from reft_edge.export.build import PRECISIONS, build_graph
from reft_edge.export.ports import insert_ports
from reft_edge.export.residual import cache_type, find_sites
from reft_edge.export.verify import TEXTS, require, verify
from reft_edge.files import replace_folder
from reft_edge.fingerprint import fingerprint
from reft_edge.layers import parse_layers
from reft_edge.manifest import MANIFEST, Manifest, save_manifest
from reft_edge.models import ModelFolder, load_model
from reft_edge.prompts import load_prompts

__all__ = ["PRECISIONS", "export_model"]

Report = Callable[[str], None]


def export_model(
    model: ModelFolder,
    output: Path,
    precision: str = "fp32",
    layers: str = "all",
    report: Report = lambda step: None,
) -> Manifest:
    """Build the graph, insert ports after `layers`, verify against PyTorch, and write the folder `output`.

    `report` is told each step. Nothing is left at `output` unless everything succeeded; an earlier export there is
    replaced only then. Raises ReftEdgeError if the model cannot be built, ported or verified.
    """
    if precision not in PRECISIONS:
        raise ReftEdgeError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    num_layers = int(config.get("num_hidden_layers", 0))
    chosen = parse_layers(layers, num_layers)
    with replace_folder(output, MANIFEST) as folder:
        report("building the frozen graph")
        build_graph(model.path, folder, precision, folder / ".work", report)

        genai = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        report("inserting ports")
        plain, graph = folder / "plain.onnx", folder / "model.onnx"
        graph.rename(plain)
        built = ir.load(plain)
        sites = [site for site in find_sites(built.graph, num_layers) if site.layer in chosen]
        ports = insert_ports(built, sites, genai["decoder"]["hidden_size"], cache_type(built.graph))
        ir.save(built, graph)

        report("loading the PyTorch model")
        torch_model = load_model(model)
        eos = genai["eos_token_id"]
        manifest = Manifest(
            base_name=model.name,
            base_fingerprint=fingerprint(torch_model),
            architecture=config["architectures"][0],
            precision=precision,
            hidden_size=genai["decoder"]["hidden_size"],
            num_layers=num_layers,
            layers=chosen,
            head_size=genai["decoder"]["head_size"],
            context_length=genai["context_length"],
            eos_token_ids=tuple(eos if isinstance(eos, list) else [eos]),
            ports=ports,
            versions={
                package: _version(package)
                for package in (
                    "reft-edge",
                    "onnxruntime",
                    "onnxruntime-genai",
                    "onnx-ir",
                    "torch",
                    "transformers",
                )
            },
        )
        report("verifying against PyTorch")
        prompts = load_prompts(folder)
        verification = verify(
            folder, plain, manifest, torch_model, [prompts.encode_raw(text) for text in TEXTS]
        )
        require(verification)
        plain.unlink()
        manifest = Manifest(**{**vars(manifest), "verification": verification.as_dict()})
        save_manifest(manifest, folder)
    return manifest


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
