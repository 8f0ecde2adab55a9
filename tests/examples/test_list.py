"""The list of examples is whole, and what it names is there."""

import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTS = {
    "train_export_swap.ipynb": "tests/examples/test_notebook.py",
    "app.py": "tests/examples/test_app.py",
    "browser": "runtime/web/test/example.test.ts",
    "c": "tests/examples/test_c.py",
    "fleet": "tests/examples/test_fleet.py",
}
"""Every example, and what runs it."""


def test_every_example_is_listed_and_has_a_test():
    there = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    listed = re.findall(
        r"^\| \[[^]]+\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert there == {link.split("/")[0] for link in listed} == set(TESTS)
    for test in TESTS.values():
        assert (EXAMPLES.parent / test).is_file()


def test_paths_in_its_commands_are_there():
    text = (EXAMPLES / "README.md").read_text("utf-8")
    named = re.findall(r"(?<![\w/.])((?:examples|runtime)/[\w./-]+)", text)
    assert len(named) >= 4
    assert [path for path in named if not (EXAMPLES.parent / path).exists()] == []


def test_the_browser_example_imports_what_the_loader_exports():
    page = (EXAMPLES / "browser/page.js").read_text("utf-8")
    exported = (EXAMPLES.parent / "runtime/web/src/index.ts").read_text("utf-8")
    for name in re.findall(r"import \{ (.+?) \} from \"reft-edge-web\"", page)[0].split(", "):
        assert re.search(rf"\b{name}\b", exported), name
