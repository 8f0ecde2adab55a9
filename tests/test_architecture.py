"""Which part of the package may import which. The table is the whole truth: an arrow that is not in it fails here."""

import ast
import importlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"reft_edge": "reft_edge", "export": "reft_edge.export", "runtime": "reft_edge.runtime"}
"""Folders of this repository, with the names under which they are imported."""

SHARED = {
    "deadline",
    "errors",
    "extras",
    "files",
    "folders",
    "json_files",
    "jsonl",
    "locks",
    "strict_json",
    "terminal",
    "unfinished",
    "unicode",
}
"""Small modules without a subject of their own; anything may import them."""

MAY_IMPORT = {
    "terminal": set(),
    "errors": {"terminal"},
    "deadline": {"errors"},
    "extras": {"errors"},
    "strict_json": {"errors"},
    "unicode": {"errors"},
    "locks": {"errors"},
    "unfinished": {"locks"},
    "files": {"errors", "unfinished"},
    "folders": {"errors", "unfinished"},
    "json_files": {"errors", "files", "unicode"},
    "jsonl": {"errors", "files"},
    "rows": SHARED,
    "model": SHARED,
    "adapter": SHARED | {"model"},
    "signing": SHARED | {"adapter"},
    "steering": SHARED | {"adapter", "model"},
    "shipping": SHARED | {"adapter", "model", "signing"},
    "runtime": SHARED | {"adapter", "model", "signing"},
    "training": SHARED | {"adapter", "model", "rows", "steering"},
    "export": SHARED | {"adapter", "model", "runtime", "steering"},
    "evaluation": SHARED | {"adapter", "model", "rows", "runtime", "signing", "steering"},
    "inspection": SHARED | {"adapter", "model", "rows", "steering", "training"},
    "cluster": {"errors", "extras"},
    "search": SHARED | {"adapter", "cluster", "inspection", "model", "rows", "steering", "training"},
    "convert": SHARED | {"adapter", "model", "runtime", "steering"},
    "arguments": SHARED | {"signing"},
    "lm_eval": SHARED | {"model", "runtime"},
    "frozen_model": SHARED | {"adapter", "arguments", "evaluation", "model", "signing", "training"},
    "adapter_files": SHARED | {"adapter", "arguments", "convert", "model", "shipping", "signing"},
    "many_trainings": SHARED | {"arguments", "frozen_model", "many", "rows", "search", "training"},
    "many": SHARED | {"adapter_files", "cluster", "model", "rows", "training"},
    "serving": SHARED | {"model", "runtime", "shipping", "signing"},
    "api": SHARED
    | {
        "adapter_files",
        "arguments",
        "evaluation",
        "export",
        "frozen_model",
        "many_trainings",
        "model",
        "rows",
        "signing",
        "training",
    },
}
"""Of every part, the parts that it may import, at the top of a module or inside a function. `commands` and `cli` may
import all of them, and nothing but `__main__` imports those."""

NEVER_ON_A_DEVICE = ("torch", "transformers", "onnx_ir", "accelerate")
ON_A_DEVICE = ("runtime", "signing", "shipping")
"""Parts that run where none of those packages is installed."""


MOST_LINES = 400
LONG_MODULES: dict[str, str] = {}
"""Modules of more than MOST_LINES lines, and why."""
MOST_LINES_OF_A_FUNCTION = 80
LONG_FUNCTIONS = {
    "reft_edge.api.train": "two dozen arguments and what each of them means; its code has 30 lines",
    "reft_edge.many_trainings.tune": "the same; its code has 35 lines",
}
"""Functions of more than MOST_LINES_OF_A_FUNCTION lines, and why."""


def modules() -> dict[str, Path]:
    found = {}
    for folder, name in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "node_modules" not in parts:
                found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "reft_edge"


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree. Python 3.11 counts the depth of all threads' trees together, and stops where two meet; threads
    of other tests may still run."""
    source = path.read_text(encoding="utf-8")
    for _ in range(20):
        with suppress(SystemError):
            return ast.parse(source)
    raise AssertionError(f"{path} cannot be parsed")


def imports(module: str, only_at_the_top: bool = False) -> Iterator[str]:
    """Full names of the modules that a module imports."""
    tree = parsed(MODULES[module])
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else node.module


def own_imports(module: str, only_at_the_top: bool = False) -> set[str]:
    return {found for found in imports(module, only_at_the_top) if found in MODULES and found != module}


@pytest.mark.parametrize(
    "name", sorted({part(module) for module in MODULES} - {"commands", "cli", "__main__", "reft_edge"})
)
def test_a_part_imports_what_the_table_allows(name: str) -> None:
    found = {
        (module, other)
        for module in MODULES
        if part(module) == name
        for other in own_imports(module)
        if part(other) not in {name, "reft_edge", *MAY_IMPORT[name]}
    }
    assert not found


def test_the_table_has_no_circle() -> None:
    left = dict(MAY_IMPORT)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_no_module_imports_itself_by_way_of_others() -> None:
    arrows = {module: own_imports(module, only_at_the_top=True) for module in MODULES}
    while free := [module for module, others in arrows.items() if not others & arrows.keys()]:
        for module in free:
            del arrows[module]
    assert not arrows


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_what_a_device_runs_imports_no_torch(name: str) -> None:
    found = {
        (module, other)
        for module in MODULES
        if part(module) == name
        for other in imports(module)
        if other.split(".")[0] in NEVER_ON_A_DEVICE
    }
    assert not found


def test_modules_are_short() -> None:
    """Whoever shortens one takes it from the table."""
    long = {
        module
        for module, path in MODULES.items()
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    }
    assert long == LONG_MODULES.keys()


def test_functions_are_short() -> None:
    """The options of a command are not counted: they are its help."""
    long = {
        f"{module}.{name}"
        for module, path in MODULES.items()
        if not module.startswith("reft_edge.runtime.web.")
        for name, lines in function_lines(path, heads=part(module) != "commands")
        if lines > MOST_LINES_OF_A_FUNCTION
    }
    assert long == LONG_FUNCTIONS.keys()


def function_lines(path: Path, heads: bool) -> Iterator[tuple[str, int]]:
    """Name and lines of every function and method, with or without the line of `def` and its parameters."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - (node if heads else node.body[0]).lineno + 1


def test_what_is_read_beside_the_modules_is_in_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {
        package: ROOT / settings["package-dir"].get(package, package.replace(".", "/"))
        for package in settings["packages"]
    }
    named = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in packages[package].glob(pattern)
    }
    read = {
        path
        for folder in (ROOT / "reft_edge", ROOT / "export", ROOT / "runtime")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "web" not in path.parts
    }
    assert read == named


def test_every_package_is_in_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert found == set(settings["packages"])


@pytest.mark.parametrize("folder", ["benchmarks", "fuzz"])
def test_what_scripts_import_is_there(folder: str) -> None:
    """They are run now and then only, and would break unseen."""
    missing = [
        f"{path.name}: {node.module}.{alias.name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reft_edge")
        for alias in node.names
        if not _is_there(node.module or "", alias.name)
    ]
    assert not missing


def _is_there(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}") is not None
