"""Conversions, with the other libraries' files written here as they write them. tests/convert/test_convert_peers.py
asks the libraries.
"""

import itertools
import json
import pickle
import shutil
import struct
import threading
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reft_edge.adapter.algebra import Edit, Gate, LayerEdit, concat, scale
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.adapter.linear import fold, unfold
from reft_edge.adapter.positions import Span, active
from reft_edge.cli import app
from reft_edge.convert.control_vector import (
    constant_edit,
    from_control_vector,
    read_control_vector,
    to_control_vector,
    write_control_vector,
)
from reft_edge.convert.formats import Given, convert
from reft_edge.convert.from_pyreft import Asked, from_pyreft
from reft_edge.convert.onnx_adapter import _array, from_onnx_adapter, pack_adapter
from reft_edge.convert.tensor_file import read_tensors
from reft_edge.convert.to_pyreft import to_pyreft
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import load_manifest, save_manifest
from reft_edge.model.places import Place
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.onnx_runtime import ONNX_BFLOAT16, ort_value
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.adapter.test_algebra import LAYERS, D, make_adapter
from tests.adapter.test_merging import adapters, same_edit
from tests.helpers.torch_reference import logits as torch_logits

RANK = 3
BASE = Base("tiny", "0" * 16, D, LAYERS)
ROTATED = ("loreft", "direft", "consreft", "lobireft")
KINDS = (*ROTATED, "noreft", "nodireft")
CLASS = {kind: f"<class 'pyreft.interventions.{kind.capitalize()}Intervention'>" for kind in KINDS}
ASKED = Asked("f3+l2", "linear", raw=True)


# ---- pyreft ----


