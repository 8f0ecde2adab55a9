"""The documentation's own commands, executed: its guides on a tiny model in place of the real one; and its links."""

import pydoc
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import reft_edge.runtime
from reft_edge.cli import app
from reft_edge.convert.control_vector import write_control_vector

ROOT = Path(__file__).parent.parent
ORDER = re.findall(
    r"- (?:.+: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
)
GUIDES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ORDER if (ROOT / "docs" / name).is_file())]
"""The README and docs/ in the order of the site: what a page needs was made by one before it."""
OTHERS = ("examples/README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*GUIDES, *(ROOT / name for name in OTHERS)]
COMMANDS = {
    *("train", "export", "add-ports", "run", "eval", "compare", "inspect", "pack"),
    *("shrink", "keygen", "sign", "verify", "push", "pull", "list", "devices"),
    *("convert", "merge"),
}


def text_of(pages: list[Path]) -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("reft-edge ")]


def run(arguments: list[str], model: Path) -> None:
    here = [{"smollm2": str(model), "9;14;19;24": "0;2"}.get(part, part) for part in arguments]
    text = "I loved it\nDull.\n" if here[-2:] == ["<", "texts.txt"] else None
    result = CliRunner().invoke(app, here[:-2] if text else here, input=text)
    assert result.exit_code == 0, (arguments, result.output)


def test_the_guides_run_as_written(
    device_folder, tiny_model, torch_onnx_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # TRL tells its makers of every other run
    shutil.copytree(torch_onnx_folder, "smol_onnx")
    shutil.copytree(device_folder / "encoder-hf", "minilm-hf")
    for name, rows in re.findall(
        r'^```json title="(.+?)"\n(.*?)^```', text_of(GUIDES), re.DOTALL | re.MULTILINE
    ):
        Path(name).write_text(rows)
    assert {path.name for path in Path().glob("*.jsonl")} == {"rows.jsonl", "reviews.jsonl"}
    Path("test.jsonl").write_text('{"prompt": "2 and 2?", "choices": ["4", "5"], "answer": 0}\n')
    size = tiny_model.config.hidden_size
    write_control_vector(Path("happy.gguf"), {2: np.ones(size, np.float32)}, "llama")
    done: list[list[str]] = []
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        for arguments in commands(text):
            if arguments not in done:  # the README shows what guides show, too
                done.append(arguments)
                if arguments[0] != "serve":  # it does not end; tests/serving/test_server.py
                    run(arguments, device_folder / "hf")
        for example in blocks("python", text):
            capsys.readouterr()
            here = example.replace('"smollm2"', repr(str(device_folder / "hf")))
            exec(compile(here, page.name, "exec"), {})
            assert capsys.readouterr().out.strip()
    assert {arguments[0] for arguments in done} == COMMANDS | {"serve"}


def test_the_set_up_commands_name_real_extras_and_commands():
    demo, tests = (block for block in blocks("sh", text_of(GUIDES[:1])) if "venv" in block)
    assert demo.strip().endswith("reft-edge demo")
    assert tests.strip().endswith("/pytest -n auto")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {name for group in re.findall(r"\[([a-z,]+)\]'", text_of(PAGES)) for name in group.split(",")}
    assert len(extras) > 5
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def test_options_named_in_the_text_exist():
    named = set(re.findall(r"`(--[a-z-]+)", text_of(GUIDES)))
    helps = "".join(
        CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
        for command in (*sorted(COMMANDS), "serve", "rollback", "tune", "train-many")
    )
    missing = [option for option in sorted(named) if option not in helps]
    assert missing == []


@pytest.mark.parametrize(
    "script", sorted(set(re.findall(r"(?:python|sh) (benchmarks/[\w/]+\.\w+)", text_of(GUIDES))))
)
def test_benchmarks_named_exist(script):
    assert (ROOT / script).is_file()


def test_the_readme_is_short_and_every_page_has_its_place():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(ORDER)


def test_the_reference_shows_what_there_is():
    shown = re.findall(r"^::: (\S+)$", text_of([ROOT / "docs/reference.md"]), re.MULTILINE)
    assert [name for name in shown if pydoc.locate(name) is None] == []
    assert {f"reft_edge.runtime.{name}" for name in reft_edge.runtime.__all__} <= set(shown)


def prose(page: Path) -> list[str]:
    """A page's lines without those of fenced code, which stay as empty ones."""
    fenced, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        lines.append("" if fenced else line)
    return lines


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs both name a page's headings."""
    titles = (re.sub(r"^#+ ", "", line) for line in prose(page) if re.match(r"#+ ", line))
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w -]", "", title.lower())) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        name, _, anchor = link.partition("#")
        if re.match(r"https?:", name):
            continue
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_and_headings_stand_alone(page):
    lines = prose(page)
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))] == []
    for number, line in enumerate(lines):
        if line.startswith("#") and number:
            assert lines[number - 1] == "", line
            assert lines[number + 1] == "", line
