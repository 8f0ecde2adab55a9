"""Ed25519 signatures inside adapter files: who signed the content, when, and until when it counts.

What is signed is a digest of everything else in the file, so writing the same content anew keeps a signature valid:

    digest     SHA-256 of these byte strings, each after its length as 8 bytes, little-endian: "reft-edge adapter
               content 1"; for every metadata entry but `signature`, by name: "metadata", name, value; for every
               tensor, by name: "tensor", name, numpy's name of its dtype, its shape as "2,1,4,576", its bytes
    statement  the lines "reft-edge signature 1", digest (hex), key id, creation time, expiry or "never"

The header's metadata entry `signature` is a JSON object: key, created, expires (text or null), and signature, the Ed25519
signature (RFC 8032) of the statement in hex. A key's id is the first 16 hex digits of its public key's SHA-256. Times are
UTC, as 2027-01-31T00:00:00Z. The package `cryptography` is imported when a key is made or used.
"""

import hashlib
import json
import logging
import re
import stat
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import AdapterSource, StoredAdapter, parse_stored, read_stored
from reft_edge.adapter.storage import serialise
from reft_edge.errors import ReftEdgeError, SignatureError
from reft_edge.files import write_atomically
from reft_edge.signing.keys import (
    TIME_FORMAT,
    PrivateKey,
    TrustedKeys,
    import_cryptography,
    now_utc,
    parse_time,
    shown_time,
)

ENTRY = "signature"
_log = logging.getLogger(__name__)


_SKEW = timedelta(minutes=5)


@dataclass(frozen=True)
class Signature:
    """Who signed an adapter and when; only `verify` makes one whose words are true."""

    key: str
    """The key's id."""
    created: datetime
    expires: datetime | None
    """When the signer wants it to end; None for never."""
    value: bytes
    """The Ed25519 signature, 64 bytes."""
    signer: str | None = None
    """The trusted key's name, once verified."""
    key_expires: datetime | None = None
    """The trusted key's end, once verified."""

    @property
    def valid_until(self) -> datetime | None:
        """The earlier of its own and its key's end; None for no end."""
        return min((end for end in (self.expires, self.key_expires) if end is not None), default=None)

    def check_time(self, now: datetime | None = None, about: str = "this adapter") -> None:
        """Raise SignatureError if it is from the future, or if it or its key has expired. `about`: the adapter."""
        now = now or now_utc()
        if self.created > now + _SKEW:
            raise SignatureError(
                f"{about} is signed, but not yet valid: the signature was made on {shown_time(self.created)}, and this machine's clock "
                f"says {shown_time(now)}; set the clock"
            )
        if self.key_expires is not None and now >= self.key_expires:
            raise SignatureError(
                f"the key {self.signer} that signed {about} expired on {shown_time(self.key_expires)}; sign with a newer key"
            )
        if self.expires is not None and now >= self.expires:
            raise SignatureError(
                f"the signature of {about} expired on {shown_time(self.expires)}; sign again"
            )

    def __str__(self) -> str:
        who = self.signer or "somebody (not verified)"
        until = f", valid until {shown_time(self.valid_until)}" if self.valid_until else ""
        return f"signed by {who} (key {self.key}) on {shown_time(self.created)}{until}"


def content_digest(stored: StoredAdapter) -> str:
    """SHA-256, in hex, of what a signature covers: everything in the file but the signature."""
    digest = hashlib.sha256()

    def add(*parts: bytes | memoryview) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    add(b"reft-edge adapter content 1")
    for name, value in sorted(stored.metadata.items()):
        if name != ENTRY:
            add(b"metadata", name.encode(), value.encode())
    for name, tensor in sorted(stored.tensors.items()):
        shape = ",".join(map(str, tensor.shape))
        data = np.ascontiguousarray(tensor).data.cast("B")
        add(b"tensor", name.encode(), tensor.dtype.name.encode(), shape.encode(), data)
    return digest.hexdigest()