class Rotate(torch.nn.Module):
    """What pyreft parametrises: a weight [d, r]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(D, RANK)))


def state_of(kind: str, bias: bool = False) -> tuple[OrderedDict, dict[str, np.ndarray]]:
    """The tensors that pyreft 0.1.0 would store for a random intervention, and the same by our names."""
    rotate = torch.nn.utils.parametrizations.orthogonal(Rotate())
    with torch.no_grad():
        original = rotate.parametrizations.weight.original
        original += torch.randn(D, RANK).tril(-1)  # off the chart's origin, as training moves it
    linear = torch.nn.Linear(D, RANK)
    R = rotate.weight.detach().T.numpy()
    W, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    scalars = {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D)}
    rotation = {f"rotate_layer.{name}": tensor for name, tensor in rotate.state_dict().items()}
    source = {f"learned_source.{name}": tensor for name, tensor in linear.state_dict().items()}
    if kind == "loreft":
        return OrderedDict(linear.state_dict() | {"rotate_layer": rotate.weight.data}), {
            "R": R,
            "W": W,
            "b": b,
        }
    if kind == "direft":
        return OrderedDict(scalars | rotation | source), {"R": R, "W": W, "b": b}
    if kind in ("consreft", "lobireft"):
        constant = torch.rand(RANK)
        return OrderedDict(scalars | {"learned_source": constant} | rotation), {"R": R, "b": constant.numpy()}
    projection = torch.nn.Linear(D, RANK, bias=bias)
    stored = {f"proj_layer.{name}": tensor for name, tensor in projection.state_dict().items()}
    ours = {"W1": W, "b": b, "W2": projection.weight.detach().numpy()}
    if bias and kind == "noreft":
        ours["b2"] = projection.bias.detach().numpy()
    return OrderedDict(scalars | stored | source), ours


def key(layer: int, number: int, component: str = "block_output") -> str:
    return f"layer_{layer}_comp_{component}_unit_pos_nunit_1#{number}"


def write_pyreft(folder: Path, kind: str, tied: bool = True, bias: bool = False, name=key) -> Adapter:
    """A folder as `ReftModel.save` writes it; returns our adapter with the same parameters."""
    folder.mkdir()
    layers, groups = (0, 2), 1 if tied else 2
    parts, keys = {}, []
    for number in range(groups):
        for layer in layers:
            state, parts[layer, number] = state_of(kind, bias)
            keys.append(name(layer, number))
            torch.save(state, folder / f"intkey_{keys[-1]}.bin")
    described = {
        "intervention_types": [CLASS[kind]] * len(keys),
        "intervention_dimensions": [D] * len(keys),
        "representations": [
            [layer, "block_output", "pos", 1, RANK, *[None] * 9] for _ in range(groups) for layer in layers
        ],
        "sorted_keys": keys,
        "mode": "parallel",
    }
    (folder / "config.json").write_text(json.dumps(described))
    names = parts[0, 0]
    tensors = {
        name: np.stack(
            [np.stack([parts[layer, number][name] for number in range(groups)]) for layer in layers]
        )
        for name in names
    }
    config = make_adapter(
        kind, rank=RANK, positions="f3+l2", tied=tied, prompt_format="raw", add_bias="b2" in names
    ).config
    return Adapter(replace(config, base_name="tiny"), tensors)


def read(folder: Path, asked: Asked = ASKED, notes: list[str] | None = None) -> Adapter:
    return from_pyreft(folder, lambda: BASE, asked, [].append if notes is None else notes.append)


def asked_for(kind: str, **changes) -> Asked:
    return replace(ASKED, act_fn=None if kind in ("consreft", "lobireft") else "linear", **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_every_class_of_pyreft(tmp_path, kind, tied, bare):
    torch.manual_seed(0)
    expected = write_pyreft(tmp_path / "saved", kind, tied, bias=tied)
    asked = asked_for(kind)
    if bare:  # as ReftTrainer writes it: in a subfolder, without a config.json, with a file for the base's parameters
        folder = tmp_path / "checkpoint-9/intervenable_model"
        folder.parent.mkdir()
        (tmp_path / "saved").rename(folder)
        (folder / "config.json").unlink()
        torch.save({}, folder / "pytorch_model.bin")
        asked = replace(asked, intervention=kind)
    found = read(tmp_path / ("checkpoint-9" if bare else "saved"), asked)
    assert replace(found.config, training={}) == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, atol=1e-6)


NAMES = {
    "dots": lambda layer, number: f"layer.{layer}.comp.block_output.unit.pos.nunit.1#{number}",
    "repr": lambda layer, number: f"layer.{layer}.repr.block_output.unit.pos.nunit.1#{number}",
    "path": lambda layer, number: f"comp_model_layers[{layer}]_output_unit_pos_nunit_1#{number}",
    "path with dots": lambda layer, number: f"comp.model.layers[{layer}].output.unit.pos.nunit.1#{number}",
    "gpt2": lambda layer, number: f"comp_transformer_h[{layer}]_output_unit_pos_nunit_1#{number}",
}
PARTS = {
    "attention": lambda layer, number: key(layer, number, "attention_output"),
    "mlp": lambda layer, number: f"comp_model_layers[{layer}]_mlp_output_unit_pos_nunit_1#{number}",
}


@pytest.mark.parametrize("name", [*NAMES, *PARTS])
def test_every_name_that_files_have_had(tmp_path, name):
    expected = write_pyreft(tmp_path / "saved", "loreft", tied=False, name=(NAMES | PARTS)[name])
    found = read(tmp_path / "saved")
    assert found.config.component == (name if name in PARTS else "block")
    assert np.array_equal(found.tensors["R"], expected.tensors["R"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_pyreft_does_not_store_is_asked_for(tmp_path, kind):
    write_pyreft(tmp_path / "saved", kind)
    asked = asked_for(kind)
    for option, changes in {
        "--positions": {"positions": None},
        "--chat": {"raw": None},
        "--act-fn": {"act_fn": None},
        "--intervention": {},
    }.items():
        if option == "--intervention":
            (tmp_path / "saved/config.json").unlink()
        if (option == "--act-fn" and asked.act_fn is None) or (
            option == "--intervention" and kind in ("loreft", "direft")
        ):
            read(tmp_path / "saved", asked)
            continue
        with pytest.raises(ReftEdgeError, match=option):
            read(tmp_path / "saved", replace(asked, **changes))
    with pytest.raises(ReftEdgeError, match="--model MODEL"):
        convert(
            str(tmp_path / "saved"),
            tmp_path / "x.safetensors",
            Given(None, None, "f3+l2", "linear", kind, True),
        )


def test_positions_must_fit_the_interventions(tmp_path):
    write_pyreft(tmp_path / "one", "loreft", tied=True)
    write_pyreft(tmp_path / "two", "loreft", tied=False)
    assert read(tmp_path / "one").config.tied
    assert not read(tmp_path / "two").config.tied
    assert not read(tmp_path / "one", replace(ASKED, positions="l2")).config.tied
    assert read(tmp_path / "two", replace(ASKED, positions="f3+l2|gen")).config.spans[1].on_generated
    for folder, positions in (("two", "l2"), ("two", "f1+l1+gen"), ("one", "f3|l2")):
        with pytest.raises(ReftEdgeError, match="interventions a layer, but positions"):
            read(tmp_path / folder, replace(ASKED, positions=positions))


def test_the_last_token_is_spoken_of_where_it_matters(tmp_path):
    write_pyreft(tmp_path / "saved", "loreft")
    for positions, count in (("f3+l2", 1), ("all+gen", 0)):
        notes: list[str] = []
        read(tmp_path / "saved", replace(ASKED, positions=positions), notes)
        assert len(notes) == count
    assert "ReftSupervisedDataset" in convert_notes(tmp_path / "saved")


def convert_notes(folder: Path) -> str:
    notes: list[str] = []
    read(folder, ASKED, notes)
    return " ".join(notes)


@pytest.mark.parametrize("kind", ROTATED)
@pytest.mark.parametrize("damage", ["zeros", "bfloat16"])
def test_a_rotation_that_is_none_is_carried_without_one(tmp_path, kind, damage):
    """R is zero where pyreft's weight decay has reached the parametrisation's signs."""
    expected = write_pyreft(tmp_path / "saved", kind)
    name = "rotate_layer" if kind == "loreft" else "rotate_layer.parametrizations.weight.original"
    for path in (tmp_path / "saved").glob("*.bin"):
        state = torch.load(path, weights_only=True)
        if damage == "zeros" and kind != "loreft":
            state[name].diagonal().mul_(0.9)
        else:
            state[name] = state[name] * 0 if damage == "zeros" else state[name].bfloat16()
            if kind != "loreft":
                base = "rotate_layer.parametrizations.weight.0.base"
                state[base] = state[base].bfloat16()
        torch.save(state, path)
    notes: list[str] = []
    found = read(tmp_path / "saved", asked_for(kind), notes)
    assert found.config.intervention == ("noreft" if kind in ("loreft", "consreft") else "nodireft")
    assert "R is not orthonormal" in notes[0]
    assert ("weight decay" in notes[0]) == (damage == "zeros")
    if damage == "zeros":
        assert not found.tensors["W2"].any()
    else:
        same_edit(fold(found), fold(expected), 0, 10, atol=0.3)


def change(path: Path, **changes) -> None:
    state = torch.load(path, weights_only=True)
    state |= changes
    torch.save({name: value for name, value in state.items() if value is not None}, path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(folder: Path) -> Path:
    return folder / f"intkey_{key(0, 0)}.bin"


def rewrite_zip(path: Path, compression: int = zipfile.ZIP_STORED, extra: int = 0) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        for number in range(extra):
            archive.writestr(f"{number}", "")


class Harm:
    """Unpickled, this would run a command."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


