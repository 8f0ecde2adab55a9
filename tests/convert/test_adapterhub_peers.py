"""AdapterHub's adapters against its library `adapters` itself, by logits. Run with `pytest -m peers`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from reft_edge.adapter.file import load_adapter
from reft_edge.convert.formats import Given, convert
from reft_edge.errors import ReftEdgeError
from reft_edge.export import export_model
from reft_edge.model.encoders import load_encoder
from reft_edge.model.loading import load_model
from reft_edge.model.places import PORT_KINDS
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.peers import TOLERANCE, largest, peer, run, steered_logits
from tests.helpers.tiny import make_encoder, make_model
from tests.helpers.torch_reference import logits

pytestmark = pytest.mark.peers
CASES = [
    "0-loreft",
    "1-loreft",
    "2-loreft",
    "3-loreft",
    "4-noreft",
    "5-noreft",
    "6-nodireft",
    "7-nodireft",
    "8-nodireft",
]
PREFIX_ONLY = ["0-loreft", "5-noreft", "8-nodireft"]
NO_PORT = ["8-nodireft"]
"""Activations that no port carries."""


@dataclass(frozen=True)
class Saved:
    """What the library saved for one model and what it computed."""

    source: ModelFolder
    folder: Path

    @property
    def rows(self) -> list[list[int]]:
        return json.loads((self.folder / "prompts.json").read_text())

    def case(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())

    def computed(self, name):
        return dict(np.load(self.folder / f"{name}.npz"))

    def convert(self, name, path, **changes):
        kind = self.case(name)["kind"]
        given = {"model": str(self.source.path), "raw": True} | changes
        given.setdefault("intervention", kind if kind != "loreft" else None)
        convert(str(self.folder / name), path, Given(**given))
        return load_adapter(path)


@pytest.fixture(scope="module")
def adapterhub(tmp_path_factory):
    return peer("adapterhub", tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def saved(request, adapterhub, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = ModelFolder(make_model(folder / "hf", request.param), request.param)
    (folder / "saved").mkdir()
    run(adapterhub, "adapterhub_side.py", source.path, folder / "saved")
    return Saved(source, folder / "saved")


@pytest.fixture(scope="module")
def model(saved):
    return load_model(saved.source)


@pytest.fixture(scope="module")
def exported(saved):
    export_model(saved.source, saved.folder.parent / "export", port_kinds=PORT_KINDS)
    return SteeredModel(saved.folder.parent / "export", device="cpu")


def long_enough(case, row) -> bool:
    """Whether half the row has room for the positions: from there on both libraries edit the same tokens."""
    return len(row) >= 2 * max(case["prefix"], case["suffix"])


@pytest.mark.parametrize("name", CASES)
def test_what_adapterhub_saved_gives_its_logits(saved, model, exported, tmp_path, name):
    adapter = saved.convert(name, tmp_path / "task.safetensors")
    case, computed = saved.case(name), saved.computed(name)
    assert (adapter.config.intervention, adapter.config.tied) == (
        case["kind"],
        case["tied"] and 0 not in (case["prefix"], case["suffix"]),
    )
    assert adapter.config.layers == tuple(range(3) if case["layers"] == "all" else case["layers"])
    rows = [row for row in saved.rows if long_enough(case, row)]
    expected = [computed[f"row{len(row)}"] for row in rows]
    assert largest([logits(model, row).numpy() for row in rows], expected) > 0.1
    assert largest(steered_logits(model, adapter, rows), expected) <= TOLERANCE
    if name not in NO_PORT:
        exported.load_adapter(tmp_path / "task.safetensors", name=name)
        assert largest(exported.logits(rows, name), expected) <= 10 * TOLERANCE


def test_prompts_without_room_for_the_positions_differ(saved, model, tmp_path):
    """AdapterHub's counts are limited to the prompt, ours to half of it."""
    adapter = saved.convert("0-loreft", tmp_path / "task.safetensors")
    case, computed = saved.case("0-loreft"), saved.computed("0-loreft")
    for row in saved.rows:
        off = largest(steered_logits(model, adapter, [row]), [computed[f"row{len(row)}"]])
        assert off <= TOLERANCE if long_enough(case, row) else off > 0.01, len(row)


@pytest.mark.parametrize("name", PREFIX_ONLY)
def test_what_it_computes_with_a_cache_is_carried_where_asked(saved, model, exported, tmp_path, name):
    """Decoding edits each new token with the prefix unit, as if it were a prompt of one token."""
    prompt, computed = saved.rows[-1], saved.computed(name)
    row = prompt + computed["tokens"].tolist()[:-1]

    def answered(adapter):
        with (
            torch.no_grad(),
            steered(model, (Interventions.from_adapter(adapter), 1.0)) as steering,
            steering.prompts(torch.tensor([len(prompt)])),
        ):
            return model(torch.tensor([row])).logits[0, len(prompt) - 1 :].numpy()

    plain = saved.convert(name, tmp_path / "plain.safetensors")
    asked = saved.convert(name, tmp_path / "gen.safetensors", positions=f"{plain.config.positions}+gen")
    assert largest([answered(plain)], [computed["cached"]]) > 0.1
    assert largest([answered(asked)], [computed["cached"]]) <= TOLERANCE
    if name not in NO_PORT:
        exported.load_adapter(tmp_path / "gen.safetensors", name=name)
        found = exported.logits([row], name, [len(prompt)])[0][len(prompt) - 1 :]
        assert largest([found], [computed["cached"]]) <= 10 * TOLERANCE


def test_direft_read_as_noreft_is_another_adapter(saved, model, tmp_path):
    """The folder does not tell them apart, so it must be asked: the library itself reads both as NoReFT."""
    with pytest.raises(ReftEdgeError, match="give --intervention noreft, or nodireft"):
        saved.convert("6-nodireft", tmp_path / "task.safetensors", intervention=None)
    wrong = saved.convert("6-nodireft", tmp_path / "task.safetensors", intervention="noreft")
    row, computed = saved.rows[-1], saved.computed("6-nodireft")
    assert largest(steered_logits(model, wrong, [row]), [computed[f"row{len(row)}"]]) > 0.1
    assert largest([computed["reloaded"]], steered_logits(model, wrong, [row])) <= TOLERANCE


def test_an_encoders_hidden_states_are_its(adapterhub, tmp_path):
    source = ModelFolder(make_encoder(tmp_path / "hf"), "bert")
    (tmp_path / "saved").mkdir()
    run(adapterhub, "adapterhub_side.py", source.path, tmp_path / "saved")
    saved, encoder = Saved(source, tmp_path / "saved"), load_encoder(source)
    for name in CASES:
        adapter = saved.convert(name, tmp_path / "task.safetensors")
        rows = [row for row in saved.rows if long_enough(saved.case(name), row)]
        expected = [saved.computed(name)[f"row{len(row)}"] for row in rows]
        with torch.no_grad(), steered(encoder, (Interventions.from_adapter(adapter), 1.0)):
            found = [encoder(torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]
        assert largest(found, expected) <= TOLERANCE, name
