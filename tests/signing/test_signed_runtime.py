"""With trusted keys, the runtime, the server and the commands bind signed adapters only, and say who signed them."""

from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from reft_edge.cli import app
from reft_edge.errors import SignatureError
from reft_edge.runtime import SteeredEncoder, SteeredModel
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings
from reft_edge.signing import signatures as signing
from reft_edge.signing.keys import generate_key, load_private_key, load_trusted
from reft_edge.signing.signatures import sign
from tests.helpers.tiny import CLASSIFIED


@pytest.fixture(scope="module")
def files(device_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, and a folder `adapters` of signed ones, a changed one, a foreign one and an unsigned one."""
    folder = tmp_path_factory.mktemp("signed")
    adapters = folder / "adapters"
    adapters.mkdir()
    for name in ("fleet", "foreign"):
        generate_key(folder / f"{name}.key", name)
    fleet, foreign = (load_private_key(folder / f"{name}.key") for name in ("fleet", "foreign"))
    first = device_folder / "first.safetensors"
    sign(first, fleet, adapters / "good.safetensors", datetime.now(timezone.utc) + timedelta(days=1))
    sign(first, foreign, adapters / "foreign.safetensors")
    (adapters / "unsigned.safetensors").write_bytes(first.read_bytes())
    changed = bytearray((adapters / "good.safetensors").read_bytes())
    changed[-1] ^= 1
    (adapters / "changed.safetensors").write_bytes(changed)
    sign(device_folder / "labels.safetensors", fleet, folder / "labels.safetensors")
    return folder


REASONS = {
    "unsigned": "it is not signed",
    "foreign": "which is not in .*fleet.pub",
    "changed": "was changed after fleet signed it",
}


@pytest.mark.parametrize("name", REASONS)
def test_nothing_else_is_loaded(device_folder, files, name):
    model = SteeredModel(device_folder / "export", "cpu", trusted=load_trusted(files / "fleet.pub"))
    with pytest.raises(SignatureError, match=REASONS[name]):
        model.load_adapter(files / "adapters" / f"{name}.safetensors")
    assert model.adapters == {}


def test_a_signed_adapter_runs_until_its_signature_expires(device_folder, files, monkeypatch):
    free = SteeredModel(device_folder / "export", "cpu")
    free.load_adapter(device_folder / "first.safetensors")
    assert free.signatures == {}
    model = SteeredModel(device_folder / "export", "cpu", trusted=load_trusted(files / "fleet.pub"))
    model.load_adapter(files / "adapters" / "good.safetensors")
    assert model.signatures["good"].signer == "fleet"
    answer = model.generate("Who are you?", "good", max_tokens=8)
    assert answer == free.generate("Who are you?", "first", max_tokens=8)
    now = datetime.now(timezone.utc) + timedelta(days=2)
    monkeypatch.setattr(signing, "now_utc", lambda: now)
    for run in (model.generate, model.prepare):
        with pytest.raises(SignatureError, match="the signature of adapter 'good' expired"):
            run(*(["Who are you?"] if run == model.generate else []), adapter="good")
    assert model.generate("Who are you?", max_tokens=8) != answer


def test_encoders(device_folder, files, monkeypatch):
    encoder = SteeredEncoder(device_folder / "encoder", "cpu", trusted=load_trusted(files / "fleet.pub"))
    with pytest.raises(SignatureError, match="not signed"):
        encoder.load_adapter(device_folder / "labels.safetensors")
    name = encoder.load_adapter(files / "labels.safetensors")
    assert encoder.signatures[name].signer == "fleet"
    free = SteeredEncoder(device_folder / "encoder", "cpu")
    free.load_adapter(device_folder / "labels.safetensors")
    for ours, theirs in zip(
        encoder.classify(CLASSIFIED, name), free.classify(CLASSIFIED, "labels"), strict=True
    ):
        assert np.allclose(list(ours.probabilities.values()), list(theirs.probabilities.values()))


def test_what_was_verified_is_what_is_used(device_folder, files, tmp_path, monkeypatch):
    """The file is opened once: one that is exchanged right after cannot reach the model."""
    path = tmp_path / "good.safetensors"
    path.write_bytes((files / "adapters" / "good.safetensors").read_bytes())
    evil = (files / "adapters" / "changed.safetensors").read_bytes()
    verify = signing.verify

    def verify_then_exchange(*arguments):
        found = verify(*arguments)
        path.write_bytes(evil)
        return found

    monkeypatch.setattr(signing, "verify", verify_then_exchange)
    adapter, _ = signing.load_verified(path, load_trusted(files / "fleet.pub"))
    monkeypatch.undo()
    assert path.read_bytes() == evil
    expected = signing.load_verified(files / "adapters" / "unsigned.safetensors", None)[0]
    assert all(np.array_equal(adapter.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_the_server_answers_403(device_folder, files):
    settings = ServerSettings("tiny", hosts=("testserver",), trusted=load_trusted(files / "fleet.pub"))
    with TestClient(create_app(device_folder / "export", files / "adapters", settings, "cpu")) as client:

        def ask(model: str):
            body = {"model": model, "max_tokens": 4, "prompt": "Who are you?"}
            return client.post("/v1/completions", json=body)

        for name in REASONS:
            refused = ask(f"tiny:{name}")
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "adapter_not_trusted"
        assert ask("tiny:good").status_code == 200
        assert ask("tiny").status_code == 200
        good = files / "adapters" / "good.safetensors"
        content = good.read_bytes()
        try:
            good.write_bytes((files / "adapters" / "foreign.safetensors").read_bytes())
            assert ask("tiny:good").status_code == 403
        finally:
            good.write_bytes(content)
        assert ask("tiny:good").status_code == 200


@pytest.mark.parametrize("command", ["run", "chat", "eval"])
@pytest.mark.parametrize("name", ["good", *REASONS])
def test_commands(device_folder, files, tmp_path, command, name):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 and 2?", "choices": ["4", "5"], "answer": 0}\n')
    asked = {
        "run": ["Who are you?", "--max-tokens", "3"],
        "chat": [],
        "eval": [str(tmp_path / "rows.jsonl")],
    }[command]
    options = [
        "-a",
        str(files / "adapters" / f"{name}.safetensors"),
        "--require-signed",
        str(files / "fleet.pub"),
    ]
    result = CliRunner().invoke(
        app, [command, str(device_folder / "export"), *asked, *options], input="/stats\n"
    )
    if name == "good":
        assert result.exit_code == 0, result.output
        assert "good.safetensors: signed by fleet (key" in result.stderr
    else:
        assert result.exit_code == 1
        assert f"{name}.safetensors is refused" in result.stderr


def test_eval_in_pytorch(device_folder, files, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 and 2?", "choices": ["4", "5"], "answer": 0}\n')
    for name, code in (("good", 0), ("unsigned", 1)):
        path = files / "adapters" / f"{name}.safetensors"
        arguments = [
            "eval",
            device_folder / "hf",
            tmp_path / "rows.jsonl",
            "-a",
            path,
            "--require-signed",
            files / "fleet.pub",
        ]
        assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == code


def test_bad_trusted_keys_stop_every_command(device_folder, tmp_path):
    for command in (["run", "x"], ["chat"], ["serve"]):
        arguments = [
            command[0],
            str(device_folder / "export"),
            *command[1:],
            "--require-signed",
            str(tmp_path / "none"),
        ]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "cannot read the trusted keys" in result.stderr
