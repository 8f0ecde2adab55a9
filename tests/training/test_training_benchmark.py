"""The benchmark of trainings: every library gets reft-edge's batches, and questions are scored as `reft-edge eval` does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from reft_edge.evaluation.run import EvalSettings, evaluate_model
from reft_edge.evaluation.tasks import load_questions
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings
from reft_edge.training.trainer import rate
from tests.helpers.ranks import run_ranks

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "training"


class Worker:
    """In place of a worker's `subprocess.Popen`."""

    def __init__(self, command, env, text):
        self._done = run_ranks(1, command[1:], env, Path.cwd())

    @property
    def returncode(self):
        return self._done.returncode

    def wait(self):
        return self._done.returncode


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import table

    monkeypatch.setattr(table, "subprocess", SimpleNamespace(Popen=Worker))
    yield table
    for name in ("table", "tasks"):
        sys.modules.pop(name)


@pytest.fixture
def data(tmp_path):
    """Rows of the data's forms; `gsm8k`'s hold numbers."""
    texts = [
        "a fine film that grows on you",
        "dull and much too long for what it says",
        "never funny , often loud",
    ]
    rows = {
        "sst2": [{"text": texts[i % 3] + f" {i}", "label": i % 2} for i in range(20)],
        "arc-easy": [
            {
                "prompt": f"Please choose the correct answer to the question: What is {i} for water?\n\n"
                "Answer1: ice melts Answer2: it is hot Answer3: it is warm\n\nAnswer format: answer1/answer2/answer3",
                "answer": f"answer{1 + i % 3}",
            }
            for i in range(20)
        ],
        "gsm8k": [
            {
                "prompt": f"Ann has {i} dogs and then {i} foxes?",
                "completion": f"#### {2 * i}",
                "answer": f"{2 * i}",
            }
            for i in range(20)
        ],
    }
    for task, of_task in rows.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for part in ("train", "dev", "test"):
            path = tmp_path / "data" / task / f"{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in of_task))
    return tmp_path / "data"


def bench(table, device_folder, tmp_path, seed=0):
    folder = ModelFolder(device_folder / "hf", "tiny-llama")
    for name in ("work", "results"):
        (tmp_path / name).mkdir(exist_ok=True)
    prompts = load_model_prompts(folder)
    return table.Bench(
        tmp_path, tmp_path / "work", tmp_path / "results", folder.path, prompts, 1, "fp32", seed, {}
    )


def small(table, task):
    return table.dataclasses.replace(
        table.TASKS[task],
        steps=3,
        batch_size=4,
        dev_rows=5,
        test_rows=9,
        max_tokens=8 if task == "gsm8k" else 0,
    )


def test_the_peers_get_the_batches_and_rates_of_our_own_training(table, data, device_folder, tmp_path):
    """The first loss of a training tells its rows: one batch at the same initial adapter, for three orders."""
    prepared_losses, own_losses = [], []
    for seed in range(3):
        places = bench(table, device_folder, tmp_path, seed)
        prepared = table.prepare(places, data, small(table, "sst2"))
        given = places.training(prepared, 2e-3, 3)
        settings = TrainSettings(
            lr=2e-3, max_steps=3, batch_size=4, seed=seed, start="random", dtype="fp32", prompt_format="raw"
        )
        assert given["rates"] == [2e-3 * rate(settings, step, 3) for step in range(3)]
        model = load_model(ModelFolder(device_folder / "hf", "tiny-llama"))
        seen = []
        train(
            model,
            "tiny",
            table_rows(prepared, given),
            tmp_path / "a.safetensors",
            table.dataclasses.replace(settings, max_steps=1, seed=seed),
            on_step=lambda step, seen=seen: seen.append(step.loss),
        )
        own_losses += seen
        job = places.job(prepared, table.METHODS["loreft"], 2e-3, train=given)
        job["settings"] = {"rank": 4, "first": 7, "last": 7, "tied": False}
        prepared_losses.append(places.cell(f"order{seed}", job)["losses"][0])
    assert prepared_losses == pytest.approx(own_losses, rel=1e-5)
    assert len(set(np.round(prepared_losses, 4))) == 3


def table_rows(prepared, given):
    """The first batch alone, as a data set of its own."""
    from reft_edge.training.data import Dataset
    from reft_edge.training.turns import Example

    rows = [prepared.rows[number] for number in given["batches"][0]]
    return Dataset([Example(tuple(prompt), tuple(completion)) for prompt, completion in rows], 0, "")


@pytest.mark.parametrize("task", ["sst2", "arc-easy", "gsm8k"])
def test_a_cell_scores_as_eval_does(table, data, device_folder, tmp_path, task):
    places = bench(table, device_folder, tmp_path)
    prepared = table.prepare(places, data, small(table, task))
    method = table.dataclasses.replace(table.METHODS["loreft"], rates=(5e-2,))
    figures, records = table.run(places, prepared, method)
    adapter = tmp_path / "work" / task / "loreft-0.05.safetensors"
    questions = load_questions(tmp_path / "work" / task / "test.jsonl")
    settings = EvalSettings(max_tokens=8 if task == "gsm8k" else None)
    expected = evaluate_model(str(device_folder / "hf"), questions, [(adapter, 1.0)], settings)
    assert [record.answer for record in records] == [record.answer for record in expected.records]
    assert [record.text for record in records] == [record.text for record in expected.records]
    assert (figures["right"], figures["low"], figures["high"]) == (
        expected.right,
        expected.low,
        expected.high,
    )
    assert figures["bytes"] == adapter.stat().st_size
    assert len(figures["losses"]) == 3


def test_what_is_there_is_not_done_again(table, data, device_folder, tmp_path, capfd):
    places = bench(table, device_folder, tmp_path)
    prepared = table.prepare(places, data, small(table, "sst2"))
    first, _ = table.run(places, prepared, table.METHODS["loreft"])
    assert "sst2.loreft.test" in capfd.readouterr().out
    again, _ = table.run(places, prepared, table.METHODS["loreft"])
    assert capfd.readouterr().out == ""
    assert again == first
    with pytest.raises(SystemExit, match="another seed"):
        table.run(table.dataclasses.replace(places, seed=1), prepared, table.METHODS["loreft"])


def test_the_table_goes_between_its_marks(table, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{table.MARK}\nold\n{table.MARK}\nbelow\n")
    table.fill(readme, "| new |\n")
    table.fill(readme, "| newer |\n")
    assert readme.read_text() == f"above\n{table.MARK}\n\n| newer |\n\n{table.MARK}\nbelow\n"
    readme.write_text("no marks\n")
    with pytest.raises(SystemExit, match="must have two lines"):
        table.fill(readme, "| new |\n")
    assert readme.read_text() == "no marks\n"


def test_the_workers_need_nothing_of_ours():
    """Peers' environments hold torch, transformers and the peer."""
    blocked = "import sys; sys.modules['reft_edge'] = None; import worker"
    done = subprocess.run(
        [sys.executable, "-c", blocked],
        cwd=BENCHMARK,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
