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

import codecs
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reft_edge.adapter import Adapter, AdapterSource, StoredAdapter, parse_stored, read_stored
from reft_edge.errors import ReftEdgeError, SignatureError
from reft_edge.files import decode_text, write_atomically
from reft_edge.storage import serialise

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ENTRY = "signature"
_log = logging.getLogger(__name__)
_PUBLIC = "ed25519:"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_SKEW = timedelta(minutes=5)
_MAX_KEYS, _MAX_PRIVATE = 1 << 20, 1 << 16


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
        now = now or _now()
        if self.created > now + _SKEW:
            raise SignatureError(
                f"{about} is signed, but not yet valid: the signature was made on {_shown(self.created)}, and this machine's clock "
                f"says {_shown(now)}; set the clock"
            )
        if self.key_expires is not None and now >= self.key_expires:
            raise SignatureError(
                f"the key {self.signer} that signed {about} expired on {_shown(self.key_expires)}; sign with a newer key"
            )
        if self.expires is not None and now >= self.expires:
            raise SignatureError(f"the signature of {about} expired on {_shown(self.expires)}; sign again")

    def __str__(self) -> str:
        who = self.signer or "somebody (not verified)"
        until = f", valid until {_shown(self.valid_until)}" if self.valid_until else ""
        return f"signed by {who} (key {self.key}) on {_shown(self.created)}{until}"


@dataclass(frozen=True)
class TrustedKey:
    name: str
    public: bytes
    """32 bytes."""
    expires: datetime | None = None

    @property
    def id(self) -> str:
        return key_id(self.public)

    @property
    def line(self) -> str:
        """As it stands in a file of trusted keys."""
        end = f" {self.expires.strftime(_TIME)}" if self.expires else ""
        return f"{self.name} {_PUBLIC}{self.public.hex()}{end}"


@dataclass(frozen=True)
class TrustedKeys:
    """Whose signatures count."""

    source: str
    """The file's name, for messages."""
    keys: dict[str, TrustedKey]
    """By id."""


class PrivateKey:
    """What signs."""

    def __init__(self, private: "Ed25519PrivateKey") -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()
        self.id = key_id(self.public)

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


def key_id(public: bytes) -> str:
    """The id of a public key of 32 bytes: 16 hex digits."""
    return hashlib.sha256(public).hexdigest()[:16]


def generate_key(
    path: Path, name: str, passphrase: str | None = None, expires: datetime | None = None
) -> TrustedKey:
    """Make a key: the private one in `path` (PEM, encrypted with the passphrase if there is one, readable by its owner
    only), and its line for files of trusted keys in `path` with the ending .pub.

    Raises ReftEdgeError if either file exists: no key is ever overwritten.
    """
    with _cryptography():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    _check_name(name)
    if not path.name:
        raise ReftEdgeError(f"{path} is a folder; give the name of the private key's file")
    public_path = path.with_suffix(".pub")
    if path == public_path:
        raise ReftEdgeError(
            f"{path} is where the public key goes; give the private one another ending, as .key"
        )
    if public_path.exists():
        raise ReftEdgeError(f"{public_path} exists; give another name, or move the old key away")
    private = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    content = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    _write_private(path, content)
    key = TrustedKey(name, PrivateKey(private).public, expires)
    try:
        write_atomically(public_path, f"{key.line}\n".encode())
    except BaseException:
        path.unlink()  # nobody has the key yet, and half a pair would stand in the way of the next attempt
        raise
    return key


