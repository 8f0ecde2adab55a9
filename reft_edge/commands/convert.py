"""`reft-edge convert`: adapters of other libraries, read and written."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, print_json, say
from reft_edge.commands.options import Json


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder that pyreft or AdapterHub wrote, or its Hub id; a control vector (.gguf); an .onnx_adapter; or an adapter "
            "file (.safetensors) to convert to one of these.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="What to write: .safetensors, .gguf, .onnx_adapter, .json for EasySteer, or a folder for pyreft.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, as for train.", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--for",
            metavar="DIR",
            help="An exported folder of the base, in place of --model.",
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="pyreft: the positions that it was trained with, such as f7+l7. AdapterHub: the stored prefix with +gen.",
            show_default="all+gen for control vectors",
        ),
    ] = None,
    act_fn: Annotated[
        str | None,
        typer.Option(
            help="pyreft: the act_fn that it was trained with; linear if none was chosen.", show_default=False
        ),
    ] = None,
    intervention: Annotated[
        str | None,
        typer.Option(
            help="noreft or nodireft, consreft or lobireft, which look alike in pyreft without config.json and in AdapterHub.",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="How prompts are written: as they stand, or through the model's chat template.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert adapters of other libraries to ours, and ours to theirs."""
    from reft_edge.commands.screen import Screen

    console = Screen(stderr=True)
    with plain_errors(), extra("train"):
        from reft_edge.api import convert as convert_adapter

        done = convert_adapter(
            source,
            output,
            model=model,
            folder=folder,
            positions=positions,
            act_fn=act_fn,
            intervention=intervention,
            raw=raw,
            report=console.say,
        )
    config = done.adapter.config
    if as_json:
        print_json(
            {
                "path": str(output),
                "from": done.source,
                "to": done.result,
                "intervention": config.intervention,
                "rank": config.rank,
                "layers": config.layers,
                "positions": config.positions,
                "tied": config.tied,
            }
        )
        return
    say(
        f"wrote {output} ({done.result}): {config.intervention} of rank {config.rank} at {len(config.layers)} layers, "
        f"positions {config.positions}{', tied' if config.tied else ''}"
    )
