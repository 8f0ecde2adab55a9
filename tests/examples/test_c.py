"""The C example is compiled and run against a stock ONNX Runtime: the library inside its Python wheel.

REFT_EDGE_ORT_INCLUDE names a folder with ONNX Runtime's C headers (examples/c/headers.sh gets them); without it, or without
a C compiler, the test is skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from reft_edge.convert.onnx_adapter import pack_adapter
from reft_edge.model.manifest import load_manifest
from reft_edge.model.prompts import load_prompts
from reft_edge.runtime import SteeredModel

SOURCE = Path(__file__).parents[2] / "examples/c/steer.c"
INCLUDE = os.environ.get("REFT_EDGE_ORT_INCLUDE")
COMPILER = shutil.which("cc")
PROMPT = "Who are you?"


@pytest.fixture(scope="module")
def steer(tmp_path_factory):
    """The compiled example."""
    if COMPILER is None or INCLUDE is None:
        pytest.skip("needs a C compiler and ONNX Runtime's headers (REFT_EDGE_ORT_INCLUDE)")
    place = tmp_path_factory.mktemp("steer")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (place / "libonnxruntime.so.1").symlink_to(library)
    warnings = ("-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror", "-I", INCLUDE)
    link = (str(place / "libonnxruntime.so.1"), f"-Wl,-rpath,{place}")
    subprocess.run([COMPILER, *warnings, str(SOURCE), *link, "-o", str(place / "steer")], check=True)
    return place / "steer"


def run(steer, *arguments, tokens):
    return subprocess.run(
        [steer, *map(str, arguments)], input=" ".join(map(str, tokens)), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def question(device_folder):
    """The example's arguments for the exported folder, and a prompt's tokens."""
    manifest = load_manifest(device_folder / "export")
    model = device_folder / "export" / manifest.graph
    ids = load_prompts(device_folder / "export").encode_prompt(PROMPT, "chat")
    return (model, manifest.head_size, manifest.eos_token_ids[0], 24), ids


@pytest.mark.parametrize("name", ["base", "first", "everywhere", "opening"])
def test_c_gives_pytorchs_tokens_and_ours(steer, question, device_folder, tmp_path, name):
    arguments, ids = question
    model = SteeredModel(device_folder / "export", device="cpu")
    adapter = None
    if name != "base":
        path = device_folder / f"{name}.safetensors"
        pack_adapter(path, device_folder / "export", tmp_path / "task.onnx_adapter")
        arguments = (*arguments, tmp_path / "task.onnx_adapter")
        adapter = model.load_adapter(path)
    answer = model.stream(PROMPT, adapter, max_tokens=24)
    answer.text()
    ran = run(steer, *arguments, tokens=ids)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    tokens = [int(line) for line in ran.stdout.split()]
    assert tokens == answer.tokens == json.loads((device_folder / "expected.json").read_text())[name]


def test_c_runs_adapters_with_an_activation_and_red(steer, device_folder, tiny_model, tmp_path):
    from reft_edge.export import export_model
    from reft_edge.model.places import PORT_KINDS
    from reft_edge.model.source import ModelFolder
    from tests.helpers.torch_reference import random_adapter

    folder = tmp_path / "export"
    manifest = export_model(ModelFolder(device_folder / "hf", "tiny"), folder, port_kinds=PORT_KINDS)
    model = SteeredModel(folder, device="cpu")
    ids = model.prompts.encode_prompt(PROMPT, "chat")
    given = (folder / manifest.graph, manifest.head_size, manifest.eos_token_ids[0], 24)
    for name, fields in (("red", {}), ("nodireft", {"act_fn": "silu", "strength": 4.0})):
        path = tmp_path / f"{name}.safetensors"
        random_adapter(tiny_model, name, "all+gen", path=path, **fields)
        pack_adapter(path, folder, tmp_path / "task.onnx_adapter")
        answer = model.stream(PROMPT, model.load_adapter(path), max_tokens=24)
        answer.text()
        ran = run(steer, *given, tmp_path / "task.onnx_adapter", tokens=ids)
        assert [int(line) for line in ran.stdout.split()] == answer.tokens != []


def test_c_says_what_is_wrong(steer, question, device_folder):
    (model, *rest), ids = question
    for arguments, tokens, because in (
        ((device_folder / "none.onnx", *rest), ids, "none.onnx"),
        ((model, "wide", *rest[1:]), ids, "'wide' is not a whole number"),
        ((model, *rest), [], "no prompt tokens"),
        ((model, *rest), ["x"], "'x' is not a whole number"),
        ((model, *rest), range(9000), "too long"),
        ((model, *rest, device_folder / "first.safetensors"), ids, "error: "),
    ):
        ran = run(steer, *arguments, tokens=tokens)
        assert ran.returncode == 1
        assert because in ran.stderr
        assert ran.stdout == ""
    assert run(steer, tokens=ids).returncode == 2
