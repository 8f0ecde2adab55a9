"""`reft-edge keygen`, `sign` and `verify`: who vouches for an adapter file."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import fail, plain_errors, print_json, say
from reft_edge.commands.options import Json
from reft_edge.errors import ReftEdgeError

_PASSPHRASE = "REFT_EDGE_KEY_PASSPHRASE"
Expires = Annotated[
    str | None,
    typer.Option(
        metavar="DATE|DAYSd", help="When it ends: 2027-01-31 (UTC), or 90d from now.", show_default="never"
    ),
]


def keygen(
    private: Annotated[
        Path,
        typer.Argument(
            metavar="PRIVATE.key",
            help="Where the private key goes; the public one goes beside it, as PRIVATE.pub.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="What devices call it when they say who signed.", show_default="PRIVATE"),
    ] = None,
    encrypt: Annotated[
        bool,
        typer.Option(
            "--encrypt", help=f"Encrypt it with a passphrase, asked for or taken from ${_PASSPHRASE}."
        ),
    ] = False,
    expires: Expires = None,
) -> None:
    """Make a key pair (Ed25519) to sign adapters with."""
    with plain_errors():
        from reft_edge.signing.keys import generate_key, parse_expiry

        end = parse_expiry(expires) if expires else None
        key = generate_key(
            private, private.stem if name is None else name, _passphrase(True) if encrypt else None, end
        )
    say(f"private key: {private} (keep it secret, and a copy of it safe)")
    say(f"public key:  {private.with_suffix('.pub')}, a line for the devices' files of trusted keys:")
    say(key.line)


def sign(
    adapter: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Adapter files to sign.", show_default=False)
    ],
    key: Annotated[
        Path, typer.Option(metavar="PRIVATE.key", help="The private key, from keygen.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the signed file.", show_default="in place"),
    ] = None,
    expires: Expires = None,
) -> None:
    """Sign adapter files; the signature goes into the file."""
    with plain_errors():
        from reft_edge import signing

        if output is not None and len(adapter) != 1:
            raise ReftEdgeError(f"--output is for one file; {len(adapter)} were given")
        end = signing.parse_expiry(expires) if expires else None
        try:
            private = signing.load_private_key(key, os.environ.get(_PASSPHRASE))
        except signing.PassphraseNeededError:
            private = signing.load_private_key(key, _passphrase(False))
        for path in adapter:
            made = signing.sign(path, private, output, end)
            until = f", until {made.expires:%Y-%m-%d %H:%M} UTC" if made.expires else ""
            say(f"signed {output or path} with key {made.key}{until}")


def verify(
    adapter: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Adapter files to check.", show_default=False)
    ],
    trusted: Annotated[
        Path, typer.Option(metavar="KEYS", help="The file of trusted keys.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Say who signed adapter files and when; fails if one is unsigned, changed, expired or of a foreign key."""
    with plain_errors():
        from reft_edge import signing

        keys = signing.load_trusted(trusted)
        results: list[dict[str, object]] = []
        for path in adapter:
            try:
                found = signing.verify(path, keys)
            except ReftEdgeError as error:
                results.append({"file": str(path), "verified": False, "reason": str(error)})
                if not as_json:
                    fail(error)
                continue
            results.append(
                {
                    "file": str(path),
                    "verified": True,
                    "signer": found.signer,
                    "key": found.key,
                    "created": found.created.isoformat(),
                    "valid_until": found.valid_until.isoformat() if found.valid_until else None,
                }
            )
            if not as_json:
                say(f"{path}: {found}")
    if as_json:
        print_json(results)
    if not all(result["verified"] for result in results):
        raise typer.Exit(1)


def _passphrase(twice: bool) -> str:
    """From the environment, or asked for at the terminal."""
    if given := os.environ.get(_PASSPHRASE):
        return given
    if not sys.stdin.isatty():
        raise ReftEdgeError(
            f"the private key needs a passphrase; set {_PASSPHRASE} where there is no terminal"
        )
    asked: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=twice)
    return asked
