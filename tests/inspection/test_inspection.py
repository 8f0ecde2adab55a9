"""Inspecting an adapter: figures against plain computations, and a page that holds nothing foreign."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.adapter.linear import fold
from reft_edge.adapter.positions import active
from reft_edge.cli import app
from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.inspection.effect import load_rows, load_texts, measure, position, position_order
from reft_edge.inspection.facts import facts, summary, visible
from reft_edge.inspection.page import render
from reft_edge.inspection.weights import (
    TokenShift,
    inspect_adapter,
    kept_curve,
    orthonormal,
    principal_angles,
)
from reft_edge.model.encoders import load_encoder, load_text_tokens
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.steering.heads import pooled_states
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.turns import Example
from tests.export.test_encoder import random_classifier
from tests.helpers.tiny import make_encoder, make_model
from tests.helpers.torch_reference import logits, random_adapter

ATTACK = '"><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>&\x1b[31m'


class Parsed(HTMLParser):
    """Tags and attributes of a page; complains about unbalanced tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = set(), [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def trained(adapter, **training):
    return Adapter(dataclasses.replace(adapter.config, training=training), adapter.tensors)


@pytest.mark.parametrize(
    "intervention", ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "steering"]
)
def test_strengths_are_those_of_the_folded_edit(tiny_model, intervention):
    adapter = random_adapter(tiny_model, intervention, tied=True)
    (strength,) = inspect_adapter(adapter, "a", 1).strengths
    for index, place in enumerate(adapter.config.places):
        part = fold(adapter).places[place]
        gain = np.linalg.norm(part.A.astype(np.float64) @ part.B, ord=2)
        assert strength.gains[index] == pytest.approx(gain, rel=1e-5, abs=1e-9)
        assert strength.constants[index] == pytest.approx(np.linalg.norm(part.b @ part.B), rel=1e-5)


def test_principal_angles_of_known_planes():
    axes = np.eye(4)
    turned = np.array([axes[0], np.cos(0.5) * axes[1] + np.sin(0.5) * axes[2]])
    assert principal_angles(axes[:2], turned) == pytest.approx([0, np.degrees(0.5)], abs=1e-5)
    assert principal_angles(axes[:1], axes[1:2]) == pytest.approx([90])
    spanned = np.array([[2.0, 0, 0, 0], [3.0, 1, 0, 0], [1.0, 1, 0, 0]])
    assert principal_angles(orthonormal(spanned), axes[:2]) == pytest.approx([0, 0], abs=1e-5)
    assert orthonormal(np.zeros((2, 4))).shape == (0, 4)


def test_overlaps_do_not_depend_on_the_basis(tiny_model):
    a = random_adapter(tiny_model, "nodireft", rank=4, tied=True, seed=1)
    mixed = {**a.tensors, "W2": np.ascontiguousarray(a.tensors["W2"][:, :, ::-1] * np.float32(3))}
    mixed["W2"][:, :, 0] += mixed["W2"][:, :, 1]
    found = inspect_adapter(a, "a", 1, ("b", Adapter(a.config, mixed)))
    assert found.between.shared == pytest.approx(np.ones(3), abs=1e-5)
    (own,) = found.overlaps
    assert np.diag(own.shared) == pytest.approx(np.ones(3))
    assert own.shared == pytest.approx(own.shared.T)
    assert own.shared[0, 1] < 0.5
    other = random_adapter(tiny_model, rank=4, layers=(1, 2), seed=5)
    unlike = inspect_adapter(a, "a", 1, ("b", other)).between
    assert unlike.layers == (1, 2)
    assert (unlike.shared < 0.5).all()
    lonely = random_adapter(tiny_model, layers=(0,))
    with pytest.raises(ReftEdgeError, match="no layer in common"):
        inspect_adapter(lonely, "a", 1, ("b", other))
    foreign = Adapter(dataclasses.replace(other.config, base_fingerprint="f"), other.tensors)
    with pytest.raises(ReftEdgeError, match="different models"):
        inspect_adapter(a, "a", 1, ("b", foreign))
    narrow = Adapter(
        dataclasses.replace(other.config, hidden_size=32),
        {
            name: tensor[..., :32].copy() if tensor.ndim == 4 else tensor
            for name, tensor in other.tensors.items()
        },
    )
    with pytest.raises(ReftEdgeError, match="different models"):
        inspect_adapter(a, "a", 1, ("b", narrow))