BAD_PYREFT = {
    "not a zip": (lambda f: first(f).write_bytes(b"\x80\x02}q\x00."), "zip format"),
    "truncated": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-30]), "zip format"),
    "compressed": (lambda f: rewrite_zip(first(f), zipfile.ZIP_DEFLATED), "compressed zip"),
    "many entries": (lambda f: rewrite_zip(first(f), extra=100), "entries"),
    "code": (lambda f: torch.save({"weight": Harm()}, first(f)), "pickle asks for"),
    "a pickle": (lambda f: first(f).write_bytes(pickle.dumps(Harm())), "zip format"),
    "a list": (lambda f: torch.save([1], first(f)), "operation EMPTY_LIST"),
    "a text": (lambda f: torch.save({"weight": "W"}, first(f)), "not a named tensor"),
    "sparse": (lambda f: change(first(f), weight=torch.eye(RANK, D).to_sparse()), "_rebuild_sparse_tensor"),
    "too large": (lambda f: change(first(f), weight=torch.zeros(200, 10 * D)), "at most, by the shapes"),
    "expanded": (lambda f: change(first(f), weight=torch.zeros(1).expand(1 << 20, 1 << 12)), "claims"),
    "a shape": (lambda f: change(first(f), weight=torch.zeros(RANK, D + 1)), "weight of a loreft is"),
    "another rank": (
        lambda f: torch.save(
            {"weight": torch.zeros(1, D), "bias": torch.zeros(1), "rotate_layer": torch.zeros(D, 1)}, first(f)
        ),
        "ranks",
    ),
    "rank 0": (
        lambda f: [
            torch.save(
                {"weight": torch.zeros(0, D), "bias": torch.zeros(0), "rotate_layer": torch.zeros(D, 0)}, path
            )
            for path in f.glob("*.bin")
        ],
        "rank 0",
    ),
    "negated": (
        lambda f: change(first(f), bias=torch.imag(torch.ones(RANK, dtype=torch.cfloat).conj())),
        "negative bit",
    ),
    "missing": (lambda f: change(first(f), bias=None), "lacks bias"),
    "unexpected": (lambda f: change(first(f), other=torch.zeros(1)), "unexpected tensors"),
    "nan": (lambda f: change(first(f), bias=torch.full((RANK,), float("nan"))), "NaN"),
    "a file gone": (lambda f: first(f).unlink(), "which its config.json names"),
    "a file too many": (
        lambda f: shutil.copy(first(f), f / f"intkey_{key(3, 0)}.bin"),
        "which its config.json does not name",
    ),
    "a hole": (
        lambda f: (first(f).rename(f / f"intkey_{key(0, 1)}.bin"), (f / "config.json").unlink()),
        "numbered from 0",
    ),
    "a strange name": (lambda f: (f / "intkey_x.bin").touch(), "no output of a block"),
    "another component": (
        lambda f: (f / f"intkey_{key(1, 0, 'block_input')}.bin").touch(),
        "block_input; only block_output",
    ),
    "two components": (
        lambda f: (
            (f / "config.json").unlink(),
            (f / f"intkey_{key(1, 0, 'mlp_output')}.bin").touch(),
        ),
        "block and the mlp",
    ),
    "heads": (
        lambda f: (f / "intkey_layer_1_comp_block_output_unit_h_pos_nunit_1#0.bin").touch(),
        "only single positions",
    ),
    "no files": (lambda f: [path.unlink() for path in f.glob("*.bin")], "holds no intkey"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "not the config.json"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 100_000), "not the config.json"),
    "another json": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "not the config.json",
    ),
    "a foreign class": (
        lambda f: edit_config(f, intervention_types=["<class 'os.Evil'>"] * 2),
        "class Evil",
    ),
    "mixed": (
        lambda f: edit_config(f, intervention_types=[CLASS["loreft"], CLASS["direft"]]),
        "mixes",
    ),
    "trained base": (
        lambda f: torch.save({"classifier.weight": torch.zeros(2, 2)}, f / "pytorch_model.bin"),
        "classifier.weight",
    ),
    "a large trained base": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"0" * (1 << 21)),
        "trained parameters of the base",
    ),
}


@pytest.mark.parametrize("damage", BAD_PYREFT)
def test_a_bad_folder_is_refused_by_name(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    write_pyreft(tmp_path / "saved", "loreft")
    spoil, message = BAD_PYREFT[damage]
    spoil(tmp_path / "saved")
    with pytest.raises(ReftEdgeError, match=message):
        read(tmp_path / "saved")
    assert not Path("harmed").exists()


def test_a_small_tensor_file_cannot_claim_much(tmp_path):
    """One stored number, spread over a shape that the adapter's may be."""
    torch.save({"weight": torch.zeros(1, dtype=torch.int8).expand(4096, 4096)}, tmp_path / "x.bin")
    with pytest.raises(ReftEdgeError, match="more than the file holds"):
        read_tensors(tmp_path / "x.bin", 1 << 30)


def test_an_unlike_option_is_refused(tmp_path):
    write_pyreft(tmp_path / "saved", "consreft")
    with pytest.raises(ReftEdgeError, match=r"config\.json says consreft"):
        read(tmp_path / "saved", replace(ASKED, act_fn=None, intervention="lobireft"))
    with pytest.raises(ReftEdgeError, match="has no activation function"):
        read(tmp_path / "saved", replace(ASKED, act_fn="relu"))
    write_pyreft(tmp_path / "other", "loreft")
    with pytest.raises(ReftEdgeError, match="unknown act_fn 'nothing'"):
        read(tmp_path / "other", replace(ASKED, act_fn="nothing"))
    (tmp_path / "saved/config.json").unlink()
    with pytest.raises(ReftEdgeError, match="is none of"):
        read(tmp_path / "saved", replace(ASKED, intervention="lora"))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 8))
