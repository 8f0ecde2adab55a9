"""`reft-edge merge`: several adapters in one file."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import plain_errors, print_json, say
from reft_edge.commands.options import Json


def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[COLUMNS][:SCALE]...",
            help="Adapter files, such as a.safetensors:0.7 or 'a.safetensors[0:2]' (quoted: shells read brackets).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The adapter file to write.", show_default=False)
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compress every place and position group to this rank; the error is printed.",
            show_default="exact",
        ),
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat", help="The prompt format of the result.", show_default="that of the sources"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge adapters of one base model into one file that does what they do at once."""
    with plain_errors():
        from reft_edge.adapter.merging import describe_loss
        from reft_edge.api import merge as merge_files

        merged = merge_files(sources, output, rank=rank, raw=raw)
        size = output.stat().st_size
    config = merged.adapter.config
    if as_json:
        losses = [
            {"layer": loss.place.layer, "group": loss.group, "rank": loss.rank, "error": loss.error}
            for loss in merged.losses
        ]
        print_json(
            {
                "path": str(output),
                "size": size,
                "intervention": config.intervention,
                "rank": config.rank,
                "layers": config.layers,
                "positions": config.positions,
                "tied": config.tied,
                "relative_error": merged.error,
                "losses": losses,
            }
        )
        return
    say(
        f"wrote {output}: {size / 1000:,.1f} kB, {config.intervention} of rank {config.rank} at {len(config.layers)} "
        f"layers, positions {config.positions}{', tied' if config.tied else ''}"
    )
    if rank is not None:
        say(f"relative error of the edit: {merged.error:.2g}; at most {describe_loss(merged)}")
