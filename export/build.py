"""Building the frozen graph: onnxruntime-genai's model builder, in a process of its own."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.export.carry import CARRIED
from reft_edge.files import read_text

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
DEVICES = ("cpu", "cuda")
ALGORITHMS = ("rtn", "k_quant", "k_quant_mixed", "gguf")
BLOCK_SIZES = (16, 32, 64, 128, 256)
_LARGE = 1_000_000_000
_HEAD_IN_8_BITS = "matmul_mixed_precision=last_matmul:int8"
_MIXED = f"{_HEAD_IN_8_BITS},mixed_layers:int8"


@dataclass(frozen=True)
class Quantisation:
    """How int4 and int8 weights are rounded. The defaults are the best that `reft-edge export --report` measured."""

    algorithm: str = "auto"
    """auto: gguf where the model is a file that has such blocks, else k_quant_mixed for int4 and k_quant for int8. rtn: round to nearest. k_quant: each block's scale is searched for the least error. k_quant_mixed: the layers
    that suffer most get 8 bits. gguf: a GGUF file's own blocks are kept, and what they do not cover is k_quant."""
    block_size: int | None = None
    """Weights that share a scale; none: what `usual_block_size` says."""
    accuracy_level: int = 4
    """Activations in quantised products: 4 rounds them to int8, which is fastest on a CPU; 1 keeps float32."""


@dataclass(frozen=True)
class Target:
    """What to build, and for which device."""

    precision: str = "fp32"
    device: str = "cpu"
    quantisation: Quantisation = Quantisation()
    context: int | None = None
    """Most tokens that the graph has rotary tables for; none: as many as the model."""

    def __post_init__(self) -> None:
        """Raises ReftEdgeError that says what can be chosen."""
        _choice("precision", self.precision, PRECISIONS)
        _choice("device", self.device, DEVICES)
        _choice("quantisation algorithm", self.quantisation.algorithm, ("auto", *ALGORITHMS))
        _choice("block size", self.quantisation.block_size, (None, *BLOCK_SIZES))
        _choice("accuracy level", self.quantisation.accuracy_level, (1, 4))
        own_size = self.quantisation.block_size in (None, 32)
        if self.quantised and self.quantisation.algorithm == "gguf" and not own_size:
            raise ReftEdgeError(
                f"a GGUF's blocks keep their own sizes, 16 or 32 weights, not {self.quantisation.block_size}; "
                "leave --block-size out, or choose another --algorithm"
            )
        if self.precision == "fp32" and self.device == "cuda":
            raise ReftEdgeError(
                "onnxruntime's grouped-query attention has no fp32 kernel for CUDA; choose --precision fp16 or bf16"
            )
        if self.precision == "bf16" and self.device == "cpu":
            raise ReftEdgeError(
                "onnxruntime has no bf16 kernels for the CPU; add --device cuda, or choose --precision fp16"
            )

    @property
    def quantised(self) -> bool:
        return self.precision in ("int8", "int4")

    def builder_options(self) -> list[str]:
        """The model builder's arguments."""
        # Its 16-bit CPU graphs have no grouped-query attention; the CUDA ones do, and a CPU runs those, too.
        provider = "cuda" if self.device == "cuda" or self.precision == "fp16" else "cpu"
        # A cache that drops what left a sliding window takes no prompt in chunks, nor one longer than the window.
        options = ["-p", self.precision, "-e", provider, "--extra_options", "windowed_kv_cache=false"]
        if provider == "cuda":
            options.append("fuse_qk_norm_gqa=false")  # no CPU kernel has the norms inside attention
        if self.quantised:
            algorithm = self.quantisation.algorithm
            extra = [
                f"block_size={self.quantisation.block_size or 32}",
                f"algo_config={'rtn' if algorithm == 'rtn' else 'k_quant'}",
                f"accuracy_level={self.quantisation.accuracy_level if self.device == 'cpu' else 0}",
            ]
            if self.precision == "int4":
                extra.append(_MIXED if algorithm == "k_quant_mixed" else _HEAD_IN_8_BITS)
            options += extra
        return options


def build_graph(
    model: Path,
    output: Path,
    target: Target,
    work: Path,
    progress: Callable[[str], None] = lambda step: None,
    gguf: Path | None = None,
) -> dict[str, int]:
    """Write `model.onnx`, its weights, `genai_config.json` and the tokenizer of a Hugging Face folder to `output`.

    `work` is a folder for temporary files that does not exist yet; `progress` is told each step. With `gguf`, the file that
    the folder was converted from, its blocks are carried over; returns how many matrices were, and of how many.
    Raises ReftEdgeError with the builder's own last words if it fails, for instance for an unknown architecture.
    """
    if find_spec("onnxruntime_genai") is None:
        raise ModuleNotFoundError("there is no onnxruntime-genai", name="onnxruntime-genai")
    arguments = ["-i", str(model), "-o", str(output), "-c", str(work), *target.builder_options()]
    if target.context is not None:
        arguments += ["--context", str(target.context)]
    if gguf is not None:
        arguments += ["--gguf", str(gguf.resolve())]
    work.mkdir()
    log: list[str] = []
    carried: dict[str, int] = {}
    with start_builder(arguments, work) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line.rstrip())
                if line.startswith("Reading "):
                    progress(line.strip().lower())
                elif match := re.fullmatch(rf"{CARRIED}(\d+) of (\d+)", line.strip()):
                    carried = {"carried": int(match[1]), "matrices": int(match[2])}
                elif match := re.match(r"Rounding /model/layers\.(\d+)/", line):
                    progress(f"rounding layer {match[1]}")
                elif line.startswith("Saving ONNX model"):
                    progress("writing weights")
        except BaseException:
            process.kill()
            raise
    if process.returncode or not (output / "model.onnx").is_file():
        words = next((line for line in reversed(log) if line.strip()), "it said nothing")
        raise ReftEdgeError(
            f"onnxruntime-genai's model builder could not build {model.name}: {words.rstrip('.')}"
        )
    shutil.rmtree(work, ignore_errors=True)
    if target.device == "cpu":
        _run_on_cpu(output / "genai_config.json")
    return carried


def start_builder(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """The model builder with these arguments, in a process of its own that works in `folder`; all it says is in `stdout`."""
    command = [sys.executable, "-m", "reft_edge.export.builder_process", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=folder
    )


def _run_on_cpu(config: Path) -> None:
    settings = json.loads(read_text(config))
    settings["model"]["decoder"]["session_options"]["provider_options"] = []
    config.write_text(json.dumps(settings, indent=4), encoding="utf-8")


def stop_at(config: Path, tokens: Sequence[int]) -> None:
    """Have onnxruntime-genai, too, end an answer at these tokens."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if tokens:
        settings["model"]["eos_token_id"] = tokens[0] if len(tokens) == 1 else list(tokens)
    config.write_text(json.dumps(settings, indent=4), encoding="utf-8")


def usual_block_size(weights: int, hidden_size: int) -> int:
    """32, and 128 for models of a billion weights or more, whose files get a seventh smaller.

    A table of embeddings has whole blocks only, so `hidden_size` has to be a multiple.
    """
    return 128 if weights >= _LARGE and hidden_size % 128 == 0 else 32


def _choice(what: str, given: object, known: tuple[object, ...]) -> None:
    if given not in known:
        words = ", ".join(str(choice) for choice in known if choice is not None)
        raise ReftEdgeError(f"unknown {what} {given!r}; choose one of {words}")
