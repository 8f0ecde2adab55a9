"""Signing keys: making, reading and trusting them."""

import codecs
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from reft_edge.errors import ReftEdgeError
from reft_edge.files import decode_text, write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


_PUBLIC = "ed25519:"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


_MAX_KEYS, _MAX_PRIVATE = 1 << 20, 1 << 16


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
        end = f" {self.expires.strftime(TIME_FORMAT)}" if self.expires else ""
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
    with import_cryptography():
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
    with import_cryptography():
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


def parse_time(text: str) -> datetime:
    """2027-01-31, its first moment in UTC, or 2027-01-31T12:00:00Z. Raises ReftEdgeError."""
    for pattern, form in (
        (r"\d{4}-\d\d-\d\d", "%Y-%m-%d"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", TIME_FORMAT),
    ):
        if re.fullmatch(pattern, text, re.ASCII):
            try:
                return datetime.strptime(text, form).replace(tzinfo=timezone.utc)
            except ValueError:
                break
    raise ReftEdgeError(f"cannot read the time {text[:40]!r}; write 2027-01-31 or 2027-01-31T12:00:00Z (UTC)")


def parse_expiry(text: str) -> datetime:
    """A time as for `parse_time`, or a number of days from now, as 90d. Raises ReftEdgeError."""
    if days := re.fullmatch(r"([1-9]\d{0,4})d", text, re.ASCII):
        return now_utc().replace(microsecond=0) + timedelta(days=int(days[1]))
    return parse_time(text)


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


def now_utc() -> datetime:
    return datetime.now(timezone.utc)


def shown_time(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")


@contextmanager
def import_cryptography() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ReftEdgeError(
            f"signatures need the package {error.name!r}; install it with: pip install 'reft-edge[sign]'"
        ) from error
