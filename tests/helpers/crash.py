"""A process that is killed, or a machine that loses power, at any step of what it does to files.

`Disk` stands between the code and `Path.unlink`, `Path.mkdir`, `os.open` with `os.fdopen`, `os.replace` and `os.fsync`, for one folder. Every
call is a step, a write two: its first half, and the rest. It kills the process before a step, or records them all;
`after_power_cut` then makes the folders that may be found when the power went after some of them.

What a library does of its own accord, for a lock for example, is no step. Two things show that no step is missing: Python's
own report of each change that the project's code makes (`missed`), and the folder itself, which the steps must explain.
"""

import io
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Disk:
    def __init__(self, root: Path, kill_before: int | None = None) -> None:
        self.root, self.kill_before = root, kill_before
        self.steps: list[tuple[str, Any, Any]] = []
        self._saved: list[tuple[Any, str, Any]] = []
        self._descriptors: dict[int, Path] = {}
        self._written: dict[int, Path] = {}
        self._seen: list[str] = []

    def step(self, kind: str, first: Any, second: Any = None) -> None:
        if len(self.steps) == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps.append((kind, first, second))

    def __enter__(self) -> "Disk":
        disk = self
        plain_unlink, plain_mkdir, plain_fdopen = Path.unlink, Path.mkdir, os.fdopen
        plain_replace, plain_fsync, plain_open = os.replace, os.fsync, os.open

        class Watched(io.FileIO):
            def write(self, data: Any) -> int:
                data = bytes(data)
                half = len(data) // 2
                for piece in (data[:half], data[half:]):
                    disk.step("write", disk._written[self.fileno()], piece)
                    super().write(piece)
                return len(data)

            def truncate(self, size: int | None = None) -> int:
                disk.step("truncate", disk._written[self.fileno()], size)
                return super().truncate(size)

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if disk.holds(path):
                disk.step("unlink", path)
            plain_unlink(path, missing_ok=missing_ok)

        def mkdir(path: Path, *rest: Any, **options: Any) -> None:
            if disk.holds(path):
                disk.step("mkdir", path)
            plain_mkdir(path, *rest, **options)

        def replace(source: Any, target: Any) -> None:
            if disk.holds(target):
                disk.step("replace", Path(source), Path(target))
            plain_replace(source, target)

        def open_(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            watched = disk.holds(path) and flags & (os.O_WRONLY | os.O_RDWR)
            if watched:
                disk.step("open", Path(path), "w" if flags & os.O_TRUNC else "a")
            descriptor = plain_open(path, flags, *rest, **options)
            disk._descriptors[descriptor] = Path(os.fsdecode(path))
            disk._written.pop(descriptor, None)
            if watched:
                disk._written[descriptor] = Path(path)
            return descriptor

        def fdopen(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if descriptor in disk._written:
                return Watched(descriptor, mode.replace("b", ""))
            return plain_fdopen(descriptor, mode, *rest, **options)

        def fsync(descriptor: int) -> None:
            path = disk._descriptors[descriptor]
            if disk.holds(path):
                disk.step("fsync", path)
            plain_fsync(descriptor)

        for owner, name, new in (
            (Path, "unlink", unlink),
            (Path, "mkdir", mkdir),
            (os, "replace", replace),
            (os, "open", open_),
            (os, "fdopen", fdopen),
            (os, "fsync", fsync),
        ):
            self._saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, new)
        _watchers.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watchers.remove(self)
        for owner, name, old in self._saved:
            setattr(owner, name, old)

    def holds(self, path: Any) -> bool:
        """Whether the path is in the folder, and the project's own code, not a library of its, is using it."""
        return Path(os.fsdecode(path)).is_relative_to(self.root) and _asked_by() == "reft_edge"

    @property
    def missed(self) -> int:
        """Changes that the project's code made in the folder, as Python itself reports them, that were no steps."""
        known = sum(kind in ("open", "unlink", "mkdir", "replace") for kind, _, _ in self.steps)
        return len(self._seen) - known


_watchers: list[Disk] = []


def _asked_by() -> str:
    """The package that made the call: of the stack's innermost frame that is neither Python's own nor of this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in sys.stdlib_module_names and frame.f_code.co_filename != __file__:
            return package
        frame = frame.f_back
    return ""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if not writes or not isinstance(path, (str, bytes, os.PathLike)):
        return
    for disk in _watchers:
        if disk.holds(path):
            disk._seen.append(f"{event} {os.fsdecode(path)}")


sys.addaudithook(_audit)


def killed_at_every_step(before: Path, target: Path, run: Callable[[Path], object]) -> Iterator[Path]:
    """Copies of a folder in which `run` was killed before its first step, its second and so on; in the last it ended."""
    for count in itertools.count():
        folder = target / str(count)
        shutil.copytree(before, folder)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with Disk(folder, kill_before=count):
                    run(folder)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            yield folder
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield folder


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.content = self.durable = content


def after_power_cut(before: Path, disk: Disk, count: int, target: Path) -> Iterator[Path]:
    """The folders that a machine may come up with when the power goes after `count` steps: names are lost that their
    folder's fsync did not save, of any of the folders, and the contents of files that were not flushed themselves.

    `before` is a copy of how the folder was when the steps began. Each is made at `target` with a number.
    """
    known = {Path(): {}} | {path.relative_to(before): {} for path in before.rglob("*") if path.is_dir()}
    for path in before.rglob("*"):
        place = path.relative_to(before)
        known[place.parent][place.name] = None if path.is_dir() else _File(path.read_bytes())
    saved = {place: dict(names) for place, names in known.items()}
    for kind, first, second in disk.steps[:count]:
        place = first.relative_to(disk.root)
        names = known.get(place.parent, {})
        if kind == "mkdir":
            if place not in known:
                names[place.name] = None
                known[place], saved[place] = {}, {}
        elif kind == "open":
            file = names.setdefault(place.name, _File())
            if "w" in second:
                file.content = b""
        elif kind == "write":
            names[place.name].content += second
        elif kind == "truncate":
            names[place.name].content = names[place.name].content[:second]
        elif kind == "unlink":
            names.pop(place.name, None)
        elif kind == "replace":
            goal = second.relative_to(disk.root)
            known[goal.parent][goal.name] = names.pop(place.name)
        elif place in known:
            saved[place] = dict(known[place])
        else:
            names[place.name].durable = names[place.name].content
    uncertain = [place for place in known if known[place] != saved[place]]
    number = 0
    for lost in itertools.product((False, True), repeat=len(uncertain)):
        for torn in (False, True):
            forgotten = {place for place, gone in zip(uncertain, lost, strict=True) if gone}
            folder = target / f"{count}-{number}"
            number += 1
            _write(folder, Path(), saved, known, forgotten, torn)
            yield folder


def _write(folder: Path, place: Path, saved: Any, known: Any, forgotten: set[Path], torn: bool) -> None:
    (folder / place).mkdir(parents=True)
    for name, file in (saved if place in forgotten else known)[place].items():
        if file is None:
            _write(folder, place / name, saved, known, forgotten, torn)
        elif torn and file.content != file.durable:
            (folder / place / name).write_bytes(file.content[: len(file.content) // 2])
        else:
            (folder / place / name).write_bytes(file.content)
