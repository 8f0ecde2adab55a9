"""`reft-edge compare`: two evaluations side by side."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import plain_errors, print_json, say
from reft_edge.commands.options import MOST_SEED, Json


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.jsonl", help="Records of one run.", show_default=False)],
    b: Annotated[
        Path, typer.Argument(metavar="B.jsonl", help="Records of the other run.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare two runs of `eval --records` on the same rows, row by row."""
    with plain_errors():
        from reft_edge.evaluation.results import compare_records, load_records

        found = compare_records(load_records(a), load_records(b), seed)
    if as_json:
        print_json(vars(found))
        return
    say(
        f"{found.rows:,} rows: both right {found.both:,}, only A {found.only_a:,}, only B {found.only_b:,}, "
        f"neither {found.neither:,}"
    )
    say(
        f"accuracy A {found.accuracy_a:.4f}, B {found.accuracy_b:.4f}; B - A = "
        f"{found.accuracy_b - found.accuracy_a:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}"
    )
    say(f"McNemar's exact test: p = {found.p_value:.3g}")
