"""Ed25519 signatures of adapters. Needs the extra `sign`."""

from reft_edge.signing.keys import (
    PassphraseNeededError,
    PrivateKey,
    TrustedKey,
    TrustedKeys,
    generate_key,
    key_id,
    load_private_key,
    load_trusted,
    parse_expiry,
    parse_trusted,
)
from reft_edge.signing.signatures import Signature, load_verified, sign, verify

__all__ = [
    "PassphraseNeededError",
    "PrivateKey",
    "Signature",
    "TrustedKey",
    "TrustedKeys",
    "generate_key",
    "key_id",
    "load_private_key",
    "load_trusted",
    "load_verified",
    "parse_expiry",
    "parse_trusted",
    "sign",
    "verify",
]