def test_positions_have_names_in_reading_order():
    names = [position(t, 50) for t in range(80)]
    assert names[0] == "1"
    assert names[15:17] == ["16", "…"]
    assert names[33:35] == ["…", "-16"]
    assert names[49:51] == ["-1", "+1"]
    assert names[65:67] == ["+16", "+…"]
    assert sorted(set(names), key=position_order) == list(dict.fromkeys(names))
    assert [position(t, 3) for t in range(3)] == ["1", "-2", "-1"]
    assert position(0, 1) == "-1"


def test_edits_of_a_part_of_a_block_are_seen_where_they_act(device_folder, tiny_model):
    prompts = load_prompts(device_folder / "hf")
    rows = [Example((5, 80, 33, 120, 7), ())]
    for component in ("attention", "mlp"):
        adapter = random_adapter(tiny_model, positions="f2+l1", layers=(0, 2), component=component)
        effect = measure(tiny_model, adapter, rows, prompts, "cpu")
        assert min(min(by.values()) for by in effect.norms.values()) > 1e-3


def test_effects_are_those_of_plain_passes(device_folder, tiny_model):
    """Against hidden states and logits of single passes, gathered by hand."""
    prompts = load_prompts(device_folder / "hf")
    adapter = random_adapter(tiny_model, positions="f2+l1+gen", layers=(0, 2), strength=2.0)
    rows = [Example((5, 80, 33, 120, 7), (61, 19, 1)), Example((9, 9, 40), (200, 1))]
    effect = measure(tiny_model, adapter, rows, prompts, "cpu")
    norms, divergences, after, before = {}, {}, 0, 0
    interventions = Interventions.from_adapter(adapter)
    for row in rows:
        n, ids = len(row.prompt), list(row.prompt + row.completion[:-1])
        base = logits(tiny_model, ids).log_softmax(-1)
        states = {}

        def keep(layer, states=states):
            return lambda module, args, output: states.__setitem__(
                layer, (output[0] if isinstance(output, tuple) else output).squeeze(0).clone()
            )

        blocks = tiny_model.model.layers
        handles = [blocks[layer].register_forward_hook(keep(("in", layer))) for layer in (0, 2)]
        with steered(tiny_model, (interventions, 1.0)) as steering, steering.prompts(torch.tensor([n])):
            handles += [blocks[layer].register_forward_hook(keep(("out", layer))) for layer in (0, 2)]
            known = logits(tiny_model, ids).log_softmax(-1)
        for handle in handles:
            handle.remove()
        for t in range(len(ids)):
            name = position(t, n)
            divergences.setdefault(name, []).append(float((known[t].exp() * (known[t] - base[t])).sum()))
            if any(active(span, t, n) for span in adapter.config.spans):
                for layer in (0, 2):
                    plain, edited = states["in", layer][t], states["out", layer][t]
                    norms.setdefault((name, layer), []).append(float((edited - plain).norm() / plain.norm()))
        before, after = before + base[n - 1].exp() / 2, after + known[n - 1].exp() / 2
    assert {(name, layer): value for name, by in effect.norms.items() for layer, value in by.items()} == {
        key: pytest.approx(np.mean(values), rel=1e-4) for key, values in norms.items()
    }
    assert min(min(by.values()) for by in effect.norms.values()) > 1e-3
    assert effect.divergence == {
        name: pytest.approx(np.mean(values), rel=1e-3, abs=1e-5) for name, values in divergences.items()
    }
    best = int((after - before).argmax())
    assert effect.gained[0].after == pytest.approx(float(after[best]), rel=1e-4)
    assert effect.gained[0].before == pytest.approx(float(before[best]), rel=1e-4, abs=1e-7)
    assert effect.lost[0].after - effect.lost[0].before == pytest.approx(
        float((after - before).min()), rel=1e-4
    )
    assert all(shift.after > shift.before for shift in effect.gained)


def test_an_adapter_that_does_nothing_shows_nothing(device_folder, tiny_model):
    adapter = random_adapter(tiny_model, "steering")
    still = Adapter(adapter.config, {name: np.zeros_like(tensor) for name, tensor in adapter.tensors.items()})
    rows = [Example((5, 80, 33), (61, 1))]
    effect = measure(tiny_model, still, rows, load_prompts(device_folder / "hf"), "cpu")
    assert set(effect.divergence.values()) == {0.0}
    assert {value for by in effect.norms.values() for value in by.values()} == {0.0}
    assert effect.gained == effect.lost == []
    Parsed(render(inspect_adapter(still, "still", 1, effect=effect)))


