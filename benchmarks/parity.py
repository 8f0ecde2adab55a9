"""Exported graphs against PyTorch and stock onnxruntime-genai, architectures by precisions, on tiny random models.

    python benchmarks/parity.py [--device cuda] [--markdown]

For each pair: the largest difference of logits from PyTorch's with a random LoReFT adapter at every layer, in exact
arithmetic (reft_edge/export/exact.py), and whether unmodified onnxruntime-genai, given the same folder and the packed
adapter, generates the tokens that our runtime generates. bf16 graphs are built for CUDA and have no CPU kernels: without
`--device cuda`, which builds every graph for a GPU and generates there, nothing is generated from them.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from reft_edge.adapter.file import save_adapter
from reft_edge.convert.onnx_adapter import pack_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.export import PRECISIONS, export_model
from reft_edge.export.checks import random_adapters
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from tests.helpers.tiny import ARCHITECTURES, make_model

TOKENS = 24
PROMPT = "The quick brown fox jumps over the lazy dog. How are you today? Water boils when"
WIDE = {"hidden_size": 128, "intermediate_size": 256}


@dataclass(frozen=True)
class Parity:
    architecture: str
    precision: str
    base_error: float | None = None
    steered_error: float | None = None
    effect: float | None = None
    stock: str = ""
    """`equal`, `differs`, or why there is no comparison."""
    refused: str = ""

    def cell(self) -> str:
        if self.refused or self.steered_error is None:
            return self.refused or self.stock
        return f"{self.steered_error:.0e}, {self.stock}"


def measure(architecture: str, precision: str, model: Path, work: Path, runs_on: str) -> Parity:
    if architecture in ("gpt_oss", "lfm2_moe") and precision in ("int8", "int4"):
        return Parity(architecture, precision, stock="refused: experts")
    folder = work / "export"
    device = "cuda" if precision == "bf16" else runs_on
    try:
        manifest = export_model(ModelFolder(model, architecture), folder, precision, device=device)
    except ReftEdgeError as error:
        return Parity(architecture, precision, refused=str(error))
    (interventions,) = random_adapters(manifest)
    save_adapter(interventions.to_adapter(), work / "task.safetensors")
    checked = manifest.verification
    return Parity(
        architecture,
        precision,
        checked["base_error"],
        checked["steered_error"],
        checked["effect"],
        stock_tokens(folder, work, device) if device == runs_on else "needs a GPU",
    )


def stock_tokens(folder: Path, work: Path, device: str) -> str:
    """Whether stock onnxruntime-genai and our runtime agree on greedy tokens, with the adapter and without."""
    import onnxruntime_genai as og

    pack_adapter(work / "task.safetensors", folder, work / "task.onnx_adapter")
    ours = SteeredModel(folder, device=device)
    ours.load_adapter(work / "task.safetensors", name="task")
    ids = ours.prompts.encode_raw(PROMPT)
    try:
        stock = og.Model(str(folder))
        adapters = og.Adapters(stock)
        adapters.load(str(work / "task.onnx_adapter"), "task")
        for name in ("task", None):
            generation = ours.stream(PROMPT, name, raw=True, max_tokens=TOKENS)
            generation.text()
            options = og.GeneratorParams(stock)
            options.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
            generator = og.Generator(stock, options)
            if name:
                generator.set_active_adapter(adapters, name)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            found = [
                token
                for token in generator.get_sequence(0)[len(ids) :].tolist()
                if token not in ours.manifest.eos_token_ids
            ]
            if found != [token for token in generation.tokens if token not in ours.manifest.eos_token_ids]:
                return "differs"
    except RuntimeError as error:
        return f"stock refuses: {str(error).splitlines()[0]}"
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES)
    )
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="what generates")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/benchmarks.md")
    options = parser.parse_args()

    console = Console(stderr=True)
    rows: dict[str, list[Parity]] = {}
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        for architecture in options.architectures:
            model = make_model(Path(temporary) / architecture, architecture, **WIDE)
            for precision in options.precisions:
                status.update(f"{architecture}, {precision}")
                row = measure(architecture, precision, model, Path(temporary), options.device)
                rows.setdefault(architecture, []).append(row)
    if options.json:
        print(json.dumps([asdict(parity) for row in rows.values() for parity in row]))
    elif options.markdown:
        print("| |" + "|".join(options.precisions) + "|\n|---|" + "---|" * len(options.precisions))
        for architecture, row in rows.items():
            print(f"| {architecture} | " + " | ".join(parity.cell() for parity in row) + " |")
    else:
        table = Table(
            "architecture", *options.precisions, title="largest difference from PyTorch, stock genai's tokens"
        )
        for architecture, row in rows.items():
            table.add_row(architecture, *(parity.cell() for parity in row))
        Console().print(table)
    failed = any(parity.refused or parity.stock == "differs" for row in rows.values() for parity in row)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