def sign(
    path: Path,
    key: PrivateKey,
    output: Path | None = None,
    expires: datetime | None = None,
    now: datetime | None = None,
) -> Signature:
    """Sign an adapter file, in place or as `output`, written atomically; a signature that it has is replaced.

    The file keeps its permissions, and a new one gets those of the file that was signed; of a link, the file that it names
    is signed. Raises AdapterFileError for a file that is no usable adapter, ReftEdgeError for an expiry in the past.
    """
    stored = read_stored(path)
    stored.adapter()
    created = (now or now_utc()).replace(microsecond=0)
    if expires is not None and expires <= created:
        raise ReftEdgeError(f"the signature would expire on {shown_time(expires)}, in the past")
    unsigned = Signature(key.id, created, expires, b"")
    signature = replace(unsigned, value=key.sign(_statement(content_digest(stored), unsigned)))
    metadata = {**stored.metadata, ENTRY: _to_text(signature)}
    target = (output or path).resolve()
    mode = stat.S_IMODE((target if target.is_file() else path).stat().st_mode)
    write_atomically(target, serialise(stored.tensors, metadata), mode)
    return signature


def read_signature(source: Path | str | StoredAdapter) -> Signature | None:
    """What a file says of its signature, not verified; None if it has none.

    Raises AdapterFileError for a file that is no adapter, SignatureError for a malformed signature.
    """
    stored = source if isinstance(source, StoredAdapter) else read_stored(source)
    if (text := stored.metadata.get(ENTRY)) is None:
        return None
    try:
        return _from_text(text)
    except ReftEdgeError as error:
        raise SignatureError(f"{stored.name} is refused: {error}") from error


def verify(
    source: Path | str | bytes | StoredAdapter, trusted: TrustedKeys, now: datetime | None = None
) -> Signature:
    """The signature of an adapter file, or of its bytes, if a trusted key made it for this very content and it is in time.

    Raises SignatureError with the reason otherwise, AdapterFileError for what is no adapter.
    """
    if isinstance(source, bytes):
        source = parse_stored(source, "the file")
    stored = source if isinstance(source, StoredAdapter) else read_stored(source)
    signature = read_signature(stored)
    try:
        if signature is None:
            raise SignatureError("it is not signed; its owner signs it with `reft-edge sign`")
        return _verified(signature, content_digest(stored), trusted, now or now_utc())
    except SignatureError as error:
        raise SignatureError(f"{stored.name} is refused: {error}") from error


def load_verified(path: AdapterSource, trusted: TrustedKeys | None) -> tuple[Adapter, Signature | None]:
    """Read an adapter file, once, and verify what was read; without trusted keys nothing is verified.

    Who signed is logged at level INFO. Raises SignatureError and AdapterFileError.
    """
    stored = read_stored(path)
    if trusted is None:
        return stored.adapter(), None
    signature = verify(stored, trusted)
    _log.info("%s: %s", path, signature)
    return stored.adapter(), signature


def _verified(signature: Signature, digest: str, trusted: TrustedKeys, now: datetime) -> Signature:
    with import_cryptography():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    key = trusted.keys.get(signature.key)
    if key is None:
        raise SignatureError(f"it is signed with the key {signature.key}, which is not in {trusted.source}")
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature.value, _statement(digest, signature))
    except InvalidSignature as error:
        raise SignatureError(
            f"its content or its signature was changed after {key.name} signed it; get the file again"
        ) from error
    found = replace(signature, signer=key.name, key_expires=key.expires)
    found.check_time(now)
    return found


def _statement(digest: str, signature: Signature) -> bytes:
    lines = (
        "reft-edge signature 1",
        digest,
        signature.key,
        _text(signature.created),
        _text(signature.expires),
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _text(time: datetime | None) -> str:
    return time.strftime(TIME_FORMAT) if time else "never"


def _to_text(signature: Signature) -> str:
    fields = {
        "key": signature.key,
        "created": signature.created.strftime(TIME_FORMAT),
        "expires": signature.expires.strftime(TIME_FORMAT) if signature.expires else None,
        "signature": signature.value.hex(),
    }
    return json.dumps(fields, separators=(",", ":"))


def _from_text(text: str) -> Signature:
    malformed = SignatureError("its signature is malformed; get the file again")
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise malformed from error
    if not isinstance(fields, dict) or list(fields) != ["key", "created", "expires", "signature"]:
        raise malformed
    key, created, expires, value = fields.values()
    if not (isinstance(key, str) and isinstance(created, str) and isinstance(value, str)):
        raise malformed
    if not (re.fullmatch(r"[0-9a-f]{16}", key) and re.fullmatch(r"[0-9a-f]{128}", value)):
        raise malformed
    if expires is not None and not isinstance(expires, str):
        raise malformed
    signature = Signature(
        key, parse_time(created), None if expires is None else parse_time(expires), bytes.fromhex(value)
    )
    if _to_text(signature) != text:
        raise malformed
    return signature