def test_no_damaged_tensor_file_gets_through(tmp_path_factory, seed, count):
    """Random bytes changed: tensors of the right shapes or a ReftEdgeError, nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "x.bin"
    torch.manual_seed(0)
    torch.save(state_of("direft")[0], path)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for _ in range(count):
        content[random.integers(len(content))] = random.integers(256)
    path.write_bytes(content)
    try:
        tensors = read_tensors(path, 8 * (D * D + 3 * D * RANK))
    except ReftEdgeError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 8 * (D * D + 3 * D * RANK)


def test_groups_that_leave_each_other_out_do_not_overlap(tmp_path):
    for number, positions in enumerate(("all-f1|f1", "f7-f2|f2", "all-f3-l3|f3+l3", "l9-l2|l2")):
        to_pyreft(make_adapter("loreft", positions=positions), tmp_path / str(number))
    for positions in ("all-f1|f2", "all-f3-l2|f3+l3", "f7-f2|f3", "all-f1|all-l1"):
        with pytest.raises(ReftEdgeError, match="overlap"):
            to_pyreft(make_adapter("loreft", positions=positions), tmp_path / "none")


def meet(one: Span, other: Span) -> bool:
    """Whether both gates are open at one token of some row."""
    t = np.arange(60)
    return bool((active(one, t, 40) & active(other, t, 40)).any())


@settings(max_examples=60)
@given(adapter=adapters, n=st.integers(0, 18))
def test_to_pyreft_and_back(tmp_path_factory, adapter, n):
    folder = tmp_path_factory.mktemp("there") / "saved"
    spans = adapter.config.spans
    together = [(one, other) for one, other in itertools.combinations(spans, 2) if meet(one, other)]
    if together:
        with pytest.raises(ReftEdgeError, match="overlap"):
            to_pyreft(adapter, folder)
        return
    to_pyreft(adapter, folder)
    kind = json.loads((folder / "config.json").read_text())["intervention_types"][0]
    sourceless = "Consreft" in kind or "Lobireft" in kind
    again = read(folder, Asked(adapter.config.positions, None if sourceless else "linear", raw=False))
    assert again.config.spans == spans
    same_edit(fold(again), fold(adapter), n, n, atol=2e-3)


def test_what_pyrefts_reload_cannot_carry_is_refused(tmp_path):
    for adapter, message in (
        (make_adapter("loreft", act_fn="relu"), "with linear in place of relu"),
        (make_adapter("loreft", labels=("a", "b"), pooling="cls"), "classification head"),
        (make_adapter("loreft", positions="f1+l1|all"), "overlap"),
        (make_adapter("loreft", positions="f1+gen4"), "it cannot stop after the first ones"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            to_pyreft(adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    to_pyreft(make_adapter("loreft"), tmp_path / "out")
    to_pyreft(make_adapter("direft", 1), tmp_path / "out")  # a folder of ours is replaced
    write_pyreft(tmp_path / "theirs", "loreft")
    with pytest.raises(ReftEdgeError, match="not written by reft-edge"):
        to_pyreft(make_adapter("loreft"), tmp_path / "theirs")


# ---- control vectors ----


def write_theirs(path: Path, directions: dict[int, np.ndarray], architecture: str = "controlvector") -> None:
    """As repeng 0.4.0's export_gguf does."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    writer.add_array("notes", ["of", "some", "kind"])
    for layer, vector in directions.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_directions(layers=(3, 1), seed=0) -> dict[int, np.ndarray]:
    random = np.random.default_rng(seed)
    return {layer: random.normal(size=D).astype(np.float32) for layer in layers}


