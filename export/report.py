"""What each precision costs and gives on this machine, so that a user can choose one."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.export import Quantisation
from reft_edge.export.carry import can_carry
from reft_edge.export.checks import all_at_once, random_adapters
from reft_edge.export.model import export_model
from reft_edge.export.recipe import Report
from reft_edge.model.manifest import Manifest
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.session import GraphSession

ROW_TOKENS = 256
DECODE_STEPS = 64


@dataclass(frozen=True)
class Choice:
    """Figures of one way to export a model; the text is `report_text.txt`, in rows of at most 256 tokens."""

    name: str
    size: int
    """Bytes of the exported folder."""
    perplexity: float
    """exp of the mean negative log-likelihood of a token of the text, without an adapter."""
    agreement: float
    """Share of the text's tokens after which the likeliest next token is that of the fp32 graph."""
    steered_agreement: float
    """The same with a random LoReFT adapter of rank 4 at every port, f7+l7, in both."""
    decode: float
    """Tokens a second, batch 1, from the median step."""
    steered_decode: float
    """The same with an adapter of rank 4 active at every port and step."""


def compare_precisions(
    model: ModelFolder, device: str = "cpu", layers: str = "all", report: Report = lambda step: None
) -> Iterator[Choice]:
    """Export `model` to temporary folders in every way that `device` can run, fp32 on the CPU first, and measure each.

    Raises ReftEdgeError if a way fails, or if CUDA is asked for and missing.
    """
    fp32: _Run | None = None
    for name, precision, quantisation in _ways(model, device):

        def step(said: str, name: str = name) -> None:
            report(f"{name}: {said}")

        place = "cpu" if precision == "fp32" else device
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "export"
            manifest = export_model(
                model,
                folder,
                precision,
                layers,
                step,
                device=place,
                quantisation=quantisation,
            )
            step("measuring")
            run = _measure(folder, manifest, place)
            fp32 = fp32 or run
            yield Choice(
                name,
                sum(file.stat().st_size for file in folder.iterdir()),
                run.perplexity,
                float(np.mean(run.likeliest == fp32.likeliest)),
                float(np.mean(run.steered_likeliest == fp32.steered_likeliest)),
                run.decode,
                run.steered_decode,
            )


@dataclass(frozen=True)
class _Run:
    perplexity: float
    likeliest: NDArray[np.int64]
    steered_likeliest: NDArray[np.int64]
    decode: float
    steered_decode: float


def _ways(model: ModelFolder, device: str) -> Iterator[tuple[str, str, Quantisation | None]]:
    yield "fp32", "fp32", None
    yield "fp16", "fp16", None
    if device == "cuda":
        yield "bf16", "bf16", None
    for precision in ("int8", "int4"):
        algorithms = ["rtn", "k_quant"] + (["k_quant_mixed"] if precision == "int4" else [])
        if model.gguf is not None and can_carry(model.gguf):
            algorithms.append("gguf")
        for algorithm in algorithms:
            yield f"{precision} {algorithm}", precision, Quantisation(algorithm)


def _measure(folder: Path, manifest: Manifest, device: str) -> _Run:
    graph = GraphSession(folder, manifest, device)
    text = files("reft_edge.export").joinpath("report_text.txt").read_text(encoding="utf-8")
    ids = load_prompts(folder).encode_raw(text)
    length = min(ROW_TOKENS, manifest.context_length - 1)
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    on_prompt = port_inputs(all_at_once(random_adapters(manifest)), manifest, graph.dtype)
    everywhere = port_inputs(
        all_at_once(random_adapters(manifest, positions="all+gen")), manifest, graph.dtype
    )
    losses, likeliest, steered = [], [], []
    for row in rows:
        logits = graph.score([row], {})[0]
        likeliest.append(logits.argmax(1))
        shifted = logits[:-1] - logits[:-1].max(1, keepdims=True)
        chosen = shifted[np.arange(len(row) - 1), row[1:]]
        losses.append(np.log(np.exp(shifted).sum(1)) - chosen)
        steered.append(graph.score([row], on_prompt)[0].argmax(1))
    return _Run(
        float(np.exp(np.concatenate(losses).mean())),
        np.concatenate(likeliest),
        np.concatenate(steered),
        _decode_speed(graph, rows[0][: length // 2], {}),
        _decode_speed(graph, rows[0][: length // 2], everywhere),
    )


def _decode_speed(graph: GraphSession, prompt: list[int], ports: Mapping[str, Any]) -> float:
    bound = graph.bind(
        graph.take_cache(1, len(prompt) + DECODE_STEPS),
        graph.to_device({**ports, "reft.prompt_len": np.array([len(prompt)], np.int64)}),
    )
    logits = bound.prefill(np.array([prompt]))
    seconds = []
    for _ in range(DECODE_STEPS):
        started = time.perf_counter()
        logits = bound.step(logits.argmax(1)[:, None])
        seconds.append(time.perf_counter() - started)
    return 1 / median(seconds)
