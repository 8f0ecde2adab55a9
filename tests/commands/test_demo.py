"""The demo on a tiny model: every part says beforehand how long it will take, and what it measured that from."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from reft_edge.adapter.file import load_adapter
from reft_edge.commands import demo_steps
from reft_edge.commands.demo_times import answer_seconds, export_seconds, time_step, training_seconds
from reft_edge.commands.screen import Screen
from reft_edge.model.prompts import load_prompts
from reft_edge.runtime import SteeredModel
from reft_edge.training.data import Dataset
from reft_edge.training.turns import Example

SETTINGS = replace(demo_steps.SETTINGS, layers="all", max_steps=3)
TIME = r"about \d+ (s|min)"
PARTS = (
    (r"1\. the model", rf"two steps were timed: the whole demo takes {TIME}"),
    (r"2\. train an adapter", rf"3 steps, {TIME}", r"12 examples, 3 steps"),
    (r"3\. export", rf"{TIME}: the graph is built", r"exported in \d+ s"),
    (r"4\. run", rf"8 answers, {TIME}", r"Who are you\?"),
    (r"5\. a second adapter", rf"3 steps, {TIME}; then {TIME} of answers", r"10 examples, 3 steps"),
)


def test_every_part_says_how_long_it_takes(device_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_steps, "SETTINGS", SETTINGS)
    demo_steps.run_demo(tmp_path / "demo", "fp32", Screen(), str(device_folder / "hf"))
    said, at = capsys.readouterr().out, 0
    for part in PARTS:
        for pattern in part:
            found = re.compile(pattern).search(said, at)
            assert found, pattern
            at = found.end()
    assert {path.name for path in (tmp_path / "demo").iterdir() if not path.name.startswith(".")} == {
        *("emoji.safetensors", "pirate.safetensors", "model")
    }
    assert load_adapter(tmp_path / "demo/emoji.safetensors").config.base_name == "hf"


def rows(*sizes: tuple[int, int]) -> Dataset:
    return Dataset([Example((1,) * prompt, (2,) * answer) for prompt, answer in sizes], 0, "")


def test_a_training_is_reckoned_from_a_step_and_its_tokens():
    assert training_seconds(0.5, rows((4, 6)), rows((4, 6)), 40) == 20
    # Of 20 tokens, the two with which both prompts begin run once.
    assert training_seconds(0.5, rows((4, 6)), rows((2, 3), (4, 11)), 40) == pytest.approx(36)


def test_a_step_is_the_second_of_two(tiny_model, device_folder):
    ticks = iter((5.0, 5.25))
    data = demo_steps._rows("emoji", load_prompts(device_folder / "hf"))
    assert time_step(tiny_model, data, SETTINGS, clock=lambda: next(ticks)) == 0.25
    assert next(ticks, None) is None, "two steps were run"


def test_an_export_is_reckoned_from_imports_loading_and_texts(tiny_model, device_folder):
    prompts = load_prompts(device_folder / "hf")
    slow, fast = (
        export_seconds(tiny_model, prompts, *given, clock=iter((1.0, 3.0)).__next__)
        for given in ((8, 2), (0, 2))
    )
    assert slow - fast == pytest.approx(8)
    assert fast > 2 + 2


def test_an_answer_is_reckoned_from_a_short_one(device_folder):
    runtime = SteeredModel(device_folder / "export", "cpu")
    short, long = (answer_seconds(runtime, "Who are you?", tokens) for tokens in (1, 10_000))
    assert 0 < short < long


def test_an_answer_that_ends_at_once_is_no_division_by_zero():
    ended = SimpleNamespace(prefill_seconds=0.5, decode_steps=0, decode_seconds=0.0, text=lambda: "")
    assert answer_seconds(SimpleNamespace(stream=lambda *_, **__: ended), "Who are you?", 40) == 0.5
