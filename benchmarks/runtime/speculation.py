"""Answers with guessed tokens (prompt lookup) and without, in turns, on copy-heavy prompts and on chat.

    python benchmarks/runtime/speculation.py EXPORT [--threads 2] [--max-tokens 128] [--rounds 1] [--cache-type int8]

For each set of prompts: how many times faster a token is decoded (of all answers together, and the median, least and most
of an answer's), by the clock and by the time of the process's threads; tokens a step; and how many texts are alike.
Other work on the machine moves the clock's figures more than those of the threads.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from reft_edge.runtime import SteeredModel

PROMPTS = json.loads(Path(__file__).with_name("copy_heavy.json").read_text(encoding="utf-8"))
SETS = {
    "copy": [f"{task}\n\n{PROMPTS['texts'][name]}" for name, task in PROMPTS["tasks"]],
    "chat": PROMPTS["chat"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--cache-type", default="auto")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    given = parser.parse_args()
    model = SteeredModel(given.export, "cpu", given.threads, cache_type=given.cache_type)
    adapter = model.load_adapter(given.adapter) if given.adapter else None
    for speculate in (False, True):
        model.generate("Repeat: one two three one two three", adapter, max_tokens=32, speculate=speculate)
    for name in given.sets:
        measure(name, model, adapter, given.max_tokens, given.rounds)


@dataclass(frozen=True)
class Timed:
    """An answer; seconds, tokens and steps are those after its first token."""

    text: str
    clock: float
    threads: float
    tokens: int
    steps: int


def measure(name: str, model: SteeredModel, adapter: str | None, max_tokens: int, rounds: int) -> None:
    answers: dict[bool, list[Timed]] = {False: [], True: []}
    for number in range(rounds):
        for place, prompt in enumerate(SETS[name]):
            for speculate in (False, True) if (number + place) % 2 else (True, False):
                answers[speculate].append(answered(model, prompt, adapter, max_tokens, speculate))
    pairs = list(zip(answers[False], answers[True], strict=True))
    alike = sum(plain.text == guessed.text for plain, guessed in pairs)
    rate = sum(each.tokens for each in answers[True]) / sum(each.steps for each in answers[True])
    print(f"{name}: {alike} of {len(pairs)} texts alike, {rate:.2f} tokens a step")
    for kind in ("clock", "threads"):
        ratios = [getattr(a, kind) / a.tokens / (getattr(b, kind) / b.tokens) for a, b in pairs]
        plain, guessed = (
            sum(getattr(each, kind) for each in found) / sum(each.tokens for each in found)
            for found in answers.values()
        )
        print(f"  {kind}: {plain / guessed:.2f} x, ", end="")
        print(f"median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def answered(
    model: SteeredModel, prompt: str, adapter: str | None, max_tokens: int, speculate: bool
) -> Timed:
    answer = model.stream(prompt, adapter, max_tokens=max_tokens, speculate=speculate)
    pieces = [next(answer, "")]
    before, busy, started = len(answer.tokens), time.process_time(), time.perf_counter()
    pieces += answer
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    tokens, steps = len(answer.tokens) - before, answer.decode_steps
    return Timed("".join(pieces), seconds, busy, max(1, tokens), max(1, steps))


if __name__ == "__main__":
    main()
