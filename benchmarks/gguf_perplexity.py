"""Perplexity of GGUF files: run by llama.cpp, and exported with the files' own blocks, on the text of `export --report`.

    python benchmarks/gguf_perplexity.py LLAMA_CPP_PYTHON MODEL... [--types Q8_0 Q4_K ...] [--precision int4 int8]

LLAMA_CPP_PYTHON is the interpreter of an environment with llama-cpp-python (`benchmarks/runtime/environments.sh` makes one). A
MODEL is a GGUF file or a name that `reft-edge export` knows. With `--types`, llama.cpp also makes files of these types from the
first MODEL, in which each matrix has that type or, where its rows are no multiple of 256, the one llama.cpp takes instead.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROW_TOKENS = 256
FTYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
}  # fmt: skip
"""llama.cpp's numbers for files of a type; of Q3_K to Q5_K, the `_M` mixes."""


def perplexity(logits: list[NDArray[np.float32]], rows: list[list[int]]) -> float:
    """Of every token but each row's first."""
    losses = []
    for found, row in zip(logits, rows, strict=True):
        shifted = found[:-1] - found[:-1].max(1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(row) - 1), row[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def llama_cpp_side() -> None:
    """In llama.cpp's environment: a job comes as JSON, and so does the answer, as the last line."""
    import llama_cpp

    job = json.load(sys.stdin)
    if "type" in job:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize, settings.nthread = FTYPES[job["type"]], True, 2
        failed = llama_cpp.llama_model_quantize(
            job["gguf"].encode(), job["output"].encode(), llama_cpp.ctypes.byref(settings)
        )
        assert not failed, f"llama.cpp could not write {job['output']}"
        print()
        print(json.dumps("done"))
        return
    model = llama_cpp.Llama(
        job["gguf"], n_ctx=ROW_TOKENS, logits_all=True, verbose=False, n_threads=job["threads"]
    )
    logits = []
    for row in job["rows"]:
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)], np.float32))
    print()
    print(json.dumps(perplexity(logits, job["rows"])))


def ask_llama_cpp(python: str, job: dict[str, Any]) -> Any:
    """What `llama_cpp_side` answers."""
    command = [python, __file__, "--llama-cpp-side"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, python: str, precisions: list[str], threads: int, work: Path) -> list[str]:
    """A table's row: the file, what it holds, llama.cpp's perplexity, and the exports' with their megabytes."""
    from reft_edge.export import export_model
    from reft_edge.export.gguf_blocks import read_matrices
    from reft_edge.model.prompts import load_prompts
    from reft_edge.model.source import resolve_model
    from reft_edge.runtime.session import GraphSession

    source = resolve_model(name)
    assert source.gguf is not None, f"{name} is no GGUF file"
    text = files("reft_edge.export").joinpath("report_text.txt").read_text(encoding="utf-8")
    ids = load_prompts(source.path).encode_raw(text)
    rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids), ROW_TOKENS)]
    theirs = ask_llama_cpp(python, {"gguf": str(source.gguf), "rows": rows, "threads": threads})
    kinds = Counter(matrix.kind for matrix in read_matrices(source.gguf).values())
    row = [source.name, ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), f"{theirs:.2f}"]
    for precision in precisions:
        folder = work / f"{source.name}-{precision}"
        manifest = export_model(source, folder, precision)
        session = GraphSession(folder, manifest, "cpu", threads)
        found = perplexity([session.score([ids], {})[0] for ids in rows], rows)
        size = (folder / "model.onnx.data").stat().st_size
        kept = f"{manifest.quantisation.get('carried', 0)} of {manifest.quantisation.get('matrices', 0)}"
        row += [kept, f"{size / 1e6:.0f}", f"{found:.2f}", f"{found / theirs - 1:+.1%}"]
    return row


def main() -> None:
    """Print a table."""
    if sys.argv[1:] == ["--llama-cpp-side"]:
        llama_cpp_side()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="of an environment with llama-cpp-python")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--types", nargs="+", default=[], choices=FTYPES)
    parser.add_argument("--precision", nargs="+", default=["int4"], choices=["int4", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from reft_edge.model.source import resolve_model

    heads = ["file", "matrices", "llama.cpp"]
    for precision in options.precision:
        heads += [f"{precision}: carried", "MB", "perplexity", "of llama.cpp's"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = resolve_model(options.models[0])
        for number, model in enumerate([*options.models, *options.types]):
            if number >= len(options.models):
                made = work / f"{source.name}.{model}.gguf"
                ask_llama_cpp(options.python, {"gguf": str(source.gguf), "output": str(made), "type": model})
                os.environ["REFT_EDGE_CACHE"], model = str(work / model), str(made)
            row = measure(model, options.python, options.precision, options.threads, work)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
