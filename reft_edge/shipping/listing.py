"""What a store holds, for people and scripts."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reft_edge.adapter.file import StoredAdapter
from reft_edge.errors import ReftEdgeError, SignatureError
from reft_edge.shipping.store import DeviceStore, State, digest_of_file
from reft_edge.signing.keys import TrustedKeys
from reft_edge.signing.signatures import read_signature, verify


@dataclass(frozen=True)
class Installed:
    """One adapter of a store."""

    name: str
    version: int | None
    """None for a file that was put there by hand."""
    size: int
    """Bytes."""
    digest: str
    earlier: tuple[int, ...]
    """Versions that can be rolled back to, the latest first; 0 is a file that was put there by hand."""
    signature: str
    """Who signed it, where trusted keys say so; else the key that it names, none, or why it is refused."""
    base_name: str = ""
    base_fingerprint: str = ""
    accuracy: float | None = None
    """On held-out rows, as it was trained: a share from 0 to 1; None where it was not measured."""
    loss: float | None = None
    """On held-out rows, in nats a token, as it was trained."""
    problem: str = ""
    """Why the file cannot be used; empty where it can."""


def list_store(store: DeviceStore, trusted: TrustedKeys | None = None) -> list[Installed]:
    """Every adapter file of a store, by name. Raises ReftEdgeError if there is no such folder."""
    return [_describe(store, name, trusted) for name in store.names()]


def _describe(store: DeviceStore, name: str, trusted: TrustedKeys | None) -> Installed:
    state = store.state(name)
    fields: dict[str, Any]
    with store.opened(name) as file:
        size, digest = os.fstat(file.fileno()).st_size, digest_of_file(file)
    try:
        _, stored = store.read(name, store.path(name).name)
        stored.adapter()
        config = stored.config
        fields = {
            "signature": _signature(stored, trusted),
            "base_name": config.base_name,
            "base_fingerprint": config.base_fingerprint,
            "accuracy": _figure(config.training, "evaluation_accuracy"),
            "loss": _figure(config.training, "evaluation_loss"),
        }
    except ReftEdgeError as error:
        fields = {"signature": "-", "problem": str(error)}
    return Installed(name, state.version or None, size, digest, _earlier(state), **fields)


def _earlier(state: State) -> tuple[int, ...]:
    return tuple(kept.version for kept in state.earlier)


def _signature(stored: StoredAdapter, trusted: TrustedKeys | None) -> str:
    try:
        if trusted is not None:
            return str(verify(stored, trusted).signer)
        found = read_signature(stored)
    except SignatureError as error:
        return f"refused: {str(error).partition(' is refused: ')[2] or error}"
    return f"key {found.key}, not verified" if found else "none"


def _figure(training: Mapping[str, Any], name: str) -> float | None:
    value = training.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
