"""Signatures: what was signed verifies, and everything else is refused with the reason."""

import json
import os
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reft_edge.adapter.config import INTERVENTIONS
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.cli import app
from reft_edge.errors import AdapterFileError, ReftEdgeError, SignatureError
from reft_edge.signing.keys import (
    PassphraseNeededError,
    PrivateKey,
    TrustedKey,
    TrustedKeys,
    generate_key,
    load_private_key,
    load_trusted,
    parse_expiry,
    parse_time,
    parse_trusted,
)
from reft_edge.signing.signatures import content_digest, load_verified, read_signature, sign, verify
from tests.adapter.test_adapter_file import change_config, parts, rewrite
from tests.adapter.test_algebra import make_adapter

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the private keys fleet.key and foreign.key and their .pub files."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("fleet", "foreign"):
        generate_key(folder / f"{name}.key", name)
    return folder


@pytest.fixture
def fleet(keys: Path) -> PrivateKey:
    return load_private_key(keys / "fleet.key")


@pytest.fixture
def trusted(keys: Path) -> TrustedKeys:
    return load_trusted(keys / "fleet.pub")


@pytest.fixture
def signed(tmp_path: Path, fleet: PrivateKey) -> Path:
    path = tmp_path / "task.safetensors"
    save_adapter(make_adapter("loreft", training={"lr": 1e-05, "data": "é"}), path)
    sign(path, fleet, expires=NOW + 30 * DAY, now=NOW)
    return path


def refused(path: Path, trusted: TrustedKeys, reason: str, now: datetime = NOW) -> None:
    with pytest.raises(SignatureError, match=rf"task\.safetensors is refused: .*{reason}"):
        verify(path, trusted, now)


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_signed_files_verify_and_hold_what_they_held(
    tmp_path: Path, kind: str, fleet: PrivateKey, trusted: TrustedKeys
) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "signed.safetensors"
    adapter = make_adapter(kind)
    save_adapter(adapter, path)
    made = sign(path, fleet, out)
    found = verify(out, trusted)
    assert (found.signer, found.key, found.created, found.expires) == ("fleet", fleet.id, made.created, None)
    assert read_signature(path) is None
    assert read_signature(out) == made
    loaded, signature = load_verified(out, trusted)
    assert signature == found
    assert loaded.config == adapter.config
    assert all(np.array_equal(loaded.tensors[name], adapter.tensors[name]) for name in adapter.tensors)
    assert verify(out.read_bytes(), trusted) == found


def test_who_and_when_is_said(signed: Path, trusted: TrustedKeys, fleet: PrivateKey) -> None:
    said = str(verify(signed, trusted, NOW))
    assert said == (
        f"signed by fleet (key {fleet.id}) on 2026-11-24 12:00 UTC, valid until 2026-12-24 12:00 UTC"
    )
    assert "not verified" in str(read_signature(signed))


def test_writing_the_same_content_anew_keeps_it(signed: Path, trusted: TrustedKeys) -> None:
    header, data = parts(signed)
    order = sorted(header, reverse=True)
    moved, offset = {}, 0
    pieces = []
    for name in order:
        if name == "__metadata__":
            moved[name] = dict(reversed(header[name].items()))
            continue
        start, end = header[name]["data_offsets"]
        pieces.append(data[start:end])
        moved[name] = {**header[name], "data_offsets": [offset, offset := offset + end - start]}
    assert b"".join(pieces) != data
    rewrite(signed, json.dumps(moved, ensure_ascii=True), b"".join(pieces))
    assert verify(signed, trusted, NOW).signer == "fleet"


def test_unsigned_and_stripped(signed: Path, trusted: TrustedKeys) -> None:
    header, data = parts(signed)
    del header["__metadata__"]["signature"]
    rewrite(signed, header, data)
    refused(signed, trusted, "it is not signed")
    save_adapter(load_adapter(signed), signed)
    refused(signed, trusted, "it is not signed")
    with pytest.raises(SignatureError, match="not signed"):
        load_verified(signed, trusted)


