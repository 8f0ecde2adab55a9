"""The README's own commands, executed: its guides on a tiny model in place of the real one."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reft_edge.cli import app
from reft_edge.convert.control_vector import write_control_vector
from tests.helpers.foreign import export_dynamo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("reft-edge ")]


def test_the_guides_run_as_written(device_folder, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_dynamo(tiny_model, Path("smol_onnx"), cached=True)
    shutil.copytree(device_folder / "encoder-hf", "minilm-hf")
    for name, rows in zip(("rows.jsonl", "reviews.jsonl"), blocks("json"), strict=True):
        Path(name).write_text(rows)
    Path("test.jsonl").write_text('{"prompt": "2 and 2?", "choices": ["4", "5"], "answer": 0}\n')
    size = tiny_model.config.hidden_size
    write_control_vector(Path("happy.gguf"), {2: np.ones(size, np.float32)}, "llama")
    used = []
    for arguments in commands():
        if arguments[0] == "serve":  # it does not end; tests/serving/test_server.py
            continue
        here = [
            {"smollm2": str(device_folder / "hf"), "9;14;19;24": "0;2"}.get(part, part) for part in arguments
        ]
        text = "I loved it\nDull.\n" if here[-2:] == ["<", "texts.txt"] else None
        result = CliRunner().invoke(app, here[:-2] if text else here, input=text)
        assert result.exit_code == 0, (arguments, result.output)
        used.append(arguments[0])
    assert set(used) == {
        *("train", "export", "add-ports", "run", "eval", "compare", "inspect", "pack"),
        *("shrink", "keygen", "sign", "verify", "push", "pull", "list"),
        *("convert", "merge"),
    }
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def test_the_set_up_commands_name_real_extras_and_commands():
    demo, tests = (block for block in blocks("sh") if "venv" in block)
    assert demo.strip().endswith("reft-edge demo")
    assert tests.strip().endswith("/pytest")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in {name for group in re.findall(r"\[([a-z,]+)\]'", demo + tests) for name in group.split(",")}:
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def test_options_named_in_the_text_exist():
    named = set(re.findall(r"`(--[a-z-]+)", README))
    helps = "".join(
        CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
        for command in (
            *("train", "export", "add-ports", "run", "serve", "eval", "compare", "inspect", "pack"),
            *("shrink", "keygen", "sign", "verify", "push", "pull", "list", "rollback"),
            *("convert", "merge"),
        )
    )
    missing = [option for option in sorted(named) if option not in helps]
    assert missing == []


@pytest.mark.parametrize("script", re.findall(r"python (benchmarks/[\w/]+\.py)", README))
def test_benchmarks_named_exist(script):
    assert (ROOT / script).is_file()
