"""Many adapters at once: streams through the server, unlike adapters in one batch, memory of loaded adapters and of `run`.

    python benchmarks/runtime/serving.py EXPORTED_FOLDER

Prints a table of figures, or one JSON object with --json. Times are medians of rounds that take turns.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console

from reft_edge.adapter.file import save_adapter
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.bench import random_adapter
from reft_edge.runtime.request import Request

PROMPT = (
    "The quick brown fox jumps over the lazy dog, and then it sits down to tell what it has seen on its way: "
)
RANK, ADAPTERS = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--loaded", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, Console(stderr=True).status("") as status:
        adapters = Path(temporary)
        model = SteeredModel(options.folder, "cpu")
        for seed in range(ADAPTERS):
            save_adapter(
                random_adapter(model, RANK, "f7+l7+gen", seed=seed), adapters / f"task{seed}.safetensors"
            )
        status.update("a batch of unlike adapters …")
        figures |= batches(model, adapters, options.rows, options.tokens, options.rounds)
        del model
        status.update("streams through the server …")
        figures |= streams(options.folder, adapters, options.streams, options.tokens, options.rounds)
        status.update("memory of loaded adapters …")
        figures |= loaded(options.folder, Path(temporary), options.loaded)
        status.update("memory of run …")
        figures |= memory_of_run(options.folder)
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:64} {value:10,.3f}")


def batches(model: SteeredModel, adapters: Path, rows: int, tokens: int, rounds: int) -> dict[str, float]:
    """Tokens a second of rows that decode together: one adapter for all, another for each, in turn."""
    names = [model.load_adapter(adapters / f"task{number}.safetensors") for number in range(rows)]
    ids = tuple(model.encode(PROMPT, {}, raw=True))
    seconds: dict[str, list[float]] = {"one": [], "each": []}
    for number in range(rounds + 1):
        for kind, found in seconds.items():
            batch = model.batch(rows)
            chosen = [names[0]] * rows if kind == "one" else names
            for name in chosen:
                batch.add(model.row(Request(ids, {name: 1.0}, tokens), lambda piece: None))
            while batch.waiting or batch.prefilling:
                batch.step()
            started = time.perf_counter()
            steps = 0
            while len(batch.decoding) == rows:
                batch.step()
                steps += 1
            if number:
                found.append((time.perf_counter() - started) / max(1, steps))
            batch.abort("cancelled")
    ratio = statistics.median(a / b for a, b in zip(seconds["one"], seconds["each"], strict=True))
    return {
        f"batch of {rows} rows, one adapter, tokens/s": rows / statistics.median(seconds["one"]),
        f"batch of {rows} rows, {rows} adapters, tokens/s": rows / statistics.median(seconds["each"]),
        "  ratio": ratio,
    }


def streams(folder: Path, adapters: Path, count: int, tokens: int, rounds: int) -> dict[str, float]:
    """Answers a second of `count` streams at once, each with another adapter, and of the same one after another."""
    with serving(folder, adapters, count) as url:
        alone, together = [], []
        for number in range(rounds + 1):
            one_by_one = asyncio.run(ask(url, count, tokens, 1))
            at_once = asyncio.run(ask(url, count, tokens, count))
            if number:
                alone.append(one_by_one)
                together.append(at_once)
    return {
        f"{count} streams one after another, tokens/s": count * tokens / statistics.median(alone),
        f"{count} streams at once, tokens/s": count * tokens / statistics.median(together),
        "  ratio ": statistics.median(a / b for a, b in zip(alone, together, strict=True)),
    }


async def ask(url: str, count: int, tokens: int, at_once: int) -> float:
    """Seconds of `count` streamed answers, `at_once` of them under way together."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def one(number: int) -> None:
            body = {
                "model": f"bench:task{number % ADAPTERS}",
                "prompt": f"{number}. {PROMPT}",
                "max_tokens": tokens,
                "temperature": 1.0,
                "seed": number,
                "stream": True,
            }
            async with gate, client.stream("POST", "/v1/completions", json=body) as stream:
                stream.raise_for_status()
                async for _ in stream.aiter_lines():
                    pass

        started = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(count)))
        return time.perf_counter() - started


@contextmanager
def serving(folder: Path, adapters: Path, slots: int) -> Iterator[str]:
    """A server with that many slots, at the URL that is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "reft_edge", "serve", str(folder), "--adapters", str(adapters)]
    command += ["--name", "bench", "--port", str(port), "--slots", str(slots), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def loaded(folder: Path, work: Path, count: int) -> dict[str, float]:
    """How much memory grows with loaded adapters, over the size of their files."""
    code = f"""
import json, sys
from pathlib import Path
from reft_edge.adapter.file import save_adapter
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.bench import random_adapter
model = SteeredModel({str(folder)!r}, "cpu")
layers = model.manifest.layers[:: max(1, len(model.manifest.layers) // 4)][:4]
path = Path({str(work)!r}) / "loaded.safetensors"
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS:")).split()[1]) * 1024
save_adapter(random_adapter(model, 4, "f7+l7", layers=layers), path)
for number in range(20):
    model.load_adapter(path, f"warm{{number}}")
    model.prepare(f"warm{{number}}")
before, files = resident(), 0
for number in range({count}):
    save_adapter(random_adapter(model, 4, "f7+l7", seed=number, layers=layers), path)
    model.load_adapter(path, str(number))
    files += path.stat().st_size
    if number % 10 == 0:
        model.prepare(str(number))
print(json.dumps([resident() - before, files]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, files = json.loads(done.stdout)
    return {
        f"{count:,} loaded adapters, MB of files": files / 1e6,
        f"{count:,} loaded adapters, MB of memory": grown / 1e6,
        "  ratio  ": grown / files,
    }


def memory_of_run(folder: Path) -> dict[str, float]:
    """Peak memory of `reft-edge run`, over what its weights take, and of the same imports without a model."""
    run = ["-m", "reft_edge", "run", str(folder), PROMPT, "--max-tokens", "32", "--device", "cpu"]
    imports = "import onnxruntime, reft_edge.runtime, reft_edge.cli, reft_edge.prompts"
    tokenizer = f"reft_edge.model.prompts.load_prompts(__import__('pathlib').Path({str(folder)!r}))"
    weights = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    peak, without = peak_of(run), peak_of(["-c", f"{imports}; {tokenizer}"])
    return {
        "weights, MB": weights / 1e6,
        "peak memory of run, MB": peak / 1e6,
        "  of which Python, its packages and the tokenizer, MB": without / 1e6,
        "  ratio to the weights": peak / weights,
    }


def peak_of(arguments: list[str]) -> int:
    """Largest resident set of a Python process, in bytes, started by a small one: a child begins with its parent's size."""
    code = f"""
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *{arguments!r}], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(status != 0)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


if __name__ == "__main__":
    main()
