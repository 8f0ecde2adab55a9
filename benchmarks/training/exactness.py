"""Is training here what pyreft trains? Loss curves from the same initial adapter and batches, step by step.

    python benchmarks/training/exactness.py PYREFT

PYREFT is an environment with pyreft, as benchmarks/runtime/environments.sh makes it. LoReFT and DiReFT, untied and tied,
f7+l7, fp32, dropout off, AdamW with the same clipping; prompts of 5 to 24 tokens, so that some are shorter than the 14
edited positions; the learning rate is the paper's. AdamW divides by a gradient's size and so enlarges rounding where a gradient
is nearly zero: differences grow with the steps, the more so the larger the learning rate and the smaller the batch. Printed is the largest relative difference of a step's loss; exits with 1 if one is over --limit.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from stage import Side, prepare, report_tokens

from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.training.settings import TrainSettings
from reft_edge.training.turns import Example

CASES = [(kind, tied) for kind in ("loreft", "direft") for tied in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pyreft", type=Path, help="environment with pyreft")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=9e-4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1e-3)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="by number, from 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    source = resolve_model(options.model)
    rows = some_rows(report_tokens(source))
    found = {}
    for kind, tied in (CASES[number] for number in options.cases):
        settings = TrainSettings(
            intervention=kind,
            tied=tied,
            rank=options.rank,
            positions="f7+l7",
            lr=options.lr,
            warmup=0.0,
            schedule="constant",
            max_steps=options.steps,
            start="random",
            batch_size=options.batch_size,
            prompt_format="raw",
            dtype="fp32",
        )
        name = f"{kind}, {'tied' if tied else 'untied'}"
        found[name] = curves(source, rows, settings, options.pyreft, options.threads)
        print(f"{name}: {difference(found[name]):.1e}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(found))
    else:
        table = Table("", "first loss", "last loss", "largest relative difference", title=source.name)
        for name, sides in found.items():
            ours = sides["reft-edge"]
            table.add_row(name, f"{ours[0]:.4f}", f"{ours[-1]:.4f}", f"{difference(sides):.1e}")
        Console().print(table)
    if any(difference(sides) > options.limit for sides in found.values()):
        sys.exit(1)


def some_rows(tokens: list[int]) -> list[Example]:
    """Prompts of 5 to 24 tokens and completions of 1 to 8, cut from a text."""
    random = np.random.default_rng(0)
    rows, at = [], 0
    while at + 32 < len(tokens):
        prompt, completion = int(random.integers(5, 25)), int(random.integers(1, 9))
        middle = at + prompt
        rows.append(Example(tuple(tokens[at:middle]), tuple(tokens[middle : middle + completion])))
        at += 11
    return rows


def curves(
    source: ModelFolder, rows: list[Example], settings: TrainSettings, pyreft: Path, threads: int
) -> dict[str, list[float]]:
    """Every step's loss on both sides."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        job = prepare(source, rows, settings, threads, work)
        losses = {}
        for name, python in (("reft-edge", sys.executable), ("pyreft", str(pyreft / "bin/python"))):
            side = Side(name, python, job, work / f"{name}.log")
            losses[name] = [side.step()["loss"] for _ in range(settings.max_steps or 0)]
            side.close()
    return losses


def difference(sides: dict[str, list[float]]) -> float:
    ours, theirs = np.array(sides["reft-edge"]), np.array(sides["pyreft"])
    return float(np.max(np.abs(ours - theirs) / theirs))


if __name__ == "__main__":
    main()