def test_an_adapter_without_any_direction_is_refused(tmp_path):
    adapter = make_adapter("steering", positions="all+gen", tied=True, layers=(0,))
    adapter.tensors["v"][:] = 0
    with pytest.raises(ReftEdgeError, match="adds nothing"):
        to_control_vector(adapter, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_direction_n_is_the_output_of_block_n(tmp_path):
    directions = random_directions()
    write_theirs(tmp_path / "v.gguf", directions)
    adapter = from_control_vector(tmp_path / "v.gguf", BASE, raw=True)
    assert adapter.config.layers == (1, 3)
    assert adapter.config.positions == "all+gen"
    assert len(adapter.config.spans) == 1
    for layer, vector in directions.items():
        index = adapter.config.layers.index(layer)
        assert np.array_equal(adapter.tensors["v"][index, 0, 0] * adapter.tensors["alpha"][index, 0], vector)
    elsewhere = from_control_vector(tmp_path / "v.gguf", BASE, raw=False, positions="f2|l2+gen")
    assert len(elsewhere.config.spans) == 2
    assert np.array_equal(elsewhere.tensors["v"][0, 0], elsewhere.tensors["v"][0, 1])


@given(seed=st.integers(0, 99), layers=st.sets(st.integers(1, LAYERS - 1), min_size=1))
def test_control_vectors_come_back(tmp_path_factory, seed, layers):
    path = tmp_path_factory.mktemp("vectors") / "v.gguf"
    directions = random_directions(sorted(layers), seed)
    write_control_vector(path, directions, "tiny")
    reader = gguf.GGUFReader(str(path))
    assert {tensor.name for tensor in reader.tensors} == {f"direction.{layer}" for layer in layers}
    architecture = reader.get_field("general.architecture")
    assert bytes(architecture.parts[architecture.data[0]]) == b"controlvector"
    adapter = from_control_vector(path, BASE, raw=True)
    again = constant_edit(adapter)
    assert again.keys() == directions.keys()
    assert all(np.array_equal(again[layer], directions[layer]) for layer in layers)


def test_any_constant_edit_is_a_control_vector():
    lobireft = make_adapter("lobireft", 1, positions="all+gen", tied=True, layers=(1, 2))
    steering = make_adapter("steering", 2, positions="all+gen", tied=True, layers=(2, 3))
    edit = concat([scale(fold(lobireft), 0.5), fold(steering)])
    vectors = constant_edit(unfold(edit, BASE, "chat", {}))
    R, b = lobireft.tensors["R"], lobireft.tensors["b"]
    v = steering.tensors["v"][:, 0, 0] * steering.tensors["alpha"][:, 0]
    expected = {1: 0.5 * b[0, 0] @ R[0, 0], 2: 0.5 * b[1, 0] @ R[1, 0] + v[0], 3: v[1]}
    assert vectors.keys() == expected.keys()
    for layer, vector in expected.items():
        np.testing.assert_allclose(vectors[layer], vector, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (make_adapter("loreft", positions="all+gen", layers=(1,)), "depends on the hidden state"),
        (make_adapter("steering", positions="l3+gen", layers=(1,)), "acts at l3\\+gen"),
        (make_adapter("steering", positions="all+gen3", tied=True, layers=(1,)), "acts at all\\+gen3"),
        (make_adapter("steering", positions="all+gen-f1", tied=True, layers=(1,)), "acts at all\\+gen-f1"),
        (make_adapter("steering", positions="all", layers=(1,)), "one vector to the prompt and another"),
        (make_adapter("steering", positions="all+gen", layers=(1,)), "one vector to the prompt and another"),
        (make_adapter("steering", positions="all+gen", tied=True, layers=(0,)), "refuses direction.0"),
        (
            make_adapter("steering", positions="all+gen", tied=True, layers=(1,), component="mlp"),
            "edits the mlp",
        ),
        (
            make_adapter("steering", positions="all", layers=(1,), labels=("a", "b"), pooling="cls"),
            "classification head",
        ),
    ],
)
def test_what_no_control_vector_says_is_refused(adapter, message):
    with pytest.raises(ReftEdgeError, match=message):
        constant_edit(adapter)


def patched(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


BAD_GGUF = {
    "another file": (lambda p: p.write_bytes(b"PK\3\4" + bytes(100)), "not a GGUF"),
    "empty": (lambda p: p.write_bytes(b""), "not a GGUF"),
    "version": (lambda p: patched(p, b"GGUF\3\0\0\0", b"GGUF\1\0\0\0"), "version 1"),
    "big-endian": (lambda p: patched(p, b"GGUF\3\0\0\0", b"GGUF\0\0\0\3"), "little-endian"),
    "many tensors": (lambda p: patched(p, b"GGUF\3\0\0\0\2", b"GGUF\3\0\0\0\xff\xff\xff"), "claims"),
    "a long text": (
        lambda p: patched(
            p, struct.pack("<Q", 13) + b"controlvector", struct.pack("<Q", 2**62) + b"controlvector"
        ),
        "a name of",
    ),
    "architecture": (lambda p: write_theirs(p, random_directions(), "llama"), "architecture 'llama'"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[: -4 * D]), "truncated"),
    "another size": (lambda p: write_theirs(p, {1: np.zeros(D + 1, np.float32)}), "shape \\[13\\]"),
    "half": (lambda p: write_theirs(p, {1: np.zeros(D, np.float16)}), "GGML type 1"),
    "a matrix": (lambda p: write_theirs(p, {1: np.zeros((D, D), np.float32)}), "shape \\[12, 12\\]"),
    "too deep": (lambda p: write_theirs(p, random_directions((LAYERS,))), "steers block 4"),
    "other tensors": (lambda p: patched(p, b"direction.1", b"direktion.1"), "direktion.1"),
    "twice": (lambda p: patched(p, b"direction.3", b"direction.1"), "twice"),
    "nothing": (lambda p: write_theirs(p, {}), "no direction"),
    "nan": (lambda p: write_theirs(p, {1: np.full(D, np.nan, np.float32)}), "NaN"),
}


@pytest.mark.parametrize("damage", BAD_GGUF)
def test_a_bad_control_vector_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "v.gguf"
    write_theirs(path, random_directions())
    spoil, message = BAD_GGUF[damage]
    spoil(path)
    with pytest.raises(ReftEdgeError, match=message):
        read_control_vector(path, D, LAYERS)


@given(seed=st.integers(0, 10**6), count=st.integers(0, 8), cut=st.integers(0, 600))
def test_no_damaged_control_vector_gets_through(tmp_path_factory, seed, count, cut):
    path = tmp_path_factory.mktemp("damaged") / "v.gguf"
    write_theirs(path, random_directions())
    content = bytearray(path.read_bytes())[: max(1, path.stat().st_size - cut)]
    random = np.random.default_rng(seed)
    for _ in range(count):
        content[random.integers(len(content))] = random.integers(256)
    path.write_bytes(content)
    try:
        directions = read_control_vector(path, D, LAYERS)
    except ReftEdgeError:
        return
    assert directions
    assert all(vector.shape == (D,) and 0 <= layer < LAYERS for layer, vector in directions.items())


# ---- .onnx_adapter ----


