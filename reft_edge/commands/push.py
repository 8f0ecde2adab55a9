"""`reft-edge push`: adapter files into a repository."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.api import push as push_files
from reft_edge.commands.console import plain_errors, print_json, say
from reft_edge.commands.options import Json, PlainHttp


def push(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Adapter files.", show_default=False)
    ],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="REPOSITORY",
            help="A folder, hf://OWNER/REPO (each made, the latter private, if it is not there) or oci://HOST/REPO[:TAG].",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="The adapter's name there; for one FILE.", show_default="FILE's without ending"),
    ] = None,
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Add adapter files to a repository, each as the next version of its name."""
    with plain_errors():
        made = push_files(files, repository, name=name, plain_http=plain_http)
    if as_json:
        print_json([vars(release) for release in made])
        return
    for release in made:
        say(f"{repository} has {release}: {release.size / 1000:,.1f} kB, {release.digest}")
