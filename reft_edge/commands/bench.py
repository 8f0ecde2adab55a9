"""`reft-edge bench`: how fast a folder runs here."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import plain_errors, print_json, show_table
from reft_edge.commands.options import Device, Folder, Json, Threads


def bench(
    folder: Folder,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="An adapter file.", show_default="a random one")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 5,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the random adapter, at every port.")] = 8,
    positions: Annotated[str, typer.Option(help="Its positions.")] = "f7+l7",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure prefill, decode, first token, adapter switch and load, and memory on this machine."""
    from dataclasses import asdict

    from reft_edge.commands.screen import Screen

    with plain_errors(), Screen(stderr=True).working("") as status:
        from reft_edge.runtime.bench import BenchSettings
        from reft_edge.runtime.bench import bench as run_bench

        settings = BenchSettings(prompt_tokens, new_tokens, repeats, rank, positions)
        found = run_bench(folder, settings, adapter, device, threads, status.step)
    if as_json:
        print_json({**asdict(found), "settings": asdict(settings)})
        return
    rows = [("", "no adapter", "adapter", "ratio")]
    for name, digits, field in (
        ("prefill, tokens/s", 0, "prefill_tokens_per_second"),
        ("decode, tokens/s", 1, "decode_tokens_per_second"),
        ("first token, ms", 1, "time_to_first_token"),
    ):
        factor = 1000 if "ms" in name else 1
        base, steered = (getattr(speed, field) * factor for speed in (found.base, found.steered))
        rows.append((name, f"{base:,.{digits}f}", f"{steered:,.{digits}f}", f"{steered / base:.3f}"))
    show_table(rows)
    show_table(
        [
            (
                "switch to a loaded adapter",
                f"p50 {found.switch_p50 * 1e6:,.0f} µs, p99 {found.switch_p99 * 1e6:,.0f} µs",
            ),
            ("from file to first use", f"p50 {found.load_p50 * 1e3:.2f} ms (4 layers, rank 4)"),
            ("peak memory", f"{found.peak_memory / 1e6:,.0f} MB, on {found.device}"),
        ],
        header=False,
    )
