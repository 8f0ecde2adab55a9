"""The runtime beside what people would pick instead: same machine, same prompt, same weights, taking turns.

    python benchmarks/runtime/speed.py --precision int4 --peers FOLDER

Every contender is a process of its own; rounds go round them, so that each round sees the same machine, and all are started
anew a few times, since where a process happens to lie in memory makes some percent. Medians are printed, and medians of each
round's ratio to reft-edge with an adapter (rank 8, f7+l7, every layer).
FOLDER is what environments.sh made; without it, llama.cpp and pyreft are left out. PyTorch's contenders run fp32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from contenders import CONTENDERS
from gguf import GGUFWriter
from rich.console import Console
from rich.table import Table

from reft_edge.adapter.file import save_adapter
from reft_edge.export import Quantisation, export_model
from reft_edge.export.build import Target, build_graph
from reft_edge.export.ports import insert_ports
from reft_edge.model.manifest import Manifest, save_manifest
from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.bench import random_adapter

RANK, POSITIONS = 8, 7
REFERENCE = "reft-edge, adapter"
CONTENDER = Path(__file__).with_name("contenders.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", default="int4", choices=["fp32", "int8", "int4"])
    parser.add_argument("--peers", type=Path, help="the folder of environments.sh")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="by default all that can run")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of each launch")
    parser.add_argument("--work", type=Path, help="a folder for exports, made once and kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    progress = Console(stderr=True)
    source = resolve_model(options.model)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        with progress.status("exporting"):
            job = prepared(source, options.precision, options.threads, work)
        vocabulary = json.loads((source.path / "config.json").read_text())["vocab_size"]
        ids = np.random.default_rng(0).integers(vocabulary // 10, vocabulary, options.prompt_tokens)
        job |= {"ids": ids.tolist(), "new": options.new_tokens, "threads": options.threads}
        (work / "job.json").write_text(json.dumps(job))
        names = options.contenders or able(source, options.precision, options.peers)
        times: dict[str, list[list[float]]] = {name: [] for name in names}
        with progress.status("loading") as status:
            for launch in range(options.launches):
                workers = {}
                for name in names:
                    status.update(f"launch {launch + 1} of {options.launches}: loading {name}")
                    workers[name] = start(name, options.peers, work)
                for number in range(options.rounds):
                    for name in names if number % 2 else reversed(names):
                        status.update(f"launch {launch + 1}, round {number + 1} of {options.rounds}: {name}")
                        times[name].append(json.loads(ask(workers[name], name, work)))
                for worker in workers.values():
                    worker.communicate()
    figures = {name: summary(found, times.get(REFERENCE, found), job) for name, found in times.items()}
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    table = Table("", *next(iter(figures.values())), title=f"{source.name}, {options.precision}")
    for name, row in figures.items():
        table.add_row(name, *(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in row.values()))
    Console().print(table)


def summary(found: list[list[float]], reference: list[list[float]], job: dict[str, Any]) -> dict[str, float]:
    first = statistics.median(first for first, _ in found)
    rest = statistics.median(rest for _, rest in found)
    pairs = list(zip(found, reference, strict=True))
    return {
        "first token, ms": 1000 * first,
        "prefill, tokens/s": len(job["ids"]) / first,
        "decode, tokens/s": job["new"] / rest,
        "adapter's first token sooner, x": statistics.median(a[0] / b[0] for a, b in pairs),
        "adapter's decode faster, x": statistics.median(a[1] / b[1] for a, b in pairs),
    }


def able(source: ModelFolder, precision: str, peers: Path | None) -> list[str]:
    """The contenders that can run here on these weights."""
    names = list(CONTENDERS)
    if peers is None or precision == "fp32" or source.gguf is None:
        names = [name for name in names if not name.startswith("llama.cpp")]
    if peers is None:
        names.remove("pyreft, adapter")
    return names


def prepared(source: ModelFolder, precision: str, threads: int, work: Path) -> dict[str, Any]:
    """What `prepare` made, now or in an earlier run."""
    kept = work / f"{source.name}-{precision}-{threads}.json"
    if not kept.exists():
        (work / kept.stem).mkdir(parents=True)
        kept.write_text(json.dumps(prepare(source, precision, threads, work / kept.stem)))
    job: dict[str, Any] = json.loads(kept.read_text())
    return job


def prepare(source: ModelFolder, precision: str, threads: int, work: Path) -> dict[str, Any]:
    """The export, its graph before ports, the folder as genai wants it, an adapter, and a LoRA of its rank."""
    manifest = export_model(source, work / "export", precision)
    build_plain(source, manifest, work)
    (work / "genai").mkdir()
    for file in (work / "export").iterdir():
        os.link(file, work / "genai" / file.name)
    config = work / "genai/genai_config.json"
    settings = json.loads(config.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config.unlink()
    config.write_text(json.dumps(settings))
    model = SteeredModel(work / "export", "cpu", threads)
    adapter = work / "task.safetensors"
    save_adapter(random_adapter(model, RANK, f"f{POSITIONS}+l{POSITIONS}"), adapter)
    write_lora(source.path, work / "lora.gguf")
    paths = {name: str(work / name) for name in ("export", "plain", "genai")}
    paths |= {"adapter": str(adapter), "lora": str(work / "lora.gguf"), "model": str(source.path)}
    return {**paths, "gguf": str(source.gguf), "rank": RANK, "positions": POSITIONS}


def build_plain(source: ModelFolder, manifest: Manifest, work: Path) -> None:
    """The graph as it was before ports, but for what spares it the logits of the prompt's other tokens, too."""
    known = {field: manifest.quantisation[field] for field in ("algorithm", "block_size", "accuracy_level")
             if field in manifest.quantisation}  # fmt: skip
    target = Target(manifest.precision, "cpu", Quantisation(**known))
    (work / "plain").mkdir()
    gguf = source.gguf if known.get("algorithm") == "gguf" else None
    build_graph(source.path, work / "plain", target, work / "build", gguf=gguf)
    graph = ir.load(work / "plain/model.onnx")
    ports = insert_ports(graph, [], manifest.hidden_size, np.dtype(np.float32))
    ir.save(graph, work / "plain/model.onnx")
    save_manifest(replace(manifest, ports=ports), work / "plain")


