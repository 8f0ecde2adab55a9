"""What is fuzzed of our own formats: adapters with their signatures, manifests, files of trusted keys."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from harness import Target

from reft_edge.adapter.config import INTERVENTIONS, OF_RANK_1, Adapter, AdapterConfig
from reft_edge.adapter.file import parse_stored, read_config, read_stored, save_adapter
from reft_edge.adapter.linear import fold
from reft_edge.adapter.storage import PRECISIONS
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import MANIFEST, Manifest, load_manifest, save_manifest
from reft_edge.signing.keys import PrivateKey, TrustedKey, TrustedKeys, parse_trusted
from reft_edge.signing.signatures import read_signature, sign, verify

_NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def make_adapter(
    kind: str, positions: str = "f2+l2", layers: tuple[int, ...] = (0, 2), **fields: Any
) -> Adapter:
    rank = 1 if kind in OF_RANK_1 else 2
    config = AdapterConfig(kind, "base", "0" * 16, 8, 4, layers, rank, positions, **fields)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in config.shapes().items()}
    if "R" in tensors:
        tensors["R"] = np.linalg.qr(tensors["R"].swapaxes(-1, -2))[0].swapaxes(-1, -2).copy()
    return Adapter(config, tensors)


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
        for precision in PRECISIONS:
            save_adapter(make_adapter(kind, training={"steps": 3, "loss": 0.5}), path, precision)
            seeds.append(path.read_bytes())
    save_adapter(make_adapter("loreft", 'from:"<x>|\\n"[5,6]-l1|f2'), path)
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
            fold(adapter).in_prompt([5, 6, 5, 6, 7])
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


def make_manifest() -> Manifest:
    return Manifest(
        base_name="base",
        base_fingerprint="0" * 16,
        architecture="llama",
        precision="fp32",
        hidden_size=8,
        num_layers=4,
        layers=(0, 2),
        head_size=4,
        context_length=1024,
        eos_token_ids=(1,),
        ports={"reft.layers.0.A": ["adapter_batch", 8, "rank"]},
        verification={"max_difference": 1e-5},
        versions={"onnxruntime": "1.20"},
    )


def manifest_target(folder: Path) -> Target:
    """The manifest of an exported folder."""
    save_manifest(make_manifest(), folder)
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
