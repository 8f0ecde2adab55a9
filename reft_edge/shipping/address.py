"""Repositories by their address."""

from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.repository import Repository

KINDS = "a folder, https://HOST/PATH/, hf://OWNER/REPO or oci://HOST/REPO[:TAG]"


def open_repository(address: str, plain_http: bool = False) -> Repository:
    """The repository at an address: KINDS. Nothing is read or fetched yet.

    `plain_http` allows unencrypted connections to other machines. Raises ReftEdgeError for an address of no known kind.
    """
    scheme, separator, rest = address.partition("://")
    if "\0" in address or (separator and any("\ud800" <= letter <= "\udfff" for letter in address)):
        raise ReftEdgeError(f"{address} holds characters that no address has; give {KINDS}")
    if not separator:
        from reft_edge.shipping.folder import FolderRepository

        return FolderRepository(Path(address))
    if scheme in ("http", "https"):
        from reft_edge.shipping.http import HttpRepository

        return HttpRepository(address, plain_http)
    if scheme == "hf":
        from reft_edge.shipping.hub import HubRepository

        return HubRepository(rest, plain_http)
    if scheme == "oci":
        from reft_edge.shipping.oci import OciRepository

        return OciRepository(rest, plain_http)
    raise ReftEdgeError(f"{address} is not a repository's address; give {KINDS}")
