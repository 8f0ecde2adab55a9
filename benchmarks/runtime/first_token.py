"""Time to the first token behind a system prompt of 1,000 tokens that ran before, through `Engine` and through `serve`.

    python benchmarks/runtime/first_token.py EXPORTED_FOLDER [--tokens 1000] [--threads 2] [--rounds 20]

Each question is new, so that its own tokens run, and those of the template around it. Prints the median and the least by
the clock; for `Engine` also the time of the process's threads, and of what that is made.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from prompt_cache import RULE, server

from reft_edge.model.prompts import Message
from reft_edge.runtime import Engine, Request, SteeredModel
from reft_edge.runtime.rows import JoinedRows
from reft_edge.runtime.session import GraphSession

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    model = SteeredModel(options.folder, "cpu", options.threads)
    system = ""
    while len(model.prompts.encode_plain(system)) < options.tokens:
        system += RULE.format(number=len(system))

    def messages(number: int) -> list[Message]:
        question = f"Why {NUMBERS[number // 10 % 10]} {NUMBERS[number % 10]}?"
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    through_engine(model, messages, options.rounds)
    with tempfile.TemporaryDirectory() as prompts, server(options.folder, Path(prompts)) as (url, _):
        through_server(url, messages, options.rounds)


def through_engine(model: SteeredModel, messages: Callable[[int], list[Message]], rounds: int) -> None:
    parts: dict[str, list[float]] = {}
    engine = Engine(model, speculate=False)
    with (
        Timed(parts, SteeredModel, "encode"),
        Timed(parts, JoinedRows, "write"),
        Timed(parts, GraphSession, "run_bound"),
    ):
        for number in range(rounds + 1):
            for times in parts.values():
                times.append(0.0)
            busy, started = time.process_time(), time.perf_counter()
            ids = tuple(model.encode(messages(number), {}))
            before = engine.batch.prefixes.hits
            ticket = engine.submit(Request(ids, max_tokens=1))
            next(ticket)
            found = {"clock": time.perf_counter() - started, "threads": time.process_time() - busy}
            list(ticket)
            if number:
                for name, seconds in found.items():
                    parts.setdefault(name, []).append(seconds)
                ran = len(ids) - (engine.batch.prefixes.hits - before)
    engine.close()
    print(f"Engine: {len(ids)} tokens, of which {ran} ran")
    for name in ("clock", "threads", "encode", "write", "run_bound"):
        if found := [seconds for seconds in parts[name] if seconds]:
            show(name, found)


class Timed:
    """Adds the time that calls of a method take to the last of its times."""

    def __init__(self, parts: dict[str, list[float]], owner: type, name: str) -> None:
        self.times = parts.setdefault(name, [0.0])
        self.owner, self.name, self.function = owner, name, getattr(owner, name)

    def __enter__(self) -> None:
        def call(*arguments: object, **options: object) -> object:
            started = time.perf_counter()
            try:
                return self.function(*arguments, **options)
            finally:
                self.times[-1] += time.perf_counter() - started

        setattr(self.owner, self.name, call)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.function)


def through_server(url: str, messages: Callable[[int], list[Message]], rounds: int) -> None:
    times = []
    with httpx.Client(timeout=300) as client:
        for number in range(rounds + 1):
            body = {
                "model": "model",
                "messages": messages(number),
                "stream": True,
                "temperature": 0,
                "max_tokens": 1,
            }
            started = time.perf_counter()
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get(
                        "content"
                    ):
                        times.append(time.perf_counter() - started)
    print("serve:")
    show("clock", times[1:])


def show(name: str, times: list[float]) -> None:
    print(
        f"  {name:10} {1000 * statistics.median(times):7.1f} ms  (least {1000 * min(times):.1f})", flush=True
    )


if __name__ == "__main__":
    main()
