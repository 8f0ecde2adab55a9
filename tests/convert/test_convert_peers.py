"""Conversions against the original libraries, by logits. Run with `pytest -m peers`.

pyreft and repeng get environments of their own, in minutes; llama.cpp is compiled for longer, and therefore
only tried where $REFT_EDGE_PEERS names a folder that `benchmarks/runtime/environments.sh` has filled (it is
looked into for the others, too).
"""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter
from reft_edge.convert.formats import Given, convert
from tests.helpers.peers import TOLERANCE, largest, peer, run, steered_logits
from tests.helpers.tiny import LAYERS
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.torch_reference import logits, random_adapter
from tests.peers.llama_cpp_side import ROW

pytestmark = pytest.mark.peers
SPEC = "f3+l2"


@pytest.fixture(scope="module")
def pyreft_python(tmp_path_factory):
    return peer("pyreft", tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def saved(pyreft_python, device_folder, tmp_path_factory):
    """What pyreft saved, of every class, and its logits."""
    folder = tmp_path_factory.mktemp("pyreft")
    run(pyreft_python, "pyreft_side.py", "save", device_folder / "hf", folder)
    return folder


def test_what_pyreft_saved_gives_pyrefts_logits(saved, device_folder, tiny_model, tmp_path):
    rows = json.loads((saved / "prompts.json").read_text())
    bare = [logits(tiny_model, row).numpy() for row in rows]
    cases = sorted(path for path in saved.glob("*.json") if path.stem != "prompts")
    assert len(cases) == 18
    for path in cases:
        case = json.loads(path.read_text())
        expected = list(np.load(saved / f"{path.stem}.npz").values())
        assert largest(bare, expected) > 0.1
        sourceless = case["kind"] in ("consreft", "lobireft")
        for name, kind in ((path.stem, None), (f"{path.stem}-bare", case["kind"])):
            given = Given(
                model=str(device_folder / "hf"),
                positions=SPEC,
                act_fn=None if sourceless else case["act_fn"] or "linear",
                intervention=kind if kind not in ("loreft", "direft") else None,
                raw=True,
            )
            convert(str(saved / name), tmp_path / "task.safetensors", given)
            adapter = load_adapter(tmp_path / "task.safetensors")
            assert (adapter.config.intervention, adapter.config.tied) == (case["kind"], case["tied"])
            assert largest(steered_logits(tiny_model, adapter, rows), expected) <= TOLERANCE, name


def test_pyreft_loads_what_we_write(pyreft_python, saved, device_folder, tiny_model, tmp_path):
    rows = json.loads((saved / "prompts.json").read_text())
    adapters = {}
    for number, kind in enumerate(
        ("loreft", "direft", "consreft", "lobireft", "noreft", "nodireft", "steering")
    ):
        for tied in (True, False):
            name = f"{kind}-{'tied' if tied else 'untied'}"
            path = tmp_path / f"{name}.safetensors"
            adapters[name] = random_adapter(tiny_model, kind, SPEC, tied, seed=number, path=path, strength=2)
            convert(str(path), tmp_path / name, Given())
    run(pyreft_python, "pyreft_side.py", "load", device_folder / "hf", tmp_path)
    for name, adapter in adapters.items():
        ours = steered_logits(tiny_model, adapter, rows)
        assert largest(ours, np.load(tmp_path / f"{name}-fp32.npz").values()) <= TOLERANCE, name
        again = tmp_path / "again.safetensors"
        act_fn = None if adapter.config.intervention in ("consreft", "lobireft", "steering") else "linear"
        convert(
            str(tmp_path / name),
            again,
            Given(model=str(device_folder / "hf"), positions=SPEC, act_fn=act_fn, raw=True),
        )
        reloaded = rounded_as_pyreft_does(load_adapter(again))
        expected = np.load(tmp_path / f"{name}.npz").values()
        assert largest(steered_logits(tiny_model, reloaded, rows), expected) <= TOLERANCE, name


def rounded_as_pyreft_does(adapter: Adapter) -> Adapter:
    """ReftModel.load keeps learned_source of LoReFT and DiReFT in bfloat16."""
    tensors = dict(adapter.tensors)
    if adapter.config.intervention in ("loreft", "direft"):
        for name in ("W", "b"):
            tensors[name] = torch.from_numpy(tensors[name]).bfloat16().float().numpy()
    return replace(adapter, tensors=tensors)


def test_control_vectors_act_as_in_repeng(device_folder, tiny_model, tmp_path):
    python, hf = peer("repeng", tmp_path), device_folder / "hf"
    run(python, "repeng_side.py", "save", hf, tmp_path / "theirs.gguf", tmp_path / "theirs.npy")
    ours = tmp_path / "ours.safetensors"
    convert(str(tmp_path / "theirs.gguf"), ours, Given(model=str(hf), raw=True))
    adapter = load_adapter(ours)
    assert adapter.config.layers == tuple(range(1, LAYERS))
    found = steered_logits(tiny_model, adapter, [ROW])
    assert largest(found, [np.load(tmp_path / "theirs.npy")]) <= TOLERANCE
    assert largest(found, [logits(tiny_model, ROW).numpy()]) > 0.1
    convert(str(ours), tmp_path / "back.gguf", Given())
    run(python, "repeng_side.py", "load", hf, tmp_path / "back.gguf", tmp_path / "back.npy")
    assert largest(found, [np.load(tmp_path / "back.npy")]) <= TOLERANCE


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2)])
def test_control_vectors_act_as_in_llama_cpp(tiny_model, tmp_path, layers):
    python = peer("llama.cpp", tmp_path)
    ours = tmp_path / "ours.safetensors"
    adapter = random_adapter(tiny_model, "steering", "all+gen", tied=True, layers=layers, path=ours)
    convert(str(ours), tmp_path / "vector.gguf", Given())
    rows = np.zeros((LAYERS - 1, tiny_model.config.hidden_size), np.float32)
    for tensor in gguf.GGUFReader(str(tmp_path / "vector.gguf")).tensors:
        rows[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
    np.save(tmp_path / "rows.npy", rows)
    write_gguf(tmp_path / "model.gguf", tiny_model)
    run(
        python,
        "llama_cpp_side.py",
        tmp_path / "model.gguf",
        tmp_path / "rows.npy",
        tmp_path / "theirs.npy",
    )
    found = steered_logits(tiny_model, adapter, [ROW])
    assert largest(found, [np.load(tmp_path / "theirs.npy")]) <= TOLERANCE
    assert largest(found, [logits(tiny_model, ROW).numpy()]) > 0.1
