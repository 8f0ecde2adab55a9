"""From a user's rows to a training: what `train`, `eval` and `inspect` say of rows, and that they read the same ones."""

import json

import pytest
from typer.testing import CliRunner

import reft_edge
from reft_edge.adapter.file import read_config
from reft_edge.cli import app
from reft_edge.errors import ReftEdgeError


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def trained(device_folder, tmp_path, rows, **options):
    told = []
    output = tmp_path / "x.safetensors"
    options = {"positions": "f1+l1", "rank": 2, "max_steps": 1, "dtype": "fp32", **options}
    reft_edge.train(device_folder / "hf", rows, output, report=told.append, **options)
    return told, read_config(output).training


def test_every_answer_is_counted_and_those_beyond_the_context_are_left_out(device_folder, tmp_path):
    rows = [{"messages": turns("Who?", "ice", "And?", "melts")}, {"messages": turns("a " * 300, "b")}]
    told, _ = trained(device_folder, tmp_path, rows, evaluation=rows[:1], max_length=4000)
    assert told[:3] == [
        "read 2 rows of the list of rows as conversations (messages)",
        "they have 3 answers, each trained behind what comes before it",
        "1 of 3 answers are longer than 256 tokens with their prompts and are left out",
    ]
    assert "held out: read 1 row of the list of rows as conversations (messages)" in told
    told, _ = trained(device_folder, tmp_path, rows, last_turn=True)
    assert "1 of 2 rows are longer than 256 tokens and are left out" in told
    assert any(text.startswith("earlier answers that are context only") for text in told)


def test_one_file_in_two_formats_trains_the_same_adapter(device_folder, tmp_path):
    (tmp_path / "x.csv").write_text("question;output\nWho?;ice\nWhat?;melts\n")
    rows = [{"instruction": "Who?", "output": "ice"}, {"instruction": "What?", "output": "melts"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    columns = {"instruction": "question"}
    told, one = trained(device_folder, tmp_path, tmp_path / "x.csv", columns=columns)
    assert told[0] == f"read 2 rows of {tmp_path / 'x.csv'} as Alpaca (instruction, output)"
    _, other = trained(device_folder, tmp_path, str(tmp_path / "x.json"))
    assert one["loss"] == other["loss"]
    with pytest.raises(ReftEdgeError, match="is for a dataset of the Hub"):
        trained(device_folder, tmp_path, tmp_path / "x.csv", split="train")


def test_the_commands_say_what_they_read(device_folder, tmp_path):
    table = tmp_path / "x.csv"
    table.write_text('question,choices,answer\nWho?,"[""ice"", ""dog""]",ice\n')

    def call(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done

    named = ("--columns", "prompt=question")
    done = call("eval", device_folder / "export", table, *named, "--json")
    assert f"read 1 row of {table} as questions (prompt, choices, answer)" in done.stderr
    read = {"source": str(table), "rows": 1, "shape": "questions (prompt, choices, answer)"}
    assert json.loads(done.stdout)["data"] == read
    adapter = device_folder / "first.safetensors"
    done = call("inspect", adapter, "--model", device_folder / "hf", "--data", table, *named)
    assert f"read 1 row of {table} as prompts (prompt)" in done.stderr
    done = CliRunner().invoke(
        app, ["eval", str(device_folder / "export"), str(table), "--columns", "prompt=nothing"]
    )
    assert done.exit_code == 1
    assert "it has no column 'nothing' to rename" in " ".join(done.stderr.split())