def load_private_key(path: Path, passphrase: str | None = None) -> PrivateKey:
    """Read a private key. Raises ReftEdgeError if others may read the file, it is no Ed25519 key in PEM, or the passphrase
    is missing or wrong."""
    with _cryptography():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_PRIVATE)
    except OSError as error:
        raise ReftEdgeError(f"cannot read the private key {path}: {error.strerror}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ReftEdgeError(f"other users may use the private key {path}; close it with: chmod 600 {path}")
    content = content.removeprefix(codecs.BOM_UTF8)
    encrypted = b"ENCRYPTED" in content.split(b"\n", 1)[0]
    if encrypted and not passphrase:
        raise PassphraseNeededError(f"the private key {path} is encrypted; give its passphrase")
    try:
        private = load_pem_private_key(content, passphrase.encode() if encrypted and passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = (
            "the passphrase is wrong, or the file is damaged" if encrypted else "it is no private key in PEM"
        )
        raise ReftEdgeError(f"cannot use the private key {path}: {why}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ReftEdgeError(f"{path} is no Ed25519 key; make one with `reft-edge keygen`")
    return PrivateKey(private)


class PassphraseNeededError(ReftEdgeError):
    """A private key is encrypted and no passphrase was given."""


def load_trusted(path: Path | str) -> TrustedKeys:
    """Read a file of trusted keys: lines of NAME ed25519:HEX [EXPIRY], and comments that begin with #.

    Raises ReftEdgeError for anything else, for a file without keys, and for one that every user may write.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_KEYS + 1)
    except OSError as error:
        raise ReftEdgeError(f"cannot read the trusted keys in {path}: {error.strerror}") from error
    if os.name == "posix" and stat.S_ISREG(mode) and mode & stat.S_IWOTH:
        raise ReftEdgeError(
            f"every user may change the trusted keys in {path}; close it with: chmod o-w {path}"
        )
    return parse_trusted(content, str(path))


def parse_trusted(content: bytes, source: str) -> TrustedKeys:
    """The same from a file's bytes."""
    if len(content) > _MAX_KEYS:
        raise ReftEdgeError(f"{source} is larger than {_MAX_KEYS:,} bytes; it is no file of trusted keys")
    lines = decode_text(content, source).split("\n")
    keys: dict[str, TrustedKey] = {}
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        try:
            key = _trusted_key(parts)
            if key.id in keys or any(key.name == other.name for other in keys.values()):
                raise ReftEdgeError("this key or its name stands there twice")
        except ReftEdgeError as error:
            raise ReftEdgeError(f"{source}, line {number}: {error}") from error
        keys[key.id] = key
    if not keys:
        raise ReftEdgeError(
            f"{source} holds no keys; add the line of a .pub file that `reft-edge keygen` wrote"
        )
    return TrustedKeys(source, keys)


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
    created = (now or _now()).replace(microsecond=0)
    if expires is not None and expires <= created:
        raise ReftEdgeError(f"the signature would expire on {_shown(expires)}, in the past")
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
        return _verified(signature, content_digest(stored), trusted, now or _now())
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


def parse_time(text: str) -> datetime:
    """2027-01-31, its first moment in UTC, or 2027-01-31T12:00:00Z. Raises ReftEdgeError."""
    for pattern, form in ((r"\d{4}-\d\d-\d\d", "%Y-%m-%d"), (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", _TIME)):
        if re.fullmatch(pattern, text, re.ASCII):
            try:
                return datetime.strptime(text, form).replace(tzinfo=timezone.utc)
            except ValueError:
                break
    raise ReftEdgeError(f"cannot read the time {text[:40]!r}; write 2027-01-31 or 2027-01-31T12:00:00Z (UTC)")


def parse_expiry(text: str) -> datetime:
    """A time as for `parse_time`, or a number of days from now, as 90d. Raises ReftEdgeError."""
    if days := re.fullmatch(r"([1-9]\d{0,4})d", text, re.ASCII):
        return _now().replace(microsecond=0) + timedelta(days=int(days[1]))
    return parse_time(text)


def _verified(signature: Signature, digest: str, trusted: TrustedKeys, now: datetime) -> Signature:
    with _cryptography():
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
    return time.strftime(_TIME) if time else "never"


def _to_text(signature: Signature) -> str:
    fields = {
        "key": signature.key,
        "created": signature.created.strftime(_TIME),
        "expires": signature.expires.strftime(_TIME) if signature.expires else None,
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


def _trusted_key(parts: list[str]) -> TrustedKey:
    if len(parts) not in (2, 3) or not re.fullmatch(f"{_PUBLIC}[0-9a-f]{{64}}", parts[1]):
        raise ReftEdgeError(
            "expected NAME ed25519:KEY, a key of 64 hex digits, and perhaps the date it expires"
        )
    _check_name(parts[0])
    return TrustedKey(
        parts[0],
        bytes.fromhex(parts[1].removeprefix(_PUBLIC)),
        parse_time(parts[2]) if len(parts) == 3 else None,
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}", name):
        raise ReftEdgeError(
            f"a key's name is letters, digits and ._@+-, at most 64 of them, not {name[:80]!r}"
        )


def _write_private(path: Path, content: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ReftEdgeError(f"{path} exists; give another name, or move the old key away") from error
    except OSError as error:
        raise ReftEdgeError(f"cannot write the private key {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ReftEdgeError(f"cannot write the private key {path}: {error.strerror}") from error
        raise


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _shown(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")


@contextmanager
def _cryptography() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ReftEdgeError(
            f"signatures need the package {error.name!r}; install it with: pip install 'reft-edge[sign]'"
        ) from error
