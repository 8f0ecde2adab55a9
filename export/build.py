"""Building the frozen graph: onnxruntime-genai's model builder, in a process of its own."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from reft_edge.errors import ReftEdgeError

PRECISIONS = ("fp32", "int4")
_OPTIONS = {
    "fp32": [],
    "int4": ["block_size=32", "algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"],
}


def build_graph(
    model: Path, output: Path, precision: str, work: Path, progress: Callable[[str], None] = lambda step: None
) -> None:
    """Write `model.onnx`, its weights, `genai_config.json` and the tokenizer of a Hugging Face folder to `output`.

    `precision` is one of PRECISIONS, `work` a folder for temporary files
    that does not exist yet; `progress` is told each step.
    Raises ReftEdgeError with the builder's own last words if it fails, for instance for an unknown architecture.
    """
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(model),
        "-o",
        str(output),
        "-p",
        precision,
        "-e",
        "cpu",
        "-c",
        str(work),
    ]
    if _OPTIONS[precision]:
        command += ["--extra_options", *_OPTIONS[precision]]
    work.mkdir()
    log: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=work
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line.rstrip())
                if line.startswith("Reading "):
                    progress(line.strip().lower())
                elif line.startswith("Saving ONNX model"):
                    progress("writing weights")
        except BaseException:
            process.kill()
            raise
    if process.returncode or not (output / "model.onnx").is_file():
        words = next((line for line in reversed(log) if line.strip()), "it said nothing")
        raise ReftEdgeError(f"onnxruntime-genai's model builder could not build {model.name}: {words}")
    shutil.rmtree(work, ignore_errors=True)