def test_an_encoders_edits_are_measured(tmp_path):
    source = ModelFolder(make_encoder(tmp_path / "hf"), "tiny-bert")
    random_classifier(load_encoder(source), tmp_path / "task.safetensors")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "I am well", "label": "yes"}\n{"text": "a", "text2": "b", "label": "no"}\n')
    options = ["--model", str(tmp_path / "hf"), "--data", str(rows), "-o", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "task.safetensors"), *options])
    assert done.exit_code == 0, done.output
    assert "strongest edits" in done.output
    assert "Edits on 2 rows" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_a_pair_of_texts_is_read_as_in_training(tmp_path, architecture):
    """Token types included, where the encoder has them; a label is not needed."""
    source = ModelFolder(make_encoder(tmp_path / "hf", architecture), "tiny")
    encoder = load_encoder(source)
    adapter = random_classifier(encoder, positions="f2")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "I am well.", "text2": "How are you?"}\n')
    (row,) = load_texts(path, load_text_tokens(source), 9)
    assert row.types == (0,) * row.types.count(0) + (1,) * row.types.count(1)
    assert row.types.count(1) > 2
    found = measure(encoder, adapter, [row], None, "cpu")
    seen = []
    with steered(encoder, (Interventions.from_adapter(adapter), 1.0)):
        handle = encoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        pooled_states(encoder, [row], "cls", torch.device("cpu"))
        handle.remove()
    types = measure(encoder, adapter, [dataclasses.replace(row, types=(0,) * len(row.ids))], None, "cpu")
    assert ("token_type_ids" in seen[0]) == (found.norms != types.norms) == (architecture == "bert")
    assert set(found.norms) == {"1", "2"}


def test_rows_of_each_shape_that_is_trained(device_folder, tiny_model, tmp_path):
    path, adapter = tmp_path / "rows.jsonl", random_adapter(tiny_model, positions="f2+l2")
    prompts = load_prompts(device_folder / "hf")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "ice"}]
    rows = [
        {"prompt": "Who?", "completion": "ice"},
        {"messages": turns},
        {"prompt": "Who?", "chosen": "ice", "rejected": "the dog"},
    ]
    loaded, told = [], []
    for row in rows:
        path.write_text(json.dumps(row))
        loaded += load_rows(path, prompts, "chat", 9, told.append)
    assert [text.partition(" as ")[2] for text in told] == [
        "prompts (prompt, completion)",
        "conversations (messages)",
        "preferences (prompt, chosen, rejected)",
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert measure(tiny_model, adapter, loaded, prompts, "cpu").rows == 3
    with pytest.raises(ReftEdgeError, match="a row has the token 320"):
        measure(tiny_model, adapter, [Example((5, 320), ())], prompts, "cpu")


def test_the_page_is_self_contained_and_escapes_everything(device_folder, tiny_model):
    prompts = load_prompts(device_folder / "hf")
    training = {
        "lr": 1e-3,
        ATTACK: ATTACK,
        "nested": {ATTACK: [ATTACK]},
        "curve": [[1, 2.0], [2, 1.0]],
    }
    adapter = trained(random_adapter(tiny_model, positions="f2+l2"), **training)
    rows = [Example((5, 80, 33, 7), (61, 1))]
    effect = measure(tiny_model, adapter, rows, prompts, "cpu")
    effect = dataclasses.replace(effect, gained=[TokenShift(ATTACK, 0.1, 0.2)], lost=[])
    found = inspect_adapter(adapter, ATTACK, 1234, (ATTACK, adapter), effect)
    page = render(found)
    parsed = Parsed(page)
    assert parsed.tags.isdisjoint({"script", "img", "link", "iframe", "object", "use", "image", "a", "form"})
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in parsed.attributes)
    assert "\x1b" not in page
    assert not re.search(r"url\(|@import|https?:", page)
    assert "alert(1)" in "".join(parsed.text)
    assert "default-src 'none'" in page
    for heading in ("Edits on 1 rows", "Shift of predictions", "Training", "Overlap between layers"):
        assert heading in page
    assert all(text.isprintable() for line in summary(found).items() for text in line)


@pytest.mark.parametrize(
    "curve",
    [None, 3, [[1]], [[1, "x"]], [["a", 2]], [[1e300, 1]], [[True]], {"1": 2}, [[]], "curve"],
)
def test_a_curve_that_is_none_is_left_out(tiny_model, curve):
    adapter = trained(random_adapter(tiny_model), curve=curve, other=1)
    assert inspect_adapter(adapter, "a", 1).curve == []
    assert kept_curve({"curve": [[2, 1.5], [1, 3]]}) == [(1, 3.0), (2, 1.5)]
    Parsed(render(inspect_adapter(adapter, "a", 1)))