def test_foreign_keys(signed: Path, trusted: TrustedKeys, keys: Path, fleet: PrivateKey) -> None:
    foreign = load_private_key(keys / "foreign.key")
    sign(signed, foreign, now=NOW)
    refused(signed, trusted, f"signed with the key {foreign.id}, which is not in .*fleet.pub")
    header, data = parts(signed)  # the foreign signature under the trusted key's id
    entry = json.loads(header["__metadata__"]["signature"])
    header["__metadata__"]["signature"] = json.dumps({**entry, "key": fleet.id}, separators=(",", ":"))
    rewrite(signed, header, data)
    refused(signed, trusted, "was changed after fleet signed it")


def test_another_files_signature(signed: Path, trusted: TrustedKeys, fleet: PrivateKey) -> None:
    other = signed.with_name("other.safetensors")
    save_adapter(make_adapter("loreft", seed=1), other)
    sign(other, fleet, now=NOW)
    header, data = parts(signed)
    header["__metadata__"]["signature"] = parts(other)[0]["__metadata__"]["signature"]
    rewrite(signed, header, data)
    refused(signed, trusted, "was changed after fleet signed it")


@pytest.mark.parametrize(
    ("field", "value"),
    [("expires", None), ("expires", "2099-01-01T00:00:00Z"), ("created", "2026-11-23T12:00:00Z")],
)
def test_times_are_part_of_what_is_signed(
    signed: Path, trusted: TrustedKeys, field: str, value: str | None
) -> None:
    header, data = parts(signed)
    entry = json.loads(header["__metadata__"]["signature"])
    header["__metadata__"]["signature"] = json.dumps({**entry, field: value}, separators=(",", ":"))
    rewrite(signed, header, data)
    refused(signed, trusted, "was changed after fleet signed it")


def test_time(signed: Path, trusted: TrustedKeys) -> None:
    end = NOW + 30 * DAY
    assert verify(signed, trusted, end - timedelta(seconds=1)).valid_until == end
    refused(signed, trusted, "the signature of this adapter expired on 2026-12-24 12:00 UTC", end)
    assert verify(signed, trusted, NOW - timedelta(minutes=4)).created == NOW
    refused(signed, trusted, "not yet valid: .* set the clock", NOW - timedelta(minutes=6))


def test_an_expired_key(signed: Path, fleet: PrivateKey) -> None:
    end = NOW + DAY
    key = TrustedKey("fleet", fleet.public, end)
    keys = parse_trusted(f"{key.line}\n".encode(), "trusted.keys")
    assert verify(signed, keys, NOW).valid_until == end
    refused(signed, keys, "the key fleet that signed this adapter expired on 2026-11-25 12:00 UTC", end)


def test_changed_descriptions_and_other_metadata(signed: Path, trusted: TrustedKeys) -> None:
    before = signed.read_bytes()
    change_config(signed, prompt_format="raw")
    refused(signed, trusted, "was changed after fleet signed it")
    signed.write_bytes(before)
    header, data = parts(signed)
    header["__metadata__"]["note"] = "added"
    rewrite(signed, header, data)
    refused(signed, trusted, "was changed after fleet signed it")


def test_a_tensor_s_declaration_has_no_room_for_what_is_not_signed(
    signed: Path, trusted: TrustedKeys
) -> None:
    header, data = parts(signed)
    header["R"]["note"] = "added"
    rewrite(signed, header, data)
    with pytest.raises(AdapterFileError, match=r"tensor R is declared with unknown fields \['note'\]"):
        verify(signed, trusted, NOW)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"key":1,"created":2,"expires":3,"signature":4}',
        "{" * 2000,
        '{"key":"' + "a" * 16,
    ],
)
def test_malformed_signatures(signed: Path, trusted: TrustedKeys, entry: str) -> None:
    header, data = parts(signed)
    header["__metadata__"]["signature"] = entry
    rewrite(signed, header, data)
    refused(signed, trusted, "malformed")
    with pytest.raises(SignatureError, match="malformed"):
        read_signature(signed)


