"""`reft-edge rollback`: an earlier version of an adapter again."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, print_json, say
from reft_edge.commands.options import Json


def rollback(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A folder that `pull` installed into.", show_default=False)
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.", show_default=False)],
    version: Annotated[
        int | None,
        typer.Option(help="Any version that the store keeps.", show_default="the one installed before"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Install the version that an adapter had before; `pull` then waits for one newer than what was rolled back."""
    with plain_errors(), extra("ship"):
        from reft_edge.shipping.store import DeviceStore

        before, now = DeviceStore(store).rollback(name, version)
    if as_json:
        print_json({"name": name, "version": now.version, "previous": before.version, "digest": now.digest})
        return
    what = f"version {now.version}" if now.version else "the file that was there before pull"
    say(f"{name}: {what} is installed again")
