"""Mixes of adapters: bounded by bytes, and made of the adapters' own weights where a scale is all that differs."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.linear import fold as fold_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime import mixes as mixes_module
from reft_edge.runtime.mixes import Mixes


@pytest.fixture(scope="module")
def model(device_folder):
    return SteeredModel(device_folder / "export", device="cpu")


@pytest.fixture(scope="module")
def edits(device_folder):
    found = {}
    for name in ("first", "everywhere"):
        adapter = load_adapter(device_folder / f"{name}.safetensors")
        for number in range(4):
            tensors = {key: value * np.float32(1 + number) for key, value in adapter.tensors.items()}
            found[f"{name}{number}"] = fold_adapter(Adapter(adapter.config, tensors))
    return found


def weights(edits, names):
    return sum(edits[name].nbytes for name in names)


def test_an_adapter_alone_takes_nothing_more_at_any_scale_on_the_prompt(model, edits):
    mixes = Mixes(model.graph, model.manifest)
    for number in range(40):
        bound = mixes.bind(edits, {"first0": 1 + number / 8})
    assert mixes.size < 1000
    for place, part in edits["first0"].places.items():
        assert bound.prompt[f"{place.port}.A"].data_ptr() == part.A.ctypes.data


def test_mixes_of_the_same_adapters_share_their_weights(model, edits):
    mixes = Mixes(model.graph, model.manifest)
    names = [f"first{number}" for number in range(4)]
    bound = [mixes.bind(edits, dict.fromkeys(names, 1 + number / 8)) for number in range(40)]
    assert mixes.size <= 1.1 * weights(edits, names)
    assert bound[0].edit != bound[1].edit
    assert mixes.bind(edits, dict.fromkeys(names, 1.0)) is bound[0]


@pytest.mark.parametrize("names", [["everywhere0", "everywhere1"], ["first0", "everywhere2", "everywhere3"]])
def test_what_is_kept_stays_in_the_budget(model, edits, names):
    budget = 4 * weights(edits, names)
    mixes = Mixes(model.graph, model.manifest, budget)
    for number in range(50):
        bound = mixes.bind(edits, dict.fromkeys(names, 1 + number / 8))
        assert bound.decode
        assert 0 < mixes.size <= budget
    for number in range(3):
        mixes.bind(edits, {f"first{number}": 1.0, f"everywhere{number}": 0.5})
        assert mixes.size <= budget


def test_a_mix_that_is_too_large_is_refused_and_the_others_stay(model, edits):
    names = list(edits)
    mixes = Mixes(model.graph, model.manifest, weights(edits, names) - 1)
    with pytest.raises(ReftEdgeError, match=r"these 8 adapters take .* MB together; at most .* name fewer"):
        mixes.bind(edits, dict.fromkeys(names, 1.0))
    assert mixes.bind(edits, dict.fromkeys(names[:5], 1.0)).prompt
    assert not mixes.bind(edits, dict.fromkeys(names, 0.0)).prompt


@pytest.mark.parametrize("failing", ["decode_edit", "_own_bytes", "scale"])
def test_a_mix_that_fails_leaves_nothing(model, edits, monkeypatch, failing):
    mixes = Mixes(model.graph, model.manifest)
    kept = mixes.bind(edits, {"everywhere0": 1.0, "everywhere1": 1.0})
    before = mixes.size
    original = getattr(mixes_module, failing)

    def fail(*given):
        raise ReftEdgeError("so scaled, the adapters are not finite")

    monkeypatch.setattr(mixes_module, failing, fail)
    for names in itertools.permutations(edits, 3):
        with pytest.raises(ReftEdgeError, match="so scaled"):
            mixes.bind(edits, dict.fromkeys(names, 2.0))
    with pytest.raises(ReftEdgeError, match="so scaled"):
        mixes.bind(edits, {"everywhere0": 2.0, "everywhere1": 1.0})
    assert mixes.size == before
    monkeypatch.setattr(mixes_module, failing, original)
    assert mixes.bind(edits, {"everywhere0": 1.0, "everywhere1": 1.0}) is kept
    assert mixes.bind(edits, {"everywhere0": 2.0, "everywhere1": 1.0}).decode


def test_scales_beyond_float32_leave_nothing(model, edits):
    mixes = Mixes(model.graph, model.manifest)
    huge = {
        name: replace(
            edit,
            places={place: replace(part, B=part.B * np.float32(1e6)) for place, part in edit.places.items()},
        )
        for name, edit in edits.items()
        if name.startswith("everywhere")
    }
    for names in itertools.permutations(huge, 2):
        with pytest.raises(ReftEdgeError, match="not finite"):
            mixes.bind(huge, dict.fromkeys(names, 9e37))
    assert mixes.size == 0


def test_forgetting_an_adapter_forgets_its_mixes(model, edits):
    mixes = Mixes(model.graph, model.manifest)
    kept = mixes.bind(edits, {"first1": 1.0, "everywhere1": 1.0})
    gone = mixes.bind(edits, {"first0": 1.0, "everywhere0": 1.0})
    mixes.forget("everywhere0")
    assert mixes.bind(edits, {"first0": 1.0, "everywhere0": 1.0}) is not gone
    assert mixes.bind(edits, {"first1": 1.0, "everywhere1": 1.0}) is kept


def test_scaled_mixes_answer_as_their_edits_say(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    for name in ("first", "everywhere"):
        model.load_adapter(device_folder / f"{name}.safetensors")
    rows = [[5, 80, 33, 120, 7, 61, 19, 200]]
    for mix in ({"first": 1.0, "everywhere": 1.0}, {"first": 0.5, "everywhere": -0.25}, {"everywhere": 2.0}):
        expected = int(model.logits(rows, mix)[0][-1].argmax())
        assert model.generate_tokens(rows, mix, 1) == [[expected]] or expected in model.manifest.eos_token_ids


@pytest.mark.parametrize("threads", [0, -1, -3])
def test_fewer_threads_than_one_are_refused(device_folder, threads):
    with pytest.raises(ReftEdgeError, match=f"threads is {threads}; expected 1 or more"):
        SteeredModel(device_folder / "export", device="cpu", threads=threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 2**39}, f"head_size {2**39}"),
        ({"head_size": 2**17}, f"head_size {2**17}"),
        ({"context_length": 2**39}, f"context_length {2**39}"),
        ({"context_length": 2**31}, f"context_length {2**31}"),
    ],
)
def test_sizes_that_no_graph_has_are_refused_when_it_is_loaded(device_folder, tmp_path, change, message):
    for file in (device_folder / "export").iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((device_folder / "export/reft_edge.json").read_text())
    (tmp_path / "reft_edge.json").unlink()
    (tmp_path / "reft_edge.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ReftEdgeError, match=message):
        SteeredModel(tmp_path, device="cpu")