@pytest.mark.parametrize(
    "change", [{"key": "A" * 16}, {"created": "2026-13-01T00:00:00Z"}, {"expires": "soon"}, {"x": 1}]
)
def test_strange_fields(signed: Path, trusted: TrustedKeys, change: dict[str, Any]) -> None:
    header, data = parts(signed)
    entry = json.loads(header["__metadata__"]["signature"])
    header["__metadata__"]["signature"] = json.dumps({**entry, **change}, separators=(",", ":"))
    rewrite(signed, header, data)
    with pytest.raises(SignatureError):
        verify(signed, trusted, NOW)


def test_every_flipped_bit_pattern_at_every_position(signed: Path, trusted: TrustedKeys) -> None:
    """One other value at each position of the file, a different one from position to position."""
    content = signed.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        with pytest.raises((SignatureError, AdapterFileError)):
            verify(bytes(changed), trusted, NOW)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_refused(signed: Path, trusted: TrustedKeys, data: st.DataObject) -> None:
    content = bytearray(signed.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    with pytest.raises((SignatureError, AdapterFileError)):
        verify(bytes(content), trusted, NOW)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(INTERVENTIONS),
    seed=st.integers(0, 2**32),
    days=st.none() | st.integers(1, 5000),
    training=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_any_adapter_signs_and_verifies(
    tmp_path: Path,
    fleet: PrivateKey,
    trusted: TrustedKeys,
    kind: str,
    seed: int,
    days: int | None,
    training: dict[str, float],
) -> None:
    path = tmp_path / "any.safetensors"
    save_adapter(make_adapter(kind, seed=seed, training=training), path)
    expires = NOW + days * DAY if days else None
    assert sign(path, fleet, expires=expires, now=NOW).expires == expires
    assert verify(path, trusted, NOW).expires == expires


def test_the_digest_tells_tensors_apart(tmp_path: Path) -> None:
    from reft_edge.adapter.file import read_stored

    digests = set()
    for adapter in (
        make_adapter("loreft"),
        make_adapter("loreft", seed=1),
        make_adapter("direft"),
        make_adapter("loreft", tied=True),
    ):
        save_adapter(adapter, tmp_path / "a.safetensors")
        digests.add(content_digest(read_stored(tmp_path / "a.safetensors")))
    swapped = make_adapter("loreft")
    swapped.tensors["R"], swapped.tensors["W"] = swapped.tensors["W"], swapped.tensors["R"]
    save_adapter(swapped, tmp_path / "a.safetensors")
    digests.add(content_digest(read_stored(tmp_path / "a.safetensors")))
    assert len(digests) == 5


def test_a_failed_write_leaves_the_old_file(
    signed: Path, fleet: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signed.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ReftEdgeError, match="No space left"):
        sign(signed, fleet)
    assert signed.read_bytes() == before
    with pytest.raises(ReftEdgeError, match="No space left"):
        generate_key(signed.with_name("new.key"), "new")
    assert [path.name for path in signed.parent.iterdir()] == ["task.safetensors"]


def test_only_usable_adapters_are_signed(tmp_path: Path, fleet: PrivateKey) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"{}")
    with pytest.raises(AdapterFileError):
        sign(tmp_path / "a.safetensors", fleet)
    save_adapter(make_adapter("loreft"), tmp_path / "a.safetensors")
    with pytest.raises(ReftEdgeError, match="in the past"):
        sign(tmp_path / "a.safetensors", fleet, expires=NOW, now=NOW)


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_signed_file_keeps_its_permissions(tmp_path: Path, fleet: PrivateKey, mode: int) -> None:
    path, copy, there = (tmp_path / f"{name}.safetensors" for name in ("a", "copy", "there"))
    save_adapter(make_adapter("loreft", 1), path)
    there.write_bytes(b"")
    there.chmod(0o604)
    path.chmod(mode)
    for output in (None, copy, there):
        sign(path, fleet, output)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, copy, there)] == [mode, mode, 0o604]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_of_a_link_what_it_names_is_signed(tmp_path: Path, fleet: PrivateKey, trusted: TrustedKeys) -> None:
    (tmp_path / "versions").mkdir()
    path, link = tmp_path / "versions" / "a.safetensors", tmp_path / "a.safetensors"
    save_adapter(make_adapter("loreft", 1), path)
    path.chmod(0o600)
    link.symlink_to(path)
    sign(link, fleet)
    assert link.is_symlink()
    verify(path, trusted)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_private_keys_are_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "my.key"
    made = generate_key(path, "me")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_private_key(path).public == made.public
    before = path.read_bytes()
    with pytest.raises(ReftEdgeError, match=r"my\.pub exists"):
        generate_key(path, "me")
    path.with_suffix(".pub").unlink()
    with pytest.raises(ReftEdgeError, match=r"my\.key exists"):
        generate_key(path, "me")
    assert path.read_bytes() == before
    path.chmod(0o640)
    with pytest.raises(ReftEdgeError, match=r"chmod 600"):
        load_private_key(path)
    with pytest.raises(ReftEdgeError, match="another ending"):
        generate_key(tmp_path / "other.pub", "me")
    for folder in (Path(), Path("/")):
        with pytest.raises(ReftEdgeError, match="is a folder"):
            generate_key(folder, "me")
    with pytest.raises(ReftEdgeError, match="cannot write the private key"):
        generate_key(tmp_path / "none" / "other.key", "me")


