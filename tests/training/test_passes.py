"""Passes that leave out what changes nothing: their losses and gradients are those of plain passes."""

import dataclasses
import errno
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.positions import parse_positions
from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.loading import load_model
from reft_edge.model.places import Place
from reft_edge.model.source import ModelFolder
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.data import Dataset
from reft_edge.training.description import adapter_config
from reft_edge.training.frozen_base import checkpointed, frozen
from reft_edge.training.kept_states import KeptStates, last_untouched
from reft_edge.training.objectives import objective_of
from reft_edge.training.packed_rows import shared_length
from reft_edge.training.passes import Passes
from reft_edge.training.preference import PreferencePair, Preferences
from reft_edge.training.run import train
from reft_edge.training.settings import Execution, TrainSettings
from reft_edge.training.turns import Example
from tests.helpers.tiny import ARCHITECTURES, make_model

CPU = torch.device("cpu")
NONE = Execution(shared_prefix=False, needed_tokens=False, frozen_cache=0)
ONLY = {
    "prefix": dataclasses.replace(NONE, shared_prefix=True),
    "needed": dataclasses.replace(NONE, needed_tokens=True),
    "kept": dataclasses.replace(NONE, frozen_cache=1),
    "all": Execution(),
}
CLOCK = "reft_edge.training.kept_states.perf_counter"
SYSTEM = tuple(range(40, 60))
ROWS = [
    Example((*SYSTEM, 5, 17, 33, 4), (7, 9, 12)),
    Example((*SYSTEM, 300), (1,)),
    Example((*SYSTEM, 11, 12, 13, 14, 15, 16, 90, 91), (17, 18, 19, 20, 21)),
    Example((*SYSTEM, 5, 18), (7, 9, 12, 80, 81, 82, 83, 84)),
]


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch):
    """So that states are kept, however busy the machine is."""
    monkeypatch.setattr(CLOCK, lambda: 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("passes") / "hf")


@pytest.fixture
def model(folder):
    return load_model(ModelFolder(folder, "tiny"))


def dataset(rows):
    return Dataset(list(rows), 0, "")


def losses(model, execution, data=None, passes=2, told=None, before=nullcontext, rows=None, **changes):
    """The loss and the gradients of so many passes over the same rows."""
    settings = TrainSettings(**{"positions": "f3+l3", "rank": 2, "dtype": "fp32", **changes})
    data = data or dataset(ROWS)
    interventions = Interventions(adapter_config(model, "tiny", settings), settings.dropout, seed=3)
    told = [] if told is None else told
    quick = Passes(model, interventions, data, settings, execution, told.append)
    objective = objective_of(data, 0.1, quick)
    found = []
    with frozen(model), before(), quick.attached(), steered(model, (interventions, 1.0)) as steering:
        for _ in range(passes):
            torch.manual_seed(0)
            loss = objective.loss(model, steering, rows or data.examples, CPU, False)
            loss.backward()
            gradients = {name: value.grad.clone() for name, value in interventions.named_parameters()}
            found.append((float(loss.detach()), gradients))
            interventions.zero_grad(set_to_none=True)
    return found


def assert_same(found, expected):
    for (loss, gradients), (plain, plainly) in zip(found, expected, strict=True):
        assert loss == pytest.approx(plain, rel=1e-5)
        for name, gradient in plainly.items():
            near = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=near)


@pytest.mark.parametrize(
    "positions", ["f3+l3", "all+gen", "f30+l1", "l1+gen2", "all+gen-f3-l1", "from:[5]-l1|from:[50]"]
)
@pytest.mark.parametrize("layers", ["all", "1;2", "2"])
@pytest.mark.parametrize("idea", ONLY)
def test_losses_are_those_of_plain_passes(model, idea, layers, positions):
    told = []
    found = losses(model, ONLY[idea], told=told, layers=layers, positions=positions)
    assert_same(found, losses(model, NONE, layers=layers, positions=positions))
    assert told == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tmp_path, architecture):
    model = load_model(ModelFolder(make_model(tmp_path / "hf", architecture), "tiny"))
    told = []
    found = losses(model, Execution(), layers="1;2", told=told)
    assert_same(found, losses(model, NONE, layers="1;2"))
    assert told == []


@pytest.mark.parametrize("component", ["attention", "mlp"])
def test_parts_of_blocks(model, component):
    found = losses(model, Execution(), layers="1;2", component=component)
    assert_same(found, losses(model, NONE, layers="1;2", component=component))


def test_pairs(model):
    pairs = [PreferencePair(ROWS[0], ROWS[3]), PreferencePair(ROWS[2], ROWS[1])]
    data = Preferences(pairs, 0, "")
    found = losses(model, Execution(), data, layers="1;2")
    assert_same(found, losses(model, NONE, data, layers="1;2"))


