"""KV caches of an exported folder beside each other: their memory, what they cost in log-likelihood, and their speed.

    python benchmarks/runtime/kv_cache.py FOLDER [--threads 1] [--rounds 5] [--lengths 64 512 2048]

Both caches are in one process and take turns. The log-likelihood is of the tokens of a text that ships with reft-edge, one at a
time through the cache, behind its first tokens; the difference is the largest between logits of the same place.
"""

import argparse
import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reft_edge.model.manifest import load_manifest
from reft_edge.model.prompts import load_prompts
from reft_edge.runtime.int8_cache import CACHE_TYPES, open_session
from reft_edge.runtime.session import GraphSession

BEFORE = 256

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


def logits_one_by_one(graph: GraphSession, ids: Ids) -> Logits:
    """Of each of `ids [tokens]` but the first BEFORE: what the graph says before it, `[tokens, vocabulary]`."""
    cache = graph.take_cache(1, len(ids))
    bound = graph.bind(cache, {})
    # Copied: each step writes its logits over the last one's.
    found = [bound.prefill(ids[None, :BEFORE]).copy()]
    found += [bound.step(ids[None, at : at + 1]).copy() for at in range(BEFORE, len(ids) - 1)]
    return np.concatenate(found)


def log_likelihood(logits: Logits, ids: Ids) -> float:
    """The negative mean of `ids`, of which `logits` say what comes."""
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(ids)), ids]
    return float(losses.mean())


def times(graph: GraphSession, ids: Ids, length: int, steps: int) -> tuple[float, float]:
    """Seconds of a prompt of `length` tokens, and of a step behind it (median)."""
    cache = graph.take_cache(1, length + steps)
    bound = graph.bind(cache, {})
    prompt = np.resize(ids, length)[None]
    started = time.perf_counter()
    bound.prefill(prompt)
    first = time.perf_counter() - started
    found = []
    for at in range(steps):
        started = time.perf_counter()
        bound.step(ids[None, at : at + 1])
        found.append(time.perf_counter() - started)
    graph.return_cache(cache)
    return first, statistics.median(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="of each round")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048])
    given = parser.parse_args()
    manifest, prompts = load_manifest(given.folder), load_prompts(given.folder)
    graphs = {
        kind: open_session(given.folder, manifest, prompts, kind, "cpu", given.threads, None)
        for kind in CACHE_TYPES
    }
    text = files("reft_edge.export").joinpath("report_text.txt").read_text(encoding="utf-8")
    ids = np.array(prompts.encode_raw(text), np.int64)[: manifest.context_length]
    found = {kind: logits_one_by_one(graph, ids) for kind, graph in graphs.items()}
    lengths = [length for length in given.lengths if length + given.steps <= manifest.context_length]
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number in range(given.rounds):
        for length in lengths:
            for kind in list(graphs)[:: 1 if number % 2 else -1]:
                measured = times(graphs[kind], ids, length, given.steps)
                seconds.setdefault((kind, length), []).append(measured)
    heads = ["cache", "bytes a token", "log-likelihood", "logits differ by"]
    heads += [f"{what}, {length}" for length in lengths for what in ("prompt, ms", "step, ms")]
    print(
        f"{len(ids) - BEFORE} tokens behind {BEFORE}; medians of {given.rounds} rounds, {given.threads} threads"
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind, graph in graphs.items():
        apart = float(np.abs(found[kind] - found["auto"]).max())
        row = [
            kind,
            f"{graph.token_bytes:,}",
            f"{log_likelihood(found[kind], ids[BEFORE:]):.3f}",
            f"{apart:.2g}",
        ]
        for length in lengths:
            for part in zip(*seconds[kind, length], strict=True):
                row.append(f"{1000 * statistics.median(part):.1f}")
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
