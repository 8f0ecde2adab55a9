"""Targets of what repositories of adapters say."""

import json
from pathlib import Path

from harness import Target

from reft_edge.shipping.oci import parse_manifest, render_manifest
from reft_edge.shipping.release import Release, digest_of, parse_index, render_index


def index_target(folder: Path) -> Target:
    """The index of a repository of adapters."""
    releases = [
        Release("formal", 1, digest_of(b"1"), 75384, "base", "0" * 16),
        Release("a.b-c_d", 12, digest_of(b"2"), 1),
    ]
    whole = render_index(releases)

    def read(content: bytes) -> None:
        found = parse_index(content)
        assert parse_index(render_index(found)) == found
        for release in found:
            assert (folder / release.path).parent.parent == folder

    return Target(read, [whole, render_index([]), whole[:-9], b"[" * 3000], 2)


def oci_manifest_target(folder: Path) -> Target:
    """The manifest of an adapter in an OCI registry."""
    whole = render_manifest(Release("formal", 1, digest_of(b"1"), 75384, "base", "0" * 16))
    plain = json.dumps({**json.loads(whole), "annotations": {}}).encode()

    def read(content: bytes) -> None:
        found = parse_manifest(content, "7")
        assert parse_manifest(render_manifest(found), "latest") == found
        assert (folder / found.path).parent.parent == folder

    return Target(read, [whole, plain, whole[:-2], b'{"layers": [7]}'], 2)