def test_blocks_that_compute_again(model):
    execution = Execution(checkpointing=True)
    found = losses(model, execution, before=lambda: checkpointed(model), layers="1;2")
    assert_same(found, losses(model, NONE, layers="1;2"))


@pytest.mark.parametrize("idea", ONLY)
def test_dropout_draws_for_each_row(model, idea):
    found = losses(model, ONLY[idea], dropout=0.5)
    assert_same(found, losses(model, NONE, dropout=0.5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("first", [SYSTEM, ()])
def test_rows_with_and_without_tokens_in_common(model, first, tied):
    rows = [Example((*first, *row.prompt[len(SYSTEM) :]), row.completion) for row in ROWS]
    told = []
    found = losses(model, Execution(), dataset(rows), told=told, tied=tied, layers="1;2")
    assert_same(found, losses(model, NONE, dataset(rows), tied=tied, layers="1;2"))
    assert told == []


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_rows_that_are_long_have_fused_attention(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr("reft_edge.training.frozen_base.SHORT", 0)
    model = load_model(ModelFolder(make_model(tmp_path / "hf", architecture), "tiny"))
    told, before = [], set(ALL_ATTENTION_FUNCTIONS)
    found = losses(model, Execution(), told=told, layers="1;2")
    assert_same(found, losses(model, NONE, layers="1;2"))
    assert told == []
    assert model.config._attn_implementation == "sdpa"
    assert set(ALL_ATTENTION_FUNCTIONS) == before


def tokens_run(model, execution, **changes):
    """Of two passes over the rows: how many tokens each block's query, key and MLP were given."""
    seen = []

    def counted(name, forward):
        def run(x):
            seen.append((name, x.shape[:2].numel()))
            return forward(x)

        return run

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "gate_proj")):
            module.forward = counted(name, type(module).forward.__get__(module))
    settings = TrainSettings(positions="f3+l3", rank=2, **changes)
    interventions = Interventions(adapter_config(model, "tiny", settings))
    quick = Passes(model, interventions, dataset(ROWS), settings, execution)
    quick._checked = True
    found = []
    with torch.no_grad(), quick.attached(), steered(model, (interventions, 1.0)) as steering:
        for _ in range(2):
            seen.clear()
            quick(model, steering, [(row.prompt, row.completion[:-1]) for row in ROWS], CPU)
            sums = {}
            for name, count in seen:
                _, _, layer, _, part = name.split(".")
                sums[int(layer), part] = sums.get((int(layer), part), 0) + count
            found.append(sums)
    return found


def test_less_is_run(model):
    """Four rows of at most 32 tokens; of the 20 that they have in common, one row has its last three from the 18th on."""
    columns, behind, shared_tokens = 32, [6, 1, 12, 9], 18
    labels = sum(row.count for row in ROWS)
    plain = tokens_run(model, NONE)
    assert plain[0] == plain[1] == dict.fromkeys(plain[0], 4 * columns)
    needed = tokens_run(model, ONLY["needed"])[0]
    real = 4 * len(SYSTEM) + sum(behind)
    assert needed[0, "gate_proj"] == needed[1, "gate_proj"] == real
    assert needed[2, "gate_proj"] == needed[2, "q_proj"] == labels
    assert needed[2, "k_proj"] == needed[1, "q_proj"] == real
    shared = tokens_run(model, ONLY["prefix"])[0]
    assert shared == dict.fromkeys(shared, shared_tokens + real - 4 * shared_tokens)
    first, second = tokens_run(model, ONLY["kept"], layers="1;2")
    assert first == plain[0]
    assert second == {key: count for key, count in first.items() if key[0] == 2}
    whole = tokens_run(model, Execution(), layers="1;2")[1]
    assert whole == {
        (2, "q_proj"): labels,
        (2, "gate_proj"): labels,
        (2, "k_proj"): shared_tokens + real - 4 * shared_tokens,
    }


def test_how_many_tokens_are_shared():
    rows = [(row.prompt, row.completion[:-1]) for row in ROWS]
    assert shared_length(rows, parse_positions("f3+l1", tied=False)) == 20
    # the last but 5 of 21 tokens are edited in one row, and not in others
    assert shared_length(rows, parse_positions("l5", tied=False)) == 16
    # at most half of a prompt: 10 of 21, 12 of 24
    assert shared_length(rows, parse_positions("f30", tied=False)) == 10
    assert shared_length(rows, parse_positions("all+gen", tied=True)) == 20
    assert shared_length([*rows, ((1, 2, 3), (4,))], parse_positions("f3", tied=False)) == 0
    # called for in the tokens that all share, by a row's own, and in one row again
    assert shared_length(rows, parse_positions("from:[50]", tied=False)) == 20
    assert shared_length(rows, parse_positions("from:[5]|from:[300]", tied=False)) == 20
    again = [*rows[:3], ((*SYSTEM, 50, 18), (7,))]
    assert shared_length(again, parse_positions("from:[50]", tied=False)) == 10
    # a prompt's last token has the first label
    assert shared_length([(SYSTEM, (1,)), ((*SYSTEM, 3), (2,))], parse_positions("all", tied=False)) == 19


def test_the_highest_block_without_edits_before_it():
    assert last_untouched([Place(3, "block"), Place(7, "block")]) == 3
    assert last_untouched([Place(3, "attention"), Place(3, "block")]) == 2
    assert last_untouched([Place(0, "mlp")]) == -1


def test_a_file_in_place_of_memory(model, tmp_path, monkeypatch):
    sizes = []
    from_file = torch.from_file

    def watched(path, **options):
        found = from_file(path, **options)
        sizes.append(Path(path).stat().st_size)
        return found

    monkeypatch.setattr(torch, "from_file", watched)
    execution = dataclasses.replace(ONLY["kept"], frozen_cache_in=tmp_path)
    found = losses(model, execution, layers="1;2")
    assert_same(found, losses(model, NONE, layers="1;2"))
    assert sizes == [sum(len(row.prompt) + len(row.completion) - 1 for row in ROWS) * 64 * 4]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_holds_nothing(model, tmp_path, monkeypatch):
    missing = dataclasses.replace(ONLY["kept"], frozen_cache_in=tmp_path / "missing")
    with pytest.raises(
        ReftEdgeError, match=r"cannot keep hidden states in .*missing: No such file or directory"
    ):
        losses(model, missing, layers="1;2")
    with pytest.raises(ReftEdgeError, match="frozen_cache is -1; expected 0 MB or more"):
        Execution(frozen_cache=-1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    told = []
    execution = dataclasses.replace(Execution(), frozen_cache_in=tmp_path)
    found = losses(model, execution, told=told, layers="1;2")
    assert_same(found, losses(model, NONE, layers="1;2"))
    assert told == [f"no hidden states are kept: 0 MB do not go into {tmp_path}: No space left on device"]
    assert list(tmp_path.iterdir()) == []


def test_too_little_room(model):
    told = []
    rows = [Example((*SYSTEM, first, second), (1, 2)) for first in range(100) for second in range(3)]
    data = dataset(rows)
    losses(model, ONLY["kept"], data, told=told, layers="1;2", rows=rows[:2], epochs=2)
    assert told == [
        "hidden states below layer 2 would take 2 MB, more than --frozen-cache; they are computed anew in each step"
    ]
    told.clear()
    losses(model, ONLY["kept"], data, told=told, layers="1;2", rows=rows[:2], max_steps=1)
    assert told == []


def test_slow_reading_is_given_up(model, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(CLOCK, lambda: next(clock) ** 2)  # reading comes later, and so takes longer
    reads, read_for = [], KeptStates._read_for
    monkeypatch.setattr(KeptStates, "_read_for", lambda self, ids: reads.append(1) or read_for(self, ids))
    execution = dataclasses.replace(ONLY["kept"], shared_prefix=True)
    found = losses(model, execution, passes=5, layers="1;2")
    assert len(reads) == 3  # the check's second time, and two steps
    assert_same(found, losses(model, NONE, passes=5, layers="1;2"))


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_that_is_different_is_trained_plainly(model, monkeypatch, raises):
    """One whose blocks look at other tokens than keys and values tell."""
    block = decoder_layers(model)[1].self_attn
    forward = block.forward

    def mean_of_all(hidden_states, **kwargs):
        if raises and kwargs.get("cache") is not None:
            raise ValueError("no cache here")
        output, weights = forward(hidden_states=hidden_states, **kwargs)
        return output + hidden_states.cumsum(dim=1), weights

    monkeypatch.setattr(block, "forward", mean_of_all)
    told = []
    found = losses(model, Execution(), told=told, layers="1;2")
    assert told == ["this model has passes of its own: the quicker ones are not used"]
    assert_same(found, losses(model, NONE, layers="1;2"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_trainings(folder, tmp_path, dtype):
    near = 1e-4 if dtype == "fp32" else 2e-2
    settings = TrainSettings(layers="1;2", positions="f3+l3", max_steps=12, batch_size=2, dtype=dtype)

    def curve(name, execution):
        model, steps = load_model(ModelFolder(folder, "tiny")), []
        rows, held_out = dataset(ROWS), dataset(ROWS[:2])
        train(
            model,
            "tiny",
            rows,
            tmp_path / name,
            settings,
            held_out,
            execution=execution,
            on_step=steps.append,
        )
        assert all("forward" not in vars(module) for module in model.modules())
        return [step.loss for step in steps]

    np.testing.assert_allclose(curve("quick", Execution()), curve("plain", NONE), rtol=near)
    quick, plain = (load_adapter(tmp_path / name).config.training for name in ("quick", "plain"))
    assert quick["evaluation_loss"] == pytest.approx(plain["evaluation_loss"], rel=near)
