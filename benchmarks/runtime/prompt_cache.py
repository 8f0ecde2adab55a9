"""First token of a conversation with a long system prompt: at first, again, and after the server was started anew.

    python benchmarks/runtime/prompt_cache.py EXPORTED_FOLDER

Every round has a folder of its own for the prompts. The server runs with `--prompt-cache`, and each answer is compared with
the first of its round.
"""

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from reft_edge.model.prompts import load_prompts

RULE = "Rule {number}: answer in plain words, name your sources, and say so when you do not know what was asked for. "


@contextlib.contextmanager
def server(folder: Path, prompts: Path) -> Iterator[tuple[str, float]]:
    """Its URL, and the seconds until it answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "reft_edge", "serve", str(folder), "--name", "model"]
    command += ["--port", str(port), "--prompt-cache", str(prompts)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield url, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, system: str, question: str) -> tuple[float, str]:
    """Milliseconds to the first text, and the answer."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"model": "model", "messages": messages, "stream": True, "temperature": 0, "max_tokens": 16}
    started, first, text = time.perf_counter(), 0.0, ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                if text and not first:
                    first = 1000 * (time.perf_counter() - started)
    return first, text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prompts, system, number = load_prompts(options.folder), "", 0
    while len(prompts.encode_plain(system)) < options.tokens:
        number += 1
        system += RULE.format(number=number)
    figures: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as kept:
            answers = []
            for start in ("first start", "next start"):
                with server(options.folder, Path(kept)) as (url, seconds):
                    figures.setdefault(f"{start}, ready, s", []).append(seconds)
                    for turn in ("first", "other", "first again"):
                        question = "Who are you?" if turn != "other" else "Which rule is the longest?"
                        first, text = ask(url, system, question)
                        figures.setdefault(f"{start}, {turn} question, ms", []).append(first)
                        answers.append((question, text))
            files = [path.stat().st_size for path in Path(kept).iterdir()]
            if len(set(answers)) != 2:
                raise SystemExit(f"answers differ: {sorted(set(answers))}")
    print(
        f"system prompt: {len(prompts.encode_plain(system))} tokens; files: {[round(n / 1e6, 1) for n in files]} MB"
    )
    for name, values in figures.items():
        print(f"{name:45} {statistics.median(values):8.1f}  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
