"""A list of trainings of one base, as a TOML file or dicts say it."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text, sha256_of
from reft_edge.rows.given import held_out_source, row_source
from reft_edge.training.session import Wanted
from reft_edge.training.settings import Execution, TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OF_BASE = ("dtype", "load_in", "base_weights")
"""What all tasks have in common, beside the model."""
_OF_LIST = ("model", "folder", *_OF_BASE, "defaults", "task")
_OF_ROWS = ("data", "eval", "split", "eval_split", "config", "columns")
_OF_TASK = ("name", *_OF_ROWS, "output", "push", "task", "raw", "max_length", "recipe", "last_turn")
_SETTINGS = {field.name for field in fields(TrainSettings)} - {"prompt_format", *_OF_BASE}
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(
        ("data", "eval", "split", "eval_split", "config", "output", "push", "task", "recipe"), (str, "a text")
    ),
    **dict.fromkeys(("raw", "last_turn"), (bool, "true or false")),
    "columns": (Mapping, "a table of names"),
    "max_length": (int, "a whole number"),
}


@dataclass(frozen=True)
class Task:
    """One training."""

    name: str
    output: Path
    push: str | None
    """A repository."""
    given: dict[str, Any]
    """What was said of it, defaults included."""
    folder: Path
    """What its paths are relative to."""

    def wanted(self, base: "Base", resume: bool) -> Wanted:
        """Raises ReftEdgeError for rows that are named wrongly."""
        given = self.given
        data, dev = (self._place(given.get(name)) for name in ("data", "eval"))
        assert data is not None
        config, columns = given.get("config"), given.get("columns")
        return Wanted(
            row_source(data, given.get("split"), config, columns),
            self.output,
            held_out_source(dev, given.get("eval_split"), config, columns),
            given.get("task"),
            given.get("raw", False),
            given.get("max_length"),
            given.get("recipe"),
            base.base_weights,
            resume=resume,
            execution=Execution(base.device),
            last_turn=given.get("last_turn", False),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of TrainSettings."""
        return {name: value for name, value in self.given.items() if name in _SETTINGS}

    def digest(self, base: "Base") -> str:
        """Of all that decides what is trained, the rows of files included. Raises ReftEdgeError for a file that cannot be read."""
        said = {name: value for name, value in self.given.items() if name not in ("push", "output")}
        rows = {}
        for name in ("data", "eval"):
            place = self._place(self.given.get(name))
            if place is not None and Path(place).is_file():
                try:
                    rows[name] = sha256_of(Path(place))
                except OSError as error:
                    raise ReftEdgeError(f"cannot read {place}: {error.strerror}") from error
        about = [said, rows, base.model, base.settings, str(base.base_weights)]
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def _place(self, given: str | None) -> str | None:
        """A file of the task's folder; a dataset of the Hub as it stands."""
        if given is None or given.startswith("hub:"):
            return given
        there = self.folder / given
        return str(there) if there.exists() or there.suffix else given


@dataclass(frozen=True)
class Base:
    """What all tasks are trained on."""

    model: str
    settings: dict[str, Any]
    """`dtype` and `load_in`, where they are said."""
    base_weights: Path | None
    device: str | None


@dataclass(frozen=True)
class TaskList:
    """Tasks of one base."""

    base: Base
    tasks: tuple[Task, ...]


def read_tasks(path: Path, model: str | None = None, device: str | None = None) -> TaskList:
    """A TOML file; its paths are relative to its folder. `model` takes the place of the file's.

    Raises ReftEdgeError for a file that cannot be read, and for what it must not hold.
    """
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ReftEdgeError(f"{path} is not TOML: {error}") from error
    return parse_tasks(content, path.parent, str(path), model, device)


def parse_tasks(
    content: Mapping[str, Any], folder: Path, source: str, model: str | None = None, device: str | None = None
) -> TaskList:
    """The same of what such a file holds; `source` stands for it in messages."""
    _check_known(source, content, _OF_LIST)
    base = _base(content, folder, source, model, device)
    defaults = content.get("defaults", {})
    _check_table(f"{source}, defaults", defaults, {*_OF_TASK, *_SETTINGS} - {"name", "output"})
    given = content.get("task")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ReftEdgeError(f"{source} has no tasks; write [[task]] with a name and data for each")
    results = folder / _text(content.get("folder", "."), f"{source}: folder")
    tasks = tuple(
        _task(f"{source}, task {number}", one, defaults, folder, results)
        for number, one in enumerate(given, 1)
    )
    for what, names in (
        ("name", [task.name for task in tasks]),
        ("output", [str(task.output) for task in tasks]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ReftEdgeError(f"{source}: two tasks have the {what} {twice[0]}; give each its own")
    return TaskList(base, tasks)


def _base(
    content: Mapping[str, Any], folder: Path, source: str, model: str | None, device: str | None
) -> Base:
    named = content.get("model")
    if model is None:
        if not isinstance(named, str) or not named:
            raise ReftEdgeError(f'{source} names no model; write model = "NAME" at its top, or give --model')
        model = str(folder / named) if (folder / named).exists() else named
    weights = content.get("base_weights")
    settings = {name: content[name] for name in ("dtype", "load_in") if name in content}
    return Base(
        model,
        settings,
        None if weights is None else folder / _text(weights, f"{source}: base_weights"),
        device,
    )


def _task(where: str, given: Any, defaults: Mapping[str, Any], folder: Path, results: Path) -> Task:
    if not isinstance(given, Mapping):
        raise ReftEdgeError(f"{where} is a {type(given).__name__}; expected a table")
    name = given.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]{0,99}", name, re.ASCII):
        raise ReftEdgeError(
            f"{where} has the name {name!r:.100}; expected letters, digits, dots, dashes or underscores"
        )
    _check_table(f"{where} ({name})", given, {*_OF_TASK, *_SETTINGS})
    said = {**defaults, **given}
    if "data" not in said:
        raise ReftEdgeError(f"{where} ({name}) has no data; name its rows")
    output = folder / said["output"] if "output" in said else results / f"{name}.safetensors"
    repository = said.get("push")
    if repository is not None and "://" not in repository:
        repository = str(folder / repository)
    return Task(name, output, repository, said, folder)


def _check_table(where: str, given: Any, known: set[str]) -> None:
    """Raise ReftEdgeError for what is no table of these names."""
    if not isinstance(given, Mapping):
        raise ReftEdgeError(f"{where}: this is a {type(given).__name__}; expected a table")
    if shared := [name for name in _OF_BASE if name in given]:
        raise ReftEdgeError(f"{where}: {shared[0]} is of the base, which all tasks share; say it at the top")
    _check_known(where, given, known)
    for name, (kind, expected) in _KINDS.items():
        if name in given and not (
            isinstance(given[name], kind) and (kind is bool or given[name] is not True)
        ):
            raise ReftEdgeError(f"{where}: {name} is {given[name]!r:.100}; expected {expected}")


def _check_known(where: str, given: Mapping[str, Any], known: Any) -> None:
    if unknown := sorted(given.keys() - set(known)):
        raise ReftEdgeError(
            f"{where}: there is no {unknown[0]!r}; expected one of {', '.join(sorted(known))}"
        )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ReftEdgeError(f"{where} is {value!r:.100}; expected a text")
    return value
