"""Recipes: the paper's settings become the options' defaults, are printed, and give way to the user's own."""

import inspect
import json

import pytest
from typer.testing import CliRunner

from reft_edge.adapter.file import read_config
from reft_edge.cli import app
from reft_edge.commands.train import train
from reft_edge.errors import ReftEdgeError
from reft_edge.training.recipes import RECIPES, recipe
from reft_edge.training.settings import TrainSettings

FIGURES = {  # examples/loreft of pyreft 0.1.0
    "loreft-commonsense": {
        "rank": 8,
        "layers": "all",
        "positions": "f7+l7",
        "tied": True,
        "lr": 9e-4,
        "epochs": 6,
    },
    "loreft-math": {"rank": 8, "positions": "f7+l7", "tied": True, "lr": 9e-4, "epochs": 12, "warmup": 0.1},
    "instruct": {"rank": 4, "layers": "3;9;18;24", "positions": "f5+l5", "tied": False, "epochs": 9},
    "loreft-glue": {"rank": 1, "layers": "all", "positions": "f1", "batch_size": 32},
}
ROWS_A_STEP = {"loreft-commonsense": 32, "loreft-math": 32, "instruct": 128, "loreft-glue": 32}


@pytest.mark.parametrize("name", FIGURES)
def test_recipes_of_loreft_hold_the_papers_figures(name):
    values = recipe(name)
    assert values.items() >= FIGURES[name].items()
    assert values["batch_size"] * values["accumulate"] == ROWS_A_STEP[name]
    assert (values["intervention"], values["start"]) == ("loreft", "random")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_only_real_options(name):
    values = recipe(name)
    parameters = inspect.signature(train).parameters
    for option, value in values.items():
        assert type(value) is type(parameters[option].default), option
    known = {key: value for key, value in values.items() if key not in ("task", "max_length")}
    TrainSettings(**known)


@pytest.mark.parametrize("name", ["commonsense", "math", "instruct"])
def test_the_recipe_of_a_task_runs_on_a_folder_with_the_ports_of_every_export(name):
    assert recipe(name).get("act_fn", "linear") == "linear"
    assert recipe(name)["intervention"] != "red"


def test_an_unknown_recipe_is_refused():
    with pytest.raises(
        ReftEdgeError, match="commonsense, math, instruct, glue, loreft-commonsense, loreft-math, loreft-glue"
    ):
        recipe("soup")
    done = CliRunner().invoke(app, ["train", "x", "y", "-o", "z", "--recipe", "soup"])
    assert done.exit_code == 2
    assert "soup" in done.output


@pytest.mark.parametrize("recipe_first", [True, False])
def test_a_recipe_sets_what_is_not_given_and_prints_all(device_folder, tmp_path, recipe_first):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "a.safetensors"
    rows.write_text(json.dumps({"prompt": "Who?", "completion": "ice"}))
    chosen = ["--recipe", "loreft-math"]
    own = ["--rank", "2", "--untied", "--max-steps", "1"]
    options = [*chosen, *own] if recipe_first else [*own, *chosen]
    done = CliRunner().invoke(
        app, ["train", str(device_folder / "hf"), str(rows), "-o", str(output), *options]
    )
    assert done.exit_code == 0, done.output
    config = read_config(output)
    assert (config.rank, config.tied, config.positions) == (2, False, "f7+l7")
    assert config.training["lr"] == 9e-4
    assert config.training["accumulate"] == 2
    printed = {line.split()[0]: line for line in done.output.splitlines() if line.startswith("  ")}
    assert set(RECIPES["loreft-math"]) <= set(printed)
    assert "the recipe has 8" in printed["rank"]
    assert "yours" not in printed["lr"]


def test_the_next_command_does_not_inherit_a_recipe(device_folder, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "a.safetensors"
    rows.write_text(json.dumps({"prompt": "Who?", "completion": "ice"}))
    arguments = ["train", str(device_folder / "hf"), str(rows), "-o", str(output), "--max-steps", "1"]
    for extra, rank in ((["--recipe", "loreft-math"], 8), ([], 4)):
        assert CliRunner().invoke(app, [*arguments, *extra]).exit_code == 0
        assert read_config(output).rank == rank


def test_a_recipe_whose_adapter_needs_other_ports_says_so(device_folder, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "a.safetensors"
    rows.write_text("".join(json.dumps({"text": text, "label": text}) + "\n" for text in ("ice", "fire")))
    arguments = ["train", str(device_folder / "encoder-hf"), str(rows), "-o", str(output), "--max-steps", "1"]
    told = "export the model with --ports affine,act"
    done = CliRunner().invoke(app, [*arguments, "--recipe", "glue"])
    assert done.exit_code == 0, done.output
    assert told in " ".join(done.output.split())
    done = CliRunner().invoke(app, [*arguments, "--recipe", "loreft-glue"])
    assert done.exit_code == 0, done.output
    assert "--ports" not in done.output
