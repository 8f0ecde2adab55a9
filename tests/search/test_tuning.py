"""`reft-edge tune`: what is tried, what is kept, what is told of it; and what a killed or interrupted search leaves."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

import reft_edge
from reft_edge.adapter.file import load_adapter
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.rows.given import row_source
from reft_edge.rows.source import RowsInMemory
from reft_edge.search import run as search_run
from reft_edge.search.held_out import split_rows
from reft_edge.search.result import parse_budget
from reft_edge.search.scores import Measured, difference
from reft_edge.search.space import EDITS, Narrowed, narrowed, space_for
from reft_edge.search.study import open_study
from reft_edge.search.trial import rung_steps
from reft_edge.training.settings import TrainSettings

ANSWERS = ["I am well.", "ice melts", "the lazy dog", "thank you"]
ROWS = [{"prompt": f"Question {i}?" * (1 + i % 3), "completion": ANSWERS[i % 4]} for i in range(32)]
QUICK = {"max_steps": 4, "batch_size": 8, "dtype": "fp32"}


@pytest.fixture(scope="module")
def base(device_folder):
    return reft_edge.load(device_folder / "hf")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    return reft_edge.tune(base, ROWS, folder / "best.safetensors", trials=6, seed=3, seeds=2, **QUICK)


def test_the_best_file_is_the_best_trials(tuned, base):
    done = [one for one in tuned.tried if one.state == "done"]
    assert len(tuned.tried) == 6
    assert tuned.score == "loss"
    assert tuned.best.loss == min(one.loss for one in done)
    assert sha256_of(tuned.path) == tuned.best.sha256
    assert tuned.check.loss == pytest.approx(tuned.best.loss, rel=1e-4)
    config = load_adapter(tuned.adapter).config
    assert (config.intervention, config.rank, config.positions) == tuple(
        tuned.best.settings[name] for name in ("intervention", "rank", "positions")
    )
    with reft_edge.steered(base, tuned.adapter):
        base.generate("Who are you?", max_tokens=2)


def test_the_first_trial_is_the_default_and_is_compared(tuned):
    first = tuned.tried[0]
    assert first.default
    assert first == tuned.default
    defaults = TrainSettings()
    assert first.settings == {name: getattr(defaults, name) for name in first.settings}
    assert tuned.best.number != 0, "a search of six that finds nothing better tests nothing"
    gain = tuned.check.difference
    assert gain.low <= gain.mean <= gain.high
    assert gain.mean == pytest.approx(first.loss - tuned.check.loss)
    assert len(tuned.check.best_seeds) == len(tuned.check.default_seeds) == 1
    assert tuned.check.default_seeds[0] != first.loss


def test_trials_that_do_worse_are_stopped_early(tuned):
    worse = [one for one in tuned.tried if one.state == "worse"]
    assert worse
    assert all(0 < one.steps < 4 and one.loss is not None and not one.sha256 for one in worse)
    assert rung_steps(40) == {10: 1, 20: 2, 40: 4}
    assert rung_steps(1) == {1: 4}


def test_the_page_shows_scores_over_parameters(tuned):
    page = tuned.plot.read_text()
    assert tuned.plot.name == "best.html"
    for words in (
        "Accuracy over parameters",
        "Loss over parameters",
        "Loss over learning rate",
        "best.safetensors",
    ):
        assert words in page
    done = [one for one in tuned.tried if one.state == "done"]
    assert page.count("<circle") == 4 * len(done)
    assert page.count("<tr>") == 1 + len(tuned.tried)


def test_the_same_seed_tries_the_same(tuned, base, tmp_path):
    again = reft_edge.tune(base, ROWS, tmp_path / "a.safetensors", trials=6, seed=3, **QUICK)
    assert [one.settings for one in again.tried] == [one.settings for one in tuned.tried]
    assert again.best.sha256 == tuned.best.sha256


def test_the_text_of_a_trigger_is_tokenised_once_for_all_trials(base, tmp_path):
    options = {"positions": ['from:"?"'], "trials": 2, "seeds": 1, **QUICK}
    found = reft_edge.tune(base, ROWS, tmp_path / "best.safetensors", **options)
    [token] = base.prompts.encode_plain("?")
    assert [one.settings["positions"] for one in found.tried] == ["f7+l7", f'from:"?"[{token}]']
    assert found.tried[1].state == "done"


def test_a_study_goes_on_and_makes_a_lost_file_again(base, tmp_path):
    output, told = tmp_path / "best.safetensors", []
    options = {"study": tmp_path / "study.db", "seed": 1, **QUICK}
    first = reft_edge.tune(base, ROWS, output, trials=2, **options)
    output.write_bytes(b"something else")
    more = reft_edge.tune(base, ROWS, output, trials=4, report=told.append, **options)
    assert [one.number for one in more.tried] == [0, 1, 2, 3]
    assert more.tried[:2] == first.tried
    assert more.tried[2].settings != more.tried[1].settings
    assert any("continuing the study" in text for text in told)
    assert load_adapter(output).config.intervention == more.best.settings["intervention"]
    with pytest.raises(ReftEdgeError, match=r"is of another search; these differ: batch_size\. Use the same"):
        reft_edge.tune(base, ROWS, output, trials=4, **{**options, "batch_size": 4})
    with pytest.raises(ReftEdgeError, match="these differ: held-out rows, rows"):
        reft_edge.tune(base, ROWS[:25], output, trials=4, **options)


def test_an_interrupt_keeps_the_study_and_the_best_file(base, tmp_path, monkeypatch):
    output, plain = tmp_path / "best.safetensors", search_run.run_trial
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(search_run, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reft_edge.tune(base, ROWS, output, trials=3, **QUICK)
    assert load_adapter(output).config.positions == "f7+l7"
    assert "not finished" in (tmp_path / "best.html").read_text()
    monkeypatch.setattr(search_run, "run_trial", plain)
    found = reft_edge.tune(base, ROWS, output, trials=3, **QUICK)
    assert [one.state for one in found.tried].count("time") == 1
    assert len(found.tried) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.html",
        "best.safetensors",
        "best.safetensors.study.db",
    ]


def test_a_trial_that_a_kill_left_is_ended_and_the_default_tried_again(tmp_path):
    space = space_for(Narrowed(), 3, 64, True)
    arguments = (tmp_path / "s.db", {"rows": "x"}, space, TrainSettings(), "loss", 0)
    with open_study(*arguments) as study:
        assert study.next().default
    with open_study(*arguments) as study:
        assert [one.state for one in study.tried] == ["time"]
        assert study.next().default
        assert not study.next().default
        with (
            pytest.raises(ReftEdgeError, match="another search writes to"),
            open_study(*arguments),
        ):
            pass


def test_defaults_outside_of_what_is_searched_are_tried_all_the_same(base, tmp_path):
    found = reft_edge.tune(
        base,
        ROWS,
        tmp_path / "a.safetensors",
        trials=3,
        positions=["l1"],
        layers=["1"],
        ranks=[2],
        interventions=["red", "nodireft:silu"],
        lr=(1e-3, 2e-3),
        **QUICK,
    )
    first, *others = found.tried
    assert first.default
    assert first.settings["positions"] == "f7+l7"
    for one in others:
        kind = one.settings["intervention"]
        assert (one.settings["positions"], one.settings["layers"]) == ("l1", "1")
        assert one.settings["rank"] == (1 if kind == "red" else 2)
        assert (kind, one.settings["act_fn"]) in {("red", "linear"), ("nodireft", "silu")}
        assert 1e-3 <= one.settings["lr"] <= 2e-3


def test_settings_that_cannot_be_trained_do_not_end_the_search(base, tmp_path):
    """l1 edits a prompt of two tokens, f1 none of one."""
    rows = [{"prompt": "a", "completion": f"the lazy dog {i}"} for i in range(24)]
    found = reft_edge.tune(
        base, rows, tmp_path / "a.safetensors", trials=4, raw=True, positions=["l1", "all"], seed=1, **QUICK
    )
    assert found.default is None
    assert found.tried[0].state == "failed"
    assert "nothing can be learnt" in found.tried[0].error
    assert found.best.settings["positions"] == "all"
    with pytest.raises(
        ReftEdgeError, match="none of the first 5 trials could be trained; the last one said: nothing"
    ):
        reft_edge.tune(base, rows, tmp_path / "b.safetensors", raw=True, positions=["l1"], **QUICK)


def test_a_budget_that_is_too_small_says_so_and_shortens_trials(base, tmp_path, monkeypatch):
    with pytest.raises(
        ReftEdgeError,
        match=r"spent before a trial came to its end.*study\.db is kept.*another file with --study",
    ):
        reft_edge.tune(base, ROWS, tmp_path / "a.safetensors", budget="0.001s", **QUICK)
    told = []
    monkeypatch.setattr(search_run, "pace_of", lambda *arguments: search_run.Pace(1.0, 2.0))
    found = reft_edge.tune(
        base, ROWS, tmp_path / "b.safetensors", budget=60, trials=1, batch_size=2, report=told.append
    )
    assert found.best.steps == 9  # a fourth of 60 s, less three times 2 s
    assert any("each trial has 9" in text for text in told)


def test_no_trial_begins_that_would_not_come_to_its_end(base, tmp_path, monkeypatch):
    plain, told = search_run.run_trial, []

    def slow(*arguments):
        return dataclasses.replace(plain(*arguments), seconds=5000.0)

    monkeypatch.setattr(search_run, "run_trial", slow)
    found = reft_edge.tune(base, ROWS, tmp_path / "a.safetensors", budget="1h", report=told.append, **QUICK)
    assert len(found.tried) == 1
    assert any("too little for one more trial: the quickest so far took 5,000 s" in text for text in told)
    assert any(text.startswith("trial 0 after half of its steps: held-out loss ") for text in told)
    assert any("s of the budget are left" in text for text in told if text.startswith("trial 0 of 4 steps"))


def test_labels_are_searched_by_accuracy(device_folder, tmp_path):
    rows = [
        {"text": text * (1 + i % 3) + str(i), "label": label}
        for i in range(20)
        for text, label in (("loved it ", "good"), ("dull ", "bad"))
    ]
    found = reft_edge.tune(
        device_folder / "encoder-hf",
        rows,
        tmp_path / "a.safetensors",
        trials=3,
        max_steps=4,
        recipe="loreft-glue",
    )
    assert found.score == "accuracy"
    assert found.default.settings["positions"] == "f1"
    assert found.best.accuracy == max(one.accuracy for one in found.tried if one.state == "done")
    assert all("gen" not in one.settings["positions"] for one in found.tried)
    with pytest.raises(ReftEdgeError, match="a classifier generates no tokens"):
        reft_edge.tune(
            device_folder / "encoder-hf", rows, tmp_path / "b.safetensors", positions=["all+gen"], max_steps=2
        )


def test_preferences_and_held_out_rows_of_their_own(base, tmp_path):
    pairs = [{"prompt": f"Who are you, {i}?", "chosen": "a fox", "rejected": "a dog"} for i in range(6)]
    found = reft_edge.tune(
        base, pairs[:4], tmp_path / "a.safetensors", dev=pairs[4:], task="preference", trials=1, **QUICK
    )
    assert (found.score, found.rows, found.held_out) == ("accuracy", 4, 2)
    assert found.check.difference is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("1h", 3600), ("1h30m", 5400), ("0.5m", 30), (7, 7), ("2d", 172800)],
)
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "20 minutes", "1h-", "0s", -1, "-5m", "9999d", float("nan")])
def test_budgets_that_are_none(text):
    with pytest.raises(ReftEdgeError, match="the budget is"):
        parse_budget(text)


def test_rows_are_split_by_seed_with_the_same_texts_on_one_side():
    rows = [{"prompt": f"{i // 2}", "completion": "x"} for i in range(100)]
    trained, held = split_rows(row_source(rows), 0)
    assert isinstance(trained, RowsInMemory)
    sides = [{line for line in side.lines if line} for side in (trained, held)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 50
    assert sum(map(bool, held.lines)) == 20
    assert held.lines.index(next(line for line in held.lines if line)) > 0, "rows keep their numbers"
    assert split_rows(row_source(rows), 0) == (trained, held)
    assert split_rows(row_source(rows), 1) != (trained, held)


def test_of_each_label_some_rows_stay_and_some_are_held_out():
    rows = [{"text": f"{i}", "label": "rare" if i < 5 else "often"} for i in range(60)]
    sides = split_rows(row_source(rows), 4)
    labels = [[json.loads(line)["label"] for line in side.lines if line] for side in sides]
    assert [side.count("rare") for side in labels] == [4, 1]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "completion": "b"}] * 30, "its rows are too much alike"),
        (ROWS[:19], r"has 19 rows; to hold some out, expected 20 or more.*--dev"),
    ],
)
def test_too_few_rows(rows, said):
    with pytest.raises(ReftEdgeError, match=said):
        split_rows(row_source(rows), 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"interventions": ["lora"]}, "unknown intervention 'lora'"),
        ({"interventions": ["noreft:fast"]}, "unknown act_fn 'fast'"),
        ({"interventions": ["red:silu"]}, "red has no activation function"),
        ({"positions": ["x9"]}, "cannot read 'x9'"),
        ({"layers": ["9"]}, "no layer 9"),
        ({"ranks": [65]}, "rank is 65; expected 1 to 64"),
        ({"lr": (1e-2, 1e-3)}, "expected two positive numbers, the lower first"),
        ({"lr": (1e-2,)}, "lr has 1 numbers"),
        ({"score": "bleu"}, "unknown score 'bleu'"),
        ({"dev_share": 1.5}, "the share of held-out rows is 1.5"),
        ({"trials": 0}, "trials is 0"),
        ({"workers": 2}, "say with --ray"),
        ({"epoch": 2}, "there is no setting epoch"),
    ],
)
def test_wrong_arguments(base, tmp_path, options, said):
    with pytest.raises(ReftEdgeError, match=said):
        reft_edge.tune(base, ROWS, tmp_path / "a.safetensors", **{**QUICK, **options})
    assert not (tmp_path / "a.safetensors").exists()


def test_a_file_that_is_no_study(base, tmp_path):
    (path := tmp_path / "study.db").write_text("my notes, not a database " * 50)
    with pytest.raises(ReftEdgeError, match=r"cannot be used as a study: .*give another file with --study"):
        reft_edge.tune(base, ROWS, tmp_path / "a.safetensors", study=path, trials=1, **QUICK)
    assert path.read_text().startswith("my notes")


def test_what_is_written_has_names_of_its_own(base, tmp_path):
    for name, options in (("a.html", {}), ("a.bin", {"study": tmp_path / "a.bin"})):
        with pytest.raises(
            ReftEdgeError, match=r"the adapter and the .* would both be .*; give another name"
        ):
            reft_edge.tune(base, ROWS, tmp_path / name, **options, **QUICK)
    with pytest.raises(ReftEdgeError, match="the study and the page would both be"):
        reft_edge.tune(base, ROWS, tmp_path / "a", study=tmp_path / "b", plot=tmp_path / "b", **QUICK)
    assert not list(tmp_path.iterdir())


def test_differences_are_of_the_same_rows():
    random = np.random.default_rng(0)
    losses = random.uniform(1, 3, 200)
    one = Measured(tuple(losses - 0.5), (2,) * 200, (True,) * 200)
    other = Measured(tuple(losses), (2,) * 200, tuple(bool(i % 2) for i in range(200)))
    found = difference(one, other, "loss")
    assert found.mean == pytest.approx(0.25)
    assert found.low == pytest.approx(found.high) == pytest.approx(0.25)
    found = difference(other, one, "accuracy")
    assert found.mean == -0.5
    assert -0.6 < found.low < -0.5 < found.high < -0.4


def test_every_entry_of_the_space_can_be_trained():
    for layers, generates in ((1, True), (2, False), (3, True), (24, True), (30, False)):
        space = space_for(Narrowed(), layers, 64, generates)
        assert space.edits == tuple(map(str, EDITS))
        assert len(set(space.layers)) == len(space.layers)
        assert space.parameters(TrainSettings()) is not None
    assert space_for(Narrowed(), 24, 64, True).layers == ("all", "0-11", "12-23", "8-15", "3;7;11;15;19;23")
    assert narrowed(None, ["l1"], [], None, None) == Narrowed(positions=("l1",))
    assert narrowed("noreft", "l1", [3, [0, 2], "0-1"], None, None) == Narrowed(
        ("noreft",), ("l1",), ("3", "0;2", "0-1")
    )


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "300"})


def test_the_command(device_folder, tmp_path):
    (rows := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    given = [
        device_folder / "hf",
        rows,
        "-o",
        tmp_path / "best.safetensors",
        "--max-steps",
        4,
        "--batch-size",
        8,
    ]
    shown = run(*given, "--trials", 3, "--seed", 3)
    assert shown.exit_code == 0, shown.output
    for words in ("intervention", "loreft", "default", "measured again from the file", "best.html"):
        assert words in shown.output
    told = run(*given, "--trials", 4, "--seed", 3, "--json")
    found = json.loads(told.stdout)
    assert found["best"]["sha256"] == sha256_of(tmp_path / "best.safetensors")
    assert [one["number"] for one in found["tried"]] == [0, 1, 2, 3]
    assert set(found["check"]) >= {"loss", "accuracy", "difference", "better"}
    assert run(*given, "--lr", "fast").exit_code == 1
    assert "write LOW:HIGH" in run(*given, "--lr", "fast").output
    assert "write a time such as 90s, 20m" in run(*given, "--budget", "soon").output


def test_ctrl_c_on_the_command_line(device_folder, tmp_path, monkeypatch):
    (rows := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    plain, calls = search_run.run_trial, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(search_run, "run_trial", interrupted)
    given = [
        device_folder / "hf",
        rows,
        "-o",
        tmp_path / "a.safetensors",
        "--max-steps",
        4,
        "--batch-size",
        8,
    ]
    shown = run(*given)
    assert shown.exit_code == 130
    assert "a.safetensors is the best trial's so far; the same command goes on from here" in shown.output
    assert "Traceback" not in shown.output
    calls[:] = [1]  # the next trial is interrupted
    again = run(*given)
    assert "which has 2 trials; the best so far is trial 0, held-out loss " in again.output
    assert "best, default" in again.output, "what earlier runs tried is shown, too"
    assert "a.safetensors is the best trial's so far" in again.output


def test_settings_are_those_of_train():
    fields = {field.name for field in dataclasses.fields(TrainSettings)}
    from reft_edge.search.space import SEARCHED

    assert set(SEARCHED) <= fields