def test_half_a_pair_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ReftEdgeError("the disk is full")

    monkeypatch.setattr("reft_edge.signing.keys.write_atomically", fail)
    with pytest.raises(ReftEdgeError, match="the disk is full"):
        generate_key(tmp_path / "my.key", "me")
    assert list(tmp_path.iterdir()) == []


def test_passphrases(tmp_path: Path) -> None:
    path = tmp_path / "my.key"
    made = generate_key(path, "me", passphrase="correct horse")
    assert b"ENCRYPTED" in path.read_bytes()
    assert load_private_key(path, "correct horse").public == made.public
    with pytest.raises(PassphraseNeededError, match="give its passphrase"):
        load_private_key(path)
    with pytest.raises(ReftEdgeError, match="passphrase is wrong"):
        load_private_key(path, "battery staple")


def test_what_is_no_private_key(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    path = tmp_path / "my.key"
    with pytest.raises(ReftEdgeError, match="cannot read the private key"):
        load_private_key(path)
    other = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for content, message in [
        (b"", "no private key in PEM"),
        (b"\xff\x00", "no private key in PEM"),
        (other, "no Ed25519 key"),
    ]:
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ReftEdgeError, match=message):
            load_private_key(path)


PUBLIC = "ed25519:" + "ab" * 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no keys"),
        ("# nothing\n\n", "holds no keys"),
        ("fleet", "line 1: expected NAME ed25519:KEY"),
        ("fleet ed25519:12", "expected NAME ed25519:KEY"),
        (f"fleet {PUBLIC.upper()}", "expected NAME ed25519:KEY"),
        (f"fleet {PUBLIC} tomorrow", "cannot read the time 'tomorrow'"),
        (f"fleet {PUBLIC} 2027-02-30", "cannot read the time"),
        (f"fleet {PUBLIC} 2027-01-01 x", "expected NAME"),
        (f"\x1b[2J {PUBLIC}", "a key's name is letters"),
        (f"a {PUBLIC}\nb {PUBLIC}", "line 2: this key or its name stands there twice"),
        (f"a {PUBLIC}\na ed25519:{'cd' * 32}", "line 2: this key or its name stands there twice"),
        ("x" * (1 << 20) + "y", "larger than"),
    ],
)
def test_malformed_trusted_keys(content: str, message: str) -> None:
    with pytest.raises(ReftEdgeError, match=message):
        parse_trusted(content.encode(), "trusted.keys")


