"""Answers with guessed tokens (prompt lookup) and without, in turns, on copy-heavy prompts and on chat.

    python benchmarks/runtime/speculation.py EXPORT [--threads 2] [--max-tokens 128] [--rounds 1] [--cache-type int8]

For each set of prompts: how many times faster a token is decoded (of all answers together, and the median, least and most
of an answer's), by the clock and by the time of the process's threads; tokens a step; and how many texts are alike.
With `--rows N`, N prompts at a time are answered in one batch, which counts as one answer.
Other work on the machine moves the clock's figures more than those of the threads.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reft_edge.runtime import Piece, Request, SteeredModel

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
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    given = parser.parse_args()
    model = SteeredModel(given.export, "cpu", given.threads, cache_type=given.cache_type)
    adapter = model.load_adapter(given.adapter) if given.adapter else None
    for speculate in (False, True):
        model.generate("Repeat: one two three one two three", adapter, max_tokens=32, speculate=speculate)
    for name in given.sets:
        measure(name, model, adapter, given.max_tokens, given.rounds, given.rows)


@dataclass(frozen=True)
class Timed:
    """An answer; seconds, tokens and steps are those after its first token."""

    text: str
    clock: float
    threads: float
    tokens: int
    steps: int


def measure(
    name: str, model: SteeredModel, adapter: str | None, max_tokens: int, rounds: int, rows: int
) -> None:
    answers: dict[bool, list[Timed]] = {False: [], True: []}
    for number in range(rounds):
        for place in range(0, len(SETS[name]), rows):
            prompts = SETS[name][place : place + rows]
            for speculate in (False, True) if (number + place // rows) % 2 else (True, False):
                answers[speculate].append(answered(model, prompts, adapter, max_tokens, speculate))
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
    model: SteeredModel, prompts: list[str], adapter: str | None, max_tokens: int, speculate: bool
) -> Timed:
    """Answers of one batch; it is timed from where all have a token."""
    batch, texts = model.batch(len(prompts), speculate=speculate), ["" for _ in prompts]
    chosen = {adapter: 1.0} if adapter else {}

    def deliver(place: int, piece: Piece) -> None:
        texts[place] += piece.text

    rows = [
        model.row(Request(tuple(model.encode(prompt, chosen)), chosen, max_tokens), partial(deliver, place))
        for place, prompt in enumerate(prompts)
    ]
    for row in rows:
        batch.add(row)
    while batch.waiting or batch.prefilling:
        batch.step()
    before, steps = sum(len(row.tokens) for row in rows), 0
    busy, started = time.process_time(), time.perf_counter()
    while not batch.idle:
        batch.step()
        steps += len(batch.decoding) or 1
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    tokens = sum(len(row.tokens) for row in rows) - before
    return Timed("\n".join(texts), seconds, busy, max(1, tokens), max(1, steps))


if __name__ == "__main__":
    main()