@pytest.mark.parametrize("name", ["first", "everywhere"])
def test_a_packed_adapter_comes_back(device_folder, tmp_path, name):
    folder, source = device_folder / "export", device_folder / f"{name}.safetensors"
    packed, again = tmp_path / "task.onnx_adapter", tmp_path / "again.safetensors"
    convert(str(source), packed, Given(folder=folder))
    convert(str(packed), again, Given(folder=folder, raw=False))
    config, original = load_adapter(again).config, load_adapter(source).config
    assert config.intervention == "nodireft"
    assert (config.positions, config.layers, config.rank) == (
        original.positions,
        original.layers,
        original.rank,
    )
    model = SteeredModel(folder, device="cpu")
    model.load_adapter(source, "original")
    model.load_adapter(again, "again")
    ids = np.random.default_rng(0).integers(2, 320, (1, 21)).tolist()
    assert np.abs(model.logits(ids, "original")[0] - model.logits(ids, "again")[0]).max() <= 1e-4
    assert np.abs(model.logits(ids, "original")[0] - model.logits(ids)[0]).max() > 0.1


@pytest.mark.parametrize(("float_type", "bits"), [("fp16", 11), ("bf16", 8)])
def test_a_packed_adapter_of_16_bits_comes_back(device_folder, tmp_path, float_type, bits):
    (tmp_path / "half").mkdir()
    manifest = replace(load_manifest(device_folder / "export"), float_type=float_type)
    save_manifest(manifest, tmp_path / "half")
    packed = tmp_path / "task.onnx_adapter"
    for name in ("first", "everywhere"):
        pack_adapter(device_folder / f"{name}.safetensors", tmp_path / "half", packed)
        edit = fold(from_onnx_adapter(packed, manifest, raw=False))
        original = fold(load_adapter(device_folder / f"{name}.safetensors"))
        assert edit.gates == original.gates
        for place, part in original.places.items():
            found = edit.places[place]
            for mine, theirs in ((found.A, part.A), (found.b, part.b), (found.B, part.B)):
                np.testing.assert_allclose(mine, theirs, rtol=0.5**bits, atol=1e-7)


def test_a_value_in_bfloat16_has_memory_of_its_own():
    """An AdapterFormat keeps ONNX Runtime's part of a value, and not the array behind it."""
    arrays = [np.full(size, 1.5, np.float32) for size in (1, 64, 5000) for _ in range(50)]
    values = [onnxruntime.OrtValue(ort_value(array, bf16=True)._get_c_value()) for array in arrays]
    for size in (1, 64, 5000):  # takes what was freed
        arrays += [np.full(size, np.nan, np.float32) for _ in range(200)]
    for value in values:
        assert value.element_type() == ONNX_BFLOAT16
        assert set(_array(value).ravel()) == {np.float32(1.5)}


def packed_parameters(path: Path, **changes) -> None:

    values = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    arrays = {name: np.array(value.numpy()) for name, value in values.items()}
    arrays |= {name.replace("__", "."): value for name, value in changes.items()}
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters(
        {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in arrays.items()
            if array is not None
        }
    )
    written.export_adapter(str(path))


A = "reft__layers__0__A"
COLUMNS = "reft__layers__0__columns"
BAD_PACKED = {
    "not one": (lambda p: p.write_bytes(b"x" * 100), "not a usable"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "not a usable"),
    "no gates": (lambda p: packed_parameters(p, reft__first=None), "no reft.first"),
    "gates apart": (lambda p: packed_parameters(p, reft__last=np.zeros((1, 1, 9), np.int64)), "reft.last is"),
    "below zero": (lambda p: packed_parameters(p, reft__last=np.full((1, 1, 2), -1)), "below zero"),
    "too many generated": (
        lambda p: packed_parameters(p, reft__after=np.full((1, 1, 2), 10**8)),
        "no position spec says",
    ),
    "another size": (lambda p: packed_parameters(p, **{A: np.zeros((1, 65, 3), np.float32)}), "0.A is"),
    "columns": (lambda p: packed_parameters(p, **{COLUMNS: np.full(6, 7)}), "points beyond"),
    "columns in halves": (
        lambda p: packed_parameters(p, **{COLUMNS: np.full(6, 0.5, np.float32)}),
        "expected whole numbers",
    ),
    "no number of tokens": (
        lambda p: packed_parameters(p, reft__first=np.full((1, 1, 2), np.nan, np.float32)),
        "expected whole numbers",
    ),
    "many gates": (
        lambda p: packed_parameters(
            p,
            reft__first=np.arange(1, 5001).reshape(1, 1, -1),
            reft__last=np.zeros((1, 1, 5000), np.int64),
            reft__after=np.zeros((1, 1, 5000), np.int64),
            reft__scale=np.ones((1, 1, 5000), np.float32),
        ),
        "5,000 gates",
    ),
    "a part gone": (lambda p: packed_parameters(p, reft__layers__0__b=None), "lacks reft.layers.0.b"),
    "other ports": (lambda p: packed_parameters(p, lora__A=np.zeros(1, np.float32)), "lora.A"),
    "nan": (lambda p: packed_parameters(p, **{A: np.full((1, 64, 6), np.nan, np.float32)}), "NaN"),
}


@pytest.mark.parametrize("damage", BAD_PACKED)
def test_a_bad_packed_adapter_is_refused_by_name(device_folder, tmp_path, damage):
    path = tmp_path / "task.onnx_adapter"
    pack_adapter(device_folder / "first.safetensors", device_folder / "export", path)
    spoil, message = BAD_PACKED[damage]
    spoil(path)
    with pytest.raises(ReftEdgeError, match=message):
        from_onnx_adapter(path, load_manifest(device_folder / "export"), raw=True)


