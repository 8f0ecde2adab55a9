"""`reft-edge list`: what a store holds or a repository offers."""

import os
from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, print_json, say, show_table
from reft_edge.commands.options import Json, PlainHttp
from reft_edge.errors import ReftEdgeError


def list_adapters(
    place: Annotated[
        str,
        typer.Argument(
            metavar="STORE|REPOSITORY",
            help="A folder of adapters, or a repository as for `pull`.",
            show_default=False,
        ),
    ],
    trusted: Annotated[
        Path | None,
        typer.Option(
            metavar="KEYS", help="Verify signatures with this file of trusted keys.", show_default=False
        ),
    ] = None,
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """List adapters: version, size, digest and base; in a store also the signature and accuracy as trained."""
    with plain_errors(), extra("ship"):
        from reft_edge.shipping.release import INDEX

        if "://" in place or os.path.lexists(Path(place) / INDEX):
            if trusted is not None:
                raise ReftEdgeError(
                    f"{place} is a repository, and its index says nothing of signatures; `pull --require-signed` "
                    "verifies them, and --trusted is for a store"
                )
            rows, shown = _offered(place, plain_http)
        else:
            rows, shown = _installed(Path(place), trusted)
    if as_json:
        print_json(rows)
    elif rows:
        show_table(shown)
        for row in rows:
            if row.get("problem"):
                say(row["problem"])
    else:
        say(f"there are no adapters in {place}")


def _offered(place: str, plain_http: bool) -> tuple[list[dict[str, object]], list[list[str]]]:
    from reft_edge.shipping.address import open_repository

    releases = sorted(
        open_repository(place, plain_http).releases(), key=lambda release: (release.name, release.version)
    )
    shown = [["NAME", "VERSION", "SIZE", "DIGEST", "BASE"]]
    for release in releases:
        base = " ".join(part for part in (release.base_name, release.base_fingerprint[:16]) if part) or "-"
        shown.append([release.name, str(release.version), _size(release.size), _digest(release.digest), base])
    return [{**vars(release)} for release in releases], shown


def _installed(folder: Path, trusted: Path | None) -> tuple[list[dict[str, object]], list[list[str]]]:
    from reft_edge.shipping.listing import list_store
    from reft_edge.shipping.store import DeviceStore
    from reft_edge.signing.keys import load_trusted

    entries = list_store(DeviceStore(folder), load_trusted(trusted) if trusted is not None else None)
    shown = [["NAME", "VERSION", "SIZE", "DIGEST", "BASE", "SIGNATURE", "AS TRAINED", "EARLIER"]]
    for entry in entries:
        shown.append(
            [
                entry.name,
                str(entry.version or "-"),
                _size(entry.size),
                _digest(entry.digest),
                "unusable" if entry.problem else f"{entry.base_name} {entry.base_fingerprint[:16]}",
                entry.signature,
                _trained(entry.accuracy, entry.loss),
                ", ".join(str(version or "by hand") for version in entry.earlier) or "-",
            ]
        )
    return [{**vars(entry)} for entry in entries], shown


def _trained(accuracy: float | None, loss: float | None) -> str:
    if accuracy is not None:
        return f"accuracy {accuracy:.4f}"
    return f"held-out loss {loss:.4f}" if loss is not None else "-"


def _size(size: int) -> str:
    return f"{size / 1000:,.1f} kB"


def _digest(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
