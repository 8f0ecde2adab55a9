"""What is fuzzed: readers of files that may come from strangers, each as a function of the file's bytes.

A reader may refuse its input with ReftEdgeError, in words that a terminal can show, and do nothing else: no other exception,
no hang, no more than 64 MB of memory beyond the input's size.
"""

import json
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from reft_edge.adapter import (
    INTERVENTIONS,
    Adapter,
    AdapterConfig,
    fold,
    parse_stored,
    read_config,
    read_stored,
    save_adapter,
)
from reft_edge.errors import ReftEdgeError
from reft_edge.manifest import MANIFEST, Manifest, load_manifest, save_manifest
from reft_edge.shipping.oci import parse_manifest, render_manifest
from reft_edge.shipping.release import Release, digest_of, parse_index, render_index
from reft_edge.signing import PrivateKey, TrustedKey, TrustedKeys, parse_trusted, read_signature, sign, verify
from reft_edge.storage import STORES

MEMORY = 64 << 20
SECONDS = 10
_NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Target:
    """A reader and inputs to begin with."""

    read: Callable[[bytes], None]
    seeds: list[bytes]
    accepted: int
    """How many of the seeds are well-formed; the first ones."""


def attempt(read: Callable[[bytes], None], content: bytes) -> bool:
    """Whether the reader accepts the bytes. Raises AssertionError, or what the reader lets through, for a finding."""
    resident, peak = _resident(), _peak()
    accepted = True
    try:
        read(content)
    except ReftEdgeError as error:
        accepted = False
        shown = str(error)
        assert all(part.isprintable() for part in shown.split("\n")), f"a terminal cannot show {shown!r}"
        assert len(shown) < 5000, f"an error of {len(shown)} characters"
    grown = _peak()
    assert grown <= max(peak, resident + MEMORY + len(content)), f"took {grown - resident:,} bytes of memory"
    return accepted


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def make_adapter(kind: str, **fields: object) -> Adapter:
    config = AdapterConfig(
        kind,
        "base",
        "0" * 16,
        8,
        4,
        (0, 2),
        1 if kind == "steering" else 2,
        "f2+l2",
        **fields,  # type: ignore[arg-type]
    )
    random = np.random.default_rng(0)
    return Adapter(
        config,
        {name: random.normal(size=shape).astype(np.float32) for name, shape in config.shapes().items()},
    )


def test_key() -> PrivateKey:
    """The same in every run."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def adapter_target(folder: Path) -> Target:
    """The adapter file, its storage types and signature: everything that is done with one before it is bound."""
    key, path = test_key(), folder / "seed.safetensors"
    trusted = TrustedKeys("trusted.keys", {key.id: TrustedKey("fuzz", key.public)})
    seeds = []
    for kind in INTERVENTIONS:
        for store in STORES:
            save_adapter(make_adapter(kind, training={"steps": 3, "loss": 0.5}), path, store)
            seeds.append(path.read_bytes())
    save_adapter(make_adapter("loreft", labels=("a", "b"), pooling="cls"), path, "int8")
    seeds.append(path.read_bytes())
    sign(path, key, expires=datetime(2030, 1, 1, tzinfo=timezone.utc), now=_NOW)
    seeds.append(path.read_bytes())
    signed = read_stored(path)
    unsafe = folder / "input.safetensors"

    def read(content: bytes) -> None:
        unsafe.write_bytes(content)
        try:
            config = read_config(unsafe)
        except ReftEdgeError:
            config = None
        stored = read_stored(unsafe)
        assert stored.config == config == parse_stored(content, "it").config
        adapter = stored.adapter()
        if adapter.config.act_fn == "linear":
            fold(adapter)
        signature = read_signature(stored)
        try:
            assert verify(stored, trusted, _NOW).value == (signature.value if signature else None)
        except ReftEdgeError:
            assert content != seeds[-1], "the signed file does not verify"
        else:
            assert stored.metadata == signed.metadata, "a changed description verifies"
            assert stored.tensors.keys() == signed.tensors.keys()
            for name, tensor in signed.tensors.items():
                assert np.array_equal(stored.tensors[name], tensor), "a changed tensor verifies"

    return Target(read, seeds, len(seeds))


def manifest_target(folder: Path) -> Target:
    """The manifest of an exported folder."""
    manifest = Manifest(
        base_name="base",
        base_fingerprint="0" * 16,
        architecture="llama",
        precision="fp32",
        hidden_size=8,
        num_layers=4,
        layers=(0, 2),
        head_size=4,
        context_length=64,
        eos_token_ids=(1,),
        ports={"reft.layers.0.A": ["adapter_batch", 8, "rank"]},
        verification={"max_difference": 1e-5},
        versions={"onnxruntime": "1.20"},
    )
    save_manifest(manifest, folder)
    seed = (folder / MANIFEST).read_bytes()
    encoder = json.dumps({**json.loads(seed), "kind": "encoder", "components": ["block", "mlp"]}).encode()

    def read(content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        found = load_manifest(folder)
        found.check_base("0" * 16, "task.safetensors", "base")
        for place in found.places:
            assert place.port.startswith("reft.layers.")
        assert (folder / found.graph).parent == folder

    return Target(read, [seed, encoder, b"[" * 3000], 2)


def trusted_keys_target(folder: Path) -> Target:
    """Files of trusted keys."""
    line = TrustedKey("fleet", bytes(32)).line
    seeds = [
        f"# ours\n{line}\n".encode(),
        f"{line} 2027-01-31\r\n\n".encode(),
        f"{line} 2027-01-31T10:00:00Z".encode(),
    ]

    def read(content: bytes) -> None:
        found = parse_trusted(content, "trusted.keys")
        again = parse_trusted("\n".join(key.line for key in found.keys.values()).encode(), "trusted.keys")
        assert again == found

    return Target(read, [*seeds, f"{line}\n{line}".encode(), b"fleet ed25519:00"], 3)


def signature_target(folder: Path) -> Target:
    """The signature entry of a file that is otherwise sound."""
    key, path = test_key(), folder / "signed.safetensors"
    trusted = TrustedKeys("trusted.keys", {key.id: TrustedKey("fuzz", key.public)})
    seeds = []
    for expires in (None, datetime(2030, 1, 1, tzinfo=timezone.utc)):
        save_adapter(make_adapter("consreft"), path)
        sign(path, key, expires=expires, now=_NOW)
        seeds.append(read_stored(path).metadata["signature"].encode())
    stored = read_stored(path)

    def read(content: bytes) -> None:
        stored.metadata["signature"] = content.decode(errors="surrogateescape")
        signature = read_signature(stored)
        assert signature is not None
        str(signature)
        assert verify(stored, trusted, _NOW).signer == "fuzz"
        assert content in seeds, "a changed signature verifies"

    return Target(read, [*seeds, b"{}"], 2)


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


TARGETS: dict[str, Callable[[Path], Target]] = {
    "adapter": adapter_target,
    "manifest": manifest_target,
    "trusted-keys": trusted_keys_target,
    "signature": signature_target,
    "index": index_target,
    "oci-manifest": oci_manifest_target,
}


def make_target(name: str) -> Target:
    """A target with a scratch folder of its own, in memory where the machine has /dev/shm."""
    memory = Path("/dev/shm")
    return TARGETS[name](
        Path(tempfile.mkdtemp(prefix="reft-edge-fuzz-", dir=memory if memory.is_dir() else None))
    )