def test_trusted_keys_files(tmp_path: Path, keys: Path) -> None:
    path = tmp_path / "trusted.keys"
    lines = [(keys / f"{name}.pub").read_text().strip() for name in ("fleet", "foreign")]
    path.write_text(f"# ours\n{lines[0]} 2027-01-31\r\n\n  {lines[1]}\n")
    found = sorted(load_trusted(path).keys.values(), key=lambda key: key.name)
    assert [key.name for key in found] == ["fleet", "foreign"]
    assert found[0].expires == datetime(2027, 1, 31, tzinfo=timezone.utc)
    path.chmod(0o666)
    with pytest.raises(ReftEdgeError, match="chmod o-w"):
        load_trusted(path)
    with pytest.raises(ReftEdgeError, match="cannot read the trusted keys"):
        load_trusted(tmp_path / "none")
    with pytest.raises(ReftEdgeError, match="is UTF-16 text"):
        parse_trusted(b"\xff\xfe", "trusted.keys")


def test_times_in_words() -> None:
    assert parse_time("2027-01-31") == parse_time("2027-01-31T00:00:00Z")
    near = parse_expiry("90d") - datetime.now(timezone.utc)
    assert timedelta(days=89, hours=23) < near <= timedelta(days=90)
    for text in ("", "0d", "-1d", "999999d", "2027-1-1", "2027-01-31T00:00:00", "٢٠٢٧-01-31", "9999999"):
        with pytest.raises(ReftEdgeError, match="cannot read the time"):
            parse_expiry(text)


def cli(*arguments: object, ok: bool = True, **environment: str) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    assert (result.exit_code == 0) == ok, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def test_commands(tmp_path: Path) -> None:
    key, first, second = tmp_path / "fleet.key", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    trusted = tmp_path / "fleet.pub"
    save_adapter(make_adapter("loreft"), first)
    save_adapter(make_adapter("direft"), second)
    cli("keygen", key, "--name", "fleet-2026", "--expires", "700d")
    cli("sign", first, "--key", key, "--expires", "30d")
    assert "signed by fleet-2026" in cli("verify", first, "--trusted", trusted)
    said = cli("verify", first, second, "--trusted", trusted, ok=False)
    assert "signed by fleet-2026" in said
    assert "b.safetensors is refused: it is not signed" in said
    found = json.loads(cli("verify", first, second, "--trusted", trusted, "--json", ok=False))
    assert [row["verified"] for row in found] == [True, False]
    assert found[0]["signer"] == "fleet-2026"
    assert "is for one file" in cli("sign", first, second, "--key", key, "-o", tmp_path / "c", ok=False)
    assert "cannot read the time" in cli("sign", first, "--key", key, "--expires", "soon", ok=False)


def test_commands_with_an_encrypted_key(tmp_path: Path) -> None:
    key, path = tmp_path / "fleet.key", tmp_path / "a.safetensors"
    save_adapter(make_adapter("loreft"), path)
    assert "REFT_EDGE_KEY_PASSPHRASE" in cli("keygen", key, "--encrypt", ok=False)
    cli("keygen", key, "--encrypt", REFT_EDGE_KEY_PASSPHRASE="horse")
    assert "REFT_EDGE_KEY_PASSPHRASE" in cli("sign", path, "--key", key, ok=False)
    assert "passphrase is wrong" in cli("sign", path, "--key", key, ok=False, REFT_EDGE_KEY_PASSPHRASE="cow")
    cli("sign", path, "--key", key, REFT_EDGE_KEY_PASSPHRASE="horse")
    assert "signed by fleet" in cli("verify", path, "--trusted", key.with_suffix(".pub"))
