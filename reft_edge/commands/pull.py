"""`reft-edge pull`: adapters from a repository into a store."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.api import pull as pull_adapters
from reft_edge.commands.console import fail, plain_errors, print_json, say
from reft_edge.commands.options import Json, PlainHttp, Repository, RequireSigned


def pull(
    repository: Repository,
    store: Annotated[
        Path,
        typer.Option(
            "--store",
            "-s",
            metavar="STORE",
            help="The folder of adapters to install into, as for `serve --adapters`; made if it is not there.",
            show_default=False,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Adapters; all where none is named.", show_default=False),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            help="That version of one adapter, older or rolled back as it may be.", show_default="newest"
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--for",
            metavar="DIR",
            help="Only adapters for the model in this exported folder.",
            show_default=False,
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Download at most that many bytes in all; of each adapter the store keeps a second copy to roll back to.",
            show_default="2,000,000,000",
        ),
    ] = None,
    require_signed: RequireSigned = None,
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Install the newest version of adapters from a repository, checked and all at once."""
    with plain_errors():
        pulled = pull_adapters(
            repository,
            store,
            names or (),
            version=version,
            folder=folder,
            max_bytes=max_bytes,
            require_signed=require_signed,
            plain_http=plain_http,
            report=lambda message: say(message, err=True),
        )
    if as_json:
        print_json([vars(one) for one in pulled])
    for one in pulled:
        if one.status == "failed":
            fail(f"{one.name}: {one.reason}")
        elif not as_json:
            say(f"{one.name}: {_told(one.status, one.version, one.installed, one.previous, one.reason)}")
    if not pulled and not as_json:
        say("the repository has nothing for this store")
    if any(one.status == "failed" for one in pulled):
        raise typer.Exit(1)


def _told(status: str, version: int, installed: int | None, previous: int | None, reason: str) -> str:
    if status == "current":
        return f"version {version} is installed"
    if status == "kept":
        return f"version {installed} stays: {reason}"
    before = (
        "" if previous is None else f" in place of {f'version {previous}' if previous else 'another file'}"
    )
    return f"installed version {version}{before}"