def test_what_padding_would_blow_up_is_refused():
    """One group of rank 2,000 at one place, 64 groups at another: 4 GB once every group has the largest rank."""
    gates = tuple(Gate(Span(first=number + 1, last=0)) for number in range(64))
    matrix, few = np.ones((2000, 2000), np.float32), np.ones((2000, 64), np.float32)
    places = {
        Place(0): LayerEdit(few, few[0], np.ascontiguousarray(few.T), np.arange(64)),
        Place(1): LayerEdit(matrix, matrix[0], matrix, np.zeros(2000, np.int64)),
    }
    with pytest.raises(ReftEdgeError, match=r"takes .* bytes as float32; at most"):
        unfold(Edit(2000, gates, places), Base("b", "0", 2000, 2), "raw", {})


# ---- the command ----


def call(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


def test_the_command_asks_and_converts(device_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, hf, folder = device_folder / "first.safetensors", device_folder / "hf", device_folder / "export"
    out = call("convert", source, "-o", "pyreft")
    assert "unit_locations for #0 at f3, #1 at l3" in out
    assert "wrote pyreft (pyreft): loreft of rank 3 at 3 layers, positions f3+l3" in out
    options = ("--positions", "f3+l3", "--act-fn", "linear", "--chat")
    assert "--model MODEL" in call("convert", "pyreft", "-o", "a.safetensors", *options, code=1)
    for base in (("--model", hf), ("--for", folder)):
        shown = json.loads(
            call("convert", "pyreft", "-o", "a.safetensors", *base, *options, "--json").splitlines()[-1]
        )
        assert (shown["from"], shown["to"], shown["intervention"]) == ("pyreft", "reft-edge", "loreft")
        found, original = load_adapter("a.safetensors"), load_adapter(source)
        assert found.config.base_fingerprint == original.config.base_fingerprint
        for name, tensor in original.tensors.items():
            np.testing.assert_allclose(found.tensors[name], tensor, atol=1e-6)
    before = Path("a.safetensors").read_bytes()
    call("convert", "pyreft", "-o", "a.safetensors", "--for", folder, *options[:2], "--raw", code=1)
    assert Path("a.safetensors").read_bytes() == before
    assert "not both" in call(
        "convert", "pyreft", "-o", "a.safetensors", "--for", folder, "--model", hf, *options, code=1
    )


def test_the_command_with_control_vectors_and_packed_files(device_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = device_folder / "export"
    base = load_adapter(device_folder / "first.safetensors").config
    vector = np.ones(base.hidden_size, np.float32)
    write_theirs(Path("v.gguf"), {1: vector})
    assert "--chat" in call("convert", "v.gguf", "-o", "v.safetensors", "--for", folder, code=1)
    out = call("convert", "v.gguf", "-o", "v.safetensors", "--for", folder, "--chat")
    assert "control vectors act on every token" in out
    assert "steering of rank 1 at 1 layers, positions all+gen, tied" in out
    call("convert", "v.safetensors", "-o", "w.gguf")
    for needless in (("--positions", "l3"), ("--act-fn", "relu"), ("--raw",), ("--chat",), ("--for", folder)):
        assert needless[0] in call("convert", "v.safetensors", "-o", "x.gguf", *needless, code=1)
    assert not Path("x.gguf").exists()
    assert np.array_equal(read_control_vector(Path("w.gguf"), base.hidden_size, base.num_layers)[1], vector)
    assert "--for DIR" in call("convert", "v.safetensors", "-o", "v.onnx_adapter", code=1)
    call("convert", "v.safetensors", "-o", "v.onnx_adapter", "--for", folder)
    assert "--for DIR" in call("convert", "v.onnx_adapter", "-o", "u.safetensors", "--raw", code=1)
    needless = ("--for", folder, "--raw", "--positions", "all")
    assert "leave the option out" in call(
        "convert", "v.onnx_adapter", "-o", "u.safetensors", *needless, code=1
    )
    call("convert", "v.onnx_adapter", "-o", "u.safetensors", "--for", folder, "--raw")
    assert constant_edit(load_adapter("u.safetensors"))[1] == pytest.approx(vector)
    shutil.copy("v.safetensors", "x.safetensors")
    for arguments, message in (
        (("v.safetensors", "-o", "x.safetensors"), "both adapter files"),
        (("v.safetensors", "-o", "x.bin"), "no ending that is known"),
        (("v.gguf", "-o", "w.gguf"), "no adapter file"),
        (("nothing.gguf", "-o", "x.safetensors", "--raw", "--for", folder), "there is no file"),
        (("no such folder", "-o", "x.safetensors"), "cannot convert"),
        (("nothing.safetensors", "-o", "x"), "cannot read adapter"),
    ):
        assert message in call("convert", *arguments, code=1)


def test_an_adapter_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    write_pyreft(tmp_path / "saved", "consreft")
    asked_for_files = []

    def snapshot_download(name, revision=None, allow_patterns=(), local_files_only=False):
        if local_files_only:
            if name != "someone/cached":
                raise OSError("no copy")
        else:
            assert revision == "1234", "what is fetched is what was looked at"
            asked_for_files.extend(allow_patterns)
        return str(tmp_path / "saved")

    class Api:
        def model_info(self, name, files_metadata, timeout):
            if "slow" in name:
                ended.wait(20)
            if "cached" in name or "else" in name:
                raise ConnectionError("no route to host")
            files = {"config.json": 10, "notes.txt": None}
            if "model" not in name:
                files[f"intkey_{key(0, 0)}.bin"] = 1000
            if "huge" in name:
                files["pytorch_model.bin"] = 1 << 40
            listed = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
            return SimpleNamespace(siblings=listed, sha="1234")

    ended = threading.Event()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("reft_edge.convert.formats.find_base", lambda *given: BASE)
    done = convert("someone/steers", tmp_path / "a.safetensors", Given("m", positions="f3+l2", raw=True))
    assert done.adapter.config.intervention == "consreft"
    assert {"config.json", "*intkey_*.bin", "*pytorch_model.bin", "adapter_config.json"} <= set(
        asked_for_files
    )
    assert not any(name in ("*", "*.bin", "*.py") for name in asked_for_files)
    for name, message in (("some/model", "holds no intkey"), ("some/huge", "bytes to download")):
        asked_for_files.clear()
        with pytest.raises(ReftEdgeError, match=message):
            convert(name, tmp_path / "a.safetensors", Given("m", positions="f3+l2", raw=True))
        assert not asked_for_files
    given = Given("m", positions="f3+l2", raw=True)
    convert("someone/cached", tmp_path / "a.safetensors", given)
    monkeypatch.setattr("reft_edge.model.hub.LOOK_UP", 0.1)
    for name, message in (
        ("someone/else", "no route to host"),
        ("someone/slow", "the look-up .* takes longer"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            convert(name, tmp_path / "a.safetensors", given)
    ended.set()
    assert not asked_for_files, "without the list of files nothing is downloaded"


def test_merged_adapters_run_as_their_sources_at_once(device_folder, tiny_model, tmp_path):
    """End to end: the merged file against both files, in ONNX Runtime and PyTorch; its groups overlap."""
    folder, merged = device_folder / "export", tmp_path / "merged.safetensors"
    first, everywhere = device_folder / "first.safetensors", device_folder / "everywhere.safetensors"
    call("merge", f"{first}:0.7", f"{everywhere}:0.3", "-o", merged)
    assert load_adapter(merged).config.positions == "f3|l3|all|gen"
    model = SteeredModel(folder, device="cpu")
    for path in (first, everywhere, merged):
        model.load_adapter(path)
    ids = np.random.default_rng(0).integers(2, 320, (1, 21)).tolist()
    together = model.logits(ids, {"first": 0.7, "everywhere": 0.3})[0]
    assert np.abs(model.logits(ids, "merged")[0] - together).max() <= 1e-4
    assert np.abs(model.logits(ids)[0] - together).max() > 0.1
    with steered(tiny_model, (Interventions.from_adapter(load_adapter(merged)), 1.0)):
        assert np.abs(torch_logits(tiny_model, ids[0]).numpy() - together).max() <= 1e-4
    assert model.generate("Who are you?", {"first": 0.7, "everywhere": 0.3}, max_tokens=16) == model.generate(
        "Who are you?", "merged", max_tokens=16
    )
    packed = tmp_path / "merged.onnx_adapter"
    call("pack", merged, "--for", folder, "-o", packed)
    save_adapter(from_onnx_adapter(packed, load_manifest(folder), raw=False), tmp_path / "again.safetensors")
    model.load_adapter(tmp_path / "again.safetensors", "again")
    assert np.abs(model.logits(ids, "again")[0] - together).max() <= 1e-4


def test_groups_set_apart_train_like_any_positions(device_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Who are you?", "completion": "A fox."}\n' * 4)
    out = tmp_path / "task.safetensors"
    options = ("--max-steps", 2, "--positions", "f1+l1|all", "--rank", 2, "--dtype", "fp32")
    call("train", device_folder / "hf", rows, "-o", out, *options)
    trained = load_adapter(out)
    assert trained.tensors["R"].shape[1] == len(trained.config.spans) == 2
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(out, "task")
    assert np.abs(model.logits([[5, 6, 7]], "task")[0] - model.logits([[5, 6, 7]])[0]).max() > 1e-4


def test_endings_in_any_case_and_a_gguf_of_any_name(device_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = device_folder / "export"
    shutil.copy(device_folder / "first.safetensors", "FIRST.SAFETENSORS")
    packed = call("convert", "FIRST.SAFETENSORS", "--for", folder, "-o", "FIRST.ONNX_ADAPTER")
    assert "(onnx_adapter)" in packed
    call("convert", "FIRST.ONNX_ADAPTER", "--for", folder, "--chat", "-o", "AGAIN.Safetensors")
    assert Path("AGAIN.Safetensors").is_file()
    directions = {1: np.ones(64, np.float32)}
    write_theirs(Path("happy.GGUF"), directions)
    shutil.copy("happy.GGUF", "sha256-abc")
    for source in ("happy.GGUF", "sha256-abc"):
        call("convert", source, "--for", folder, "--raw", "-o", "happy.safetensors")
        assert load_adapter("happy.safetensors").config.intervention == "steering"
    call("convert", "happy.safetensors", "-o", "back.Gguf")
    assert read_control_vector(Path("back.Gguf"), 64, 3).keys() == {1}


def test_a_packed_adapter_is_not_waited_for(device_folder, tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo.onnx_adapter")
    with pytest.raises(ReftEdgeError, match="not a regular file"):
        from_onnx_adapter(tmp_path / "fifo.onnx_adapter", load_manifest(device_folder / "export"), True)


def test_conversions_give_the_same_bytes(device_folder, tmp_path):
    source, folder = device_folder / "first.safetensors", device_folder / "export"
    for ending in (".onnx_adapter", ""):
        contents = set()
        for number in range(3):
            output = tmp_path / f"{number}{ending}"
            convert(str(source), output, Given(folder=folder if ending else None))
            files = sorted(path for path in (output.iterdir() if output.is_dir() else [output]))
            contents.add(tuple((path.name if output.is_dir() else "", path.read_bytes()) for path in files))
        assert len(contents) == 1, ending
