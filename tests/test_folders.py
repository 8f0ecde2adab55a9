"""Files and folders that are replaced: whatever happens, the old one or the new one is there, and nothing else is left."""

import errno
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from reft_edge import folders, unfinished
from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically
from reft_edge.folders import replace_folder, restore_folder, scratch_folder

MARKER = "made_by"


def write(target: Path, content: str) -> None:
    with replace_folder(target, MARKER) as folder:
        (folder / MARKER).write_text("us")
        (folder / "data").write_text(content)


def content(target: Path) -> str:
    return (target / "data").read_text()


@pytest.fixture(params=["at once", "in two steps"])
def way(request, monkeypatch):
    """Both ways of replacing: swapping, and what systems without it get."""
    if request.param == "in two steps":
        monkeypatch.setattr(folders, "_SWAPS", {})
    return request.param


def test_a_folder_is_replaced(tmp_path, way):
    for text in ("one", "two", "three"):
        write(tmp_path / "made", text)
        assert content(tmp_path / "made") == text
        assert os.listdir(tmp_path) == ["made"]


def test_an_empty_folder_is_replaced_and_its_mode_kept(tmp_path, way):
    (tmp_path / "made").mkdir()
    (tmp_path / "made").chmod(0o750)
    write(tmp_path / "made", "one")
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o750


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, way):
    write(tmp_path / "v1", "one")
    (tmp_path / "current").symlink_to("v1")
    write(tmp_path / "current", "two")
    assert (tmp_path / "current").is_symlink()
    assert content(tmp_path / "v1") == "two"
    assert sorted(os.listdir(tmp_path)) == ["current", "v1"]


def test_somebodys_folder_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("")
    with pytest.raises(ReftEdgeError, match="not written by reft-edge"):
        write(tmp_path / "photos", "")
    with pytest.raises(ReftEdgeError, match="is a file"):
        write(tmp_path / "photos/one.jpg", "")
    with pytest.raises(ReftEdgeError, match="cannot make"):
        write(tmp_path / "photos/one.jpg/under", "")


def test_a_block_that_fails_leaves_the_old_folder(tmp_path, way):
    write(tmp_path / "made", "one")

    def half(error: type[BaseException]) -> None:
        with replace_folder(tmp_path / "made", MARKER) as folder:
            (folder / "data").write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            half(error)
        assert content(tmp_path / "made") == "one"
        assert os.listdir(tmp_path) == ["made"]


def killed_after(steps: int, target: Path) -> bool:
    """Write in a process that is killed before the next step that changes names; whether it was."""
    child = os.fork()
    if child == 0:
        left = steps

        def counted(plain):
            def step(*arguments, **options):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return plain(*arguments, **options)

            return step

        for name in ("replace", "mkdir", "rmdir", "unlink", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        write(target, "two")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_step_leaves_one_of_both(tmp_path, way):
    """The next reader finds the old folder or the new one, and the next writer cleans up."""
    target = tmp_path / "made"
    for steps in range(40):
        write(target, "one")
        killed = killed_after(steps, target)
        if way == "in two steps":
            restore_folder(target)
        assert content(target) in ("one", "two"), steps
        if not killed:
            break
        for left in tmp_path.glob(f"{unfinished.PREFIX}*"):
            os.utime(left, (0, 0))
        write(target, "three")
        assert os.listdir(tmp_path) == ["made"], steps
    assert not killed
    assert steps > 3
    assert content(target) == "two"


@pytest.mark.skipif(sys.platform != "linux", reason="where folders are swapped in one step")
def test_swapping_leaves_no_moment_without_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "made", "one")
    monkeypatch.setattr(folders.os, "replace", None)
    write(tmp_path / "made", "two")
    assert content(tmp_path / "made") == "two"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    """As on Windows, where a file of the folder is in use."""
    monkeypatch.setattr(folders, "_SWAPS", {})
    write(tmp_path / "made", "one")
    plain = os.replace

    def busy(source: Path, target: Path) -> None:
        if Path(source).name.startswith(unfinished.PREFIX):
            raise PermissionError(errno.EACCES, "Permission denied")
        plain(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(ReftEdgeError, match="Permission denied; close what uses it"):
        write(tmp_path / "made", "two")
    assert content(tmp_path / "made") == "one"
    assert os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_as_such(tmp_path, error):
    with pytest.raises(ReftEdgeError, match="the disk is full"), replace_folder(tmp_path / "made", MARKER):
        raise error
    assert os.listdir(tmp_path) == []


def test_a_mounted_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    write(tmp_path / "made", "one")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ReftEdgeError, match="give a folder inside"):
        write(tmp_path / "made", "two")


def test_only_what_nobody_writes_is_removed(tmp_path):
    with scratch_folder(tmp_path) as running, scratch_folder(tmp_path) as other:
        young = tmp_path / f"{unfinished.PREFIX}young"
        killed, file = tmp_path / f"{unfinished.PREFIX}killed", tmp_path / f"{unfinished.PREFIX}file"
        link, own = tmp_path / f"{unfinished.PREFIX}link", tmp_path / ".own"
        for folder in (young, killed, own):
            folder.mkdir()
            (folder / "half").write_text("")
        file.write_text("")
        link.symlink_to(own)
        for path in (running, other, killed, file, own):
            os.utime(path, (0, time.time() - 3600))
        write_atomically(tmp_path / "a", b"")
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {running.name, other.name, young.name, link.name, ".own", "a"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(mode)
    write_atomically(path, b"new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_has_the_users_mode(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
        write(tmp_path / "made", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o750


def test_a_name_as_long_as_names_may_be(tmp_path):
    write_atomically(tmp_path / ("é" * 127), b"")
    write(tmp_path / ("x" * 255), "one")
    write(tmp_path / ("x" * 255), "two")
    assert len(os.listdir(tmp_path)) == 2


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, message in (("fifo", "not a regular file"), ("folder", "a folder"), ("no/x", "No such file")):
        with pytest.raises(ReftEdgeError, match=message):
            write_atomically(tmp_path / name, b"")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReftEdgeError, match=r"cannot write .*: No space left on device"):
        write_atomically(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"