def write_lora(model: Path, path: Path) -> None:
    """A random LoRA on the query and value projections of every layer, in llama.cpp's format."""
    config = json.loads((model / "config.json").read_text())
    size, heads = config["hidden_size"], config["num_attention_heads"]
    values = size // heads * config["num_key_value_heads"]
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    for layer in range(config["num_hidden_layers"]):
        for name, width in (("q", size), ("v", values)):
            stem = f"blk.{layer}.attn_{name}.weight"
            writer.add_tensor(f"{stem}.lora_a", random.normal(0, 0.01, (RANK, size)).astype(np.float32))
            writer.add_tensor(f"{stem}.lora_b", random.normal(0, 0.01, (width, RANK)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start(name: str, peers: Path | None, work: Path) -> "subprocess.Popen[str]":
    peer = name.split(",")[0]
    python = str(peers / peer / "bin/python") if peers and (peers / peer).is_dir() else sys.executable
    with (work / f"{name}.log").open("w") as log:
        worker = subprocess.Popen(
            [python, str(CONTENDER), name, str(work / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    while reply(worker, name, work) != "ready":
        pass
    return worker


def ask(worker: "subprocess.Popen[str]", name: str, work: Path) -> str:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return reply(worker, name, work)


def reply(worker: "subprocess.Popen[str]", name: str, work: Path) -> str:
    """The next line of a contender; exits with its last words if it has gone."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"{name} failed:\n{(work / f'{name}.log').read_text()[-2000:]}")
    return line.strip()


if __name__ == "__main__":
    main()
