"""How fast a folder runs here: prefill, decode, time to first token, adapter switches and loads, memory."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.adapter.file import save_adapter
from reft_edge.adapter.positions import triggers_of
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.binding import Bound, decode_inputs
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.session import GraphSession

SWITCHES = 1000
LOADS = 50


@dataclass(frozen=True)
class BenchSettings:
    """Sizes of a run."""

    prompt_tokens: int = 256
    new_tokens: int = 64
    repeats: int = 5
    rank: int = 8
    positions: str = "f7+l7"


@dataclass(frozen=True)
class Speed:
    """Medians of interleaved repeats."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    """Seconds."""


@dataclass(frozen=True)
class BenchResult:
    """What was measured; times in seconds, memory in bytes."""

    base: Speed
    steered: Speed
    """With an adapter at every port."""
    switch_p50: float
    switch_p99: float
    """From one loaded adapter's bound inputs to another's."""
    load_p50: float
    """From a file on disk (4 layers, rank 4) to inputs that a run can bind."""
    peak_memory: int
    """Of the process so far."""
    device: str


def bench(
    folder: Path,
    settings: BenchSettings,
    adapter: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> BenchResult:
    """Measure. Without an adapter file, random adapters of the settings' rank and positions are used.

    Raises ReftEdgeError if the folder or adapter cannot be used, or its context is too short for the sizes.
    """
    report("loading")
    model = SteeredModel(folder, device, threads)
    room = model.manifest.context_length
    if settings.prompt_tokens + settings.new_tokens > room:
        raise ReftEdgeError(
            f"{settings.prompt_tokens} prompt and {settings.new_tokens} new tokens were asked for; this model's context is {room}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        names = []
        for seed in (0, 1):
            path = adapter or work / "bench.safetensors"
            if adapter is None:
                save_adapter(random_adapter(model, settings.rank, settings.positions, seed=seed), path)
            names.append(model.load_adapter(path, f"bench{seed}"))
        vocabulary = model.prompts.tokenizer.get_vocab_size(with_added_tokens=False)
        ids = np.random.default_rng(0).integers(0, vocabulary, settings.prompt_tokens).tolist()
        for trigger in triggers_of(model.adapters[names[0]].spans):
            ids[: len(trigger.ids)] = trigger.ids[: len(ids)]
        runs: dict[str | None, list[tuple[float, float]]] = {None: [], names[0]: []}
        for number in range(settings.repeats + 1):
            report(f"round {number} of {settings.repeats}")
            for name, found in runs.items():
                bound = model.prepare(name).in_prompt(ids)
                timed = timed_run(model.graph, bound, ids, settings.new_tokens)
                if number:
                    found.append(timed)
        report("switching adapters")
        switches = []
        for number in range(SWITCHES):
            started = time.perf_counter()
            model.prepare({names[number % 2]: 1.0})
            switches.append(time.perf_counter() - started)
        layers = model.manifest.layers[:: max(1, len(model.manifest.layers) // 4)][:4]
        small = work / "small.safetensors"
        save_adapter(random_adapter(model, 4, settings.positions, layers=layers), small)
        loads = []
        for _ in range(LOADS):
            started = time.perf_counter()
            model.load_adapter(small, "small")
            model.prepare({"small": 1.0})
            loads.append(time.perf_counter() - started)
    return BenchResult(
        base=_speed(runs[None], settings),
        steered=_speed(runs[names[0]], settings),
        switch_p50=statistics.median(switches),
        switch_p99=float(np.quantile(switches, 0.99)),
        load_p50=statistics.median(loads),
        peak_memory=peak_memory(),
        device=model.device,
    )


def timed_run(graph: GraphSession, bound: Bound, ids: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds until the token behind a prompt is known, and seconds of `new_tokens` greedy steps after it, whatever the
    tokens are."""
    cache = graph.take_cache(1, len(ids) + new_tokens)
    started = time.perf_counter()
    own = graph.to_device(bound.of_prompt(len(ids))) if bound.prompt else {}
    logits = graph.bind(cache, {**bound.prompt, **own}).prefill(np.array([ids], np.int64))
    token = int(logits[0].argmax())
    first = time.perf_counter()
    for made in range(new_tokens):
        if made in (0, *bound.ends):
            ports = decode_inputs([bound.decode_from(made)], graph.dtype)
            decode = graph.bind(cache, graph.to_device(ports))
        token = int(decode.step(np.array([[token]], np.int64))[0].argmax())
    ended = time.perf_counter()
    graph.return_cache(cache)
    return first - started, ended - first


def random_adapter(
    model: SteeredModel, rank: int, positions: str, seed: int = 0, layers: tuple[int, ...] | None = None
) -> Adapter:
    """A LoReFT adapter with random weights for a model's blocks."""
    manifest, random = model.manifest, np.random.default_rng(seed)
    config = AdapterConfig(
        "loreft",
        manifest.base_name,
        manifest.base_fingerprint,
        manifest.hidden_size,
        manifest.num_layers,
        manifest.layers if layers is None else layers,
        rank,
        positions,
        training={"random": seed},
    )
    tensors = {
        name: random.normal(scale=manifest.hidden_size**-0.5, size=shape).astype(np.float32)
        for name, shape in config.shapes().items()
    }
    return Adapter(config, tensors)


def peak_memory() -> int:
    """Bytes of this process's largest resident set; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _speed(runs: list[tuple[float, float]], settings: BenchSettings) -> Speed:
    prefill = statistics.median(first for first, _ in runs)
    decode = statistics.median(rest for _, rest in runs)
    return Speed(settings.prompt_tokens / prefill, settings.new_tokens / decode, prefill)