def test_facts_are_short_and_plain(tiny_model):
    adapter = trained(random_adapter(tiny_model, layers=(0, 2)), note="x" * 5000, line="a\nb")
    described = facts(inspect_adapter(adapter, "a", 2000))
    assert described["layers"] == "0, 2 of 3"
    assert described["note"] == "x" * 200
    assert described["line"] == "a⏎b"
    assert visible("a b\x07") == "a␣b\\x07"


def test_what_a_file_says_of_its_training_hides_nothing_else(tiny_model):
    adapter = trained(random_adapter(tiny_model), base_model="another", file="1 kB", note="kept")
    described = facts(inspect_adapter(adapter, "a", 2000))
    assert described["base model"] == adapter.config.base_name
    assert described["file"].startswith("2.0 kB")
    assert described["note"] == "kept"


def test_values_at_the_edge_of_float32_are_shown(tiny_model):
    """Products and squares of such values are beyond float32."""
    plain = random_adapter(tiny_model, "noreft")
    signs = {"W1": -1.6e38, "W2": 1.6e38, "b": 3e38}
    found = inspect_adapter(
        Adapter(
            plain.config, {name: np.full_like(plain.tensors[name], value) for name, value in signs.items()}
        ),
        "a",
        1,
    )
    assert all(np.isfinite(part.gains).all() and part.gains.min() > 1e38 for part in found.strengths)
    Parsed(render(found))


def test_a_file_of_very_many_layers_makes_no_endless_page():
    fields = {"hidden_size": 8, "num_layers": 400, "layers": tuple(range(400)), "rank": 1}
    config = AdapterConfig("steering", "b", "0", **fields, positions="f1+l1")
    found = inspect_adapter(
        Adapter(config, {name: np.ones(shape, np.float32) for name, shape in config.shapes().items()}), "a", 1
    )
    assert found.overlaps == []
    page = render(found)
    assert len(page) < 1_000_000
    assert "Overlap between layers" not in page
    assert "layers share" not in summary(found)


def test_a_non_linear_adapter_has_no_strengths_but_subspaces(tiny_model):
    found = inspect_adapter(random_adapter(tiny_model, act_fn="relu"), "a", 1)
    assert found.strengths == []
    assert len(found.overlaps) == 2
    assert "act_fn" in facts(found)


def test_rows_may_lack_a_completion(device_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Who?", "answer": "7"}\n{"prompt": "Who?", "completion": "ice"}\n{"x": 1}\n')
    prompts = load_prompts(device_folder / "hf")
    first, second = load_rows(path, prompts, "chat", 2)
    assert first.completion == ()
    assert len(second.completion) > 0
    with pytest.raises(ReftEdgeError, match="line 3"):
        load_rows(path, prompts, "chat", 3)


def test_the_command_line(device_folder, tiny_model, tmp_path):
    path, rows, page = tmp_path / "task.safetensors", tmp_path / "rows.jsonl", tmp_path / "report.html"
    save_adapter(trained(random_adapter(tiny_model), curve=[[1, 3.0], [5, 1.0]]), path)
    rows.write_text(json.dumps({"prompt": "Who?", "completion": "ice melts"}))
    options = [
        "--model",
        str(device_folder / "hf"),
        "--data",
        str(rows),
        "--with",
        str(path),
        "-o",
        str(page),
    ]
    done = CliRunner().invoke(app, ["inspect", str(path), *options])
    assert done.exit_code == 0, done.output
    assert "loss 3 to 1 in 5 steps" in done.output
    assert "gained" in done.output
    Parsed(page.read_text(encoding="utf-8"))
    for bad, message in (
        (["--data", str(rows)], "go together"),
        (["--with", str(rows)], "not a usable adapter"),
        ([*options, "--limit", "0"], "limit is 0"),
        (["-o", str(tmp_path)], "is a folder"),
    ):
        failed = CliRunner().invoke(app, ["inspect", str(path), *bad])
        assert failed.exit_code == 1
        assert message in failed.output
    other = load_model(ModelFolder(make_model(tmp_path / "other", seed=9), "other"))
    with pytest.raises(BaseMismatchError):
        measure(other, load_adapter(path), [Example((5,), ())], load_prompts(device_folder / "hf"), "cpu")
