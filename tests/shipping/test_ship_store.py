"""The store on a device: versions, rollback, two pulls at once, and no half-installed file whenever it dies."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.adapter_folder import AdapterFolder
from reft_edge.shipping.folder import FolderRepository
from reft_edge.shipping.listing import list_store
from reft_edge.shipping.parts import Parts
from reft_edge.shipping.pull import pull
from reft_edge.shipping.release import Release, digest_of, read_goods, render_index
from reft_edge.shipping.store import HIDDEN, KEEP, DeviceStore, digest_of_file
from tests.adapter.test_algebra import make_adapter
from tests.helpers.crash import Disk, after_power_cut, killed_at_every_step


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Six adapter files, all different."""
    path = tmp_path_factory.mktemp("contents") / "a.safetensors"
    made = []
    for seed in range(6):
        save_adapter(make_adapter("loreft", seed), path)
        made.append(path.read_bytes())
    return made


@pytest.fixture
def repository(tmp_path: Path) -> FolderRepository:
    return FolderRepository(tmp_path / "repository")


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    return DeviceStore(tmp_path / "store")


def push(repository: FolderRepository, content: bytes, name: str = "task") -> int:
    path = repository.folder.parent / "pushed.safetensors"
    path.write_bytes(content)
    return repository.publish([read_goods(path, name)])[0].version


def statuses(
    repository: FolderRepository, store: DeviceStore, *names: str, **options: int
) -> list[tuple[object, ...]]:
    return [(one.status, one.installed, one.previous) for one in pull(repository, store, names, **options)]


def files(store: DeviceStore) -> list[str]:
    """Every file of the store but its lock, the hidden ones shortened to their versions."""
    found = [path.relative_to(store.folder) for path in store.folder.rglob("*") if path.is_file()]
    return sorted(
        path.name.split("-")[1] if HIDDEN in path.parts else path.name
        for path in found
        if path.name != ".lock"
    )


def test_pull_installs_and_updates_and_roll_back_undoes(repository, store, contents):
    assert push(repository, contents[0]) == 1
    assert statuses(repository, store) == [("installed", 1, None)]
    assert statuses(repository, store) == [("current", 1, 1)]
    assert push(repository, contents[1]) == 2
    assert statuses(repository, store) == [("installed", 2, 1)]
    assert store.path("task").read_bytes() == contents[1]
    before, now = store.rollback("task")
    assert (before.version, now.version) == (2, 1)
    assert store.path("task").read_bytes() == contents[0]
    kept = pull(repository, store)[0]
    assert (kept.status, kept.installed) == ("kept", 1)
    assert "rolled back here" in kept.reason
    assert push(repository, contents[2]) == 3
    assert statuses(repository, store) == [("installed", 3, 1)]
    assert store.rollback("task")[1].version == 1  # not 2, which was rolled back
    assert statuses(repository, store, "task", version=3) == [("installed", 3, 1)]
    assert store.names() == ["task"]


def test_rollback_goes_step_by_step_and_to_any_kept_version(repository, store, contents):
    for content in contents[:3]:
        push(repository, content)
        pull(repository, store)
    assert [store.rollback("task")[1].version for _ in range(2)] == [2, 1]
    with pytest.raises(ReftEdgeError, match="no version of task from before"):
        store.rollback("task")
    assert store.rollback("task", 3)[1].version == 3
    with pytest.raises(ReftEdgeError, match="does not keep version 9 of task; it keeps 1, 2, 3"):
        store.rollback("task", 9)
    with pytest.raises(ReftEdgeError, match="keeps no earlier version of other"):
        store.rollback("other")
    with pytest.raises(ReftEdgeError, match="cannot be an adapter's name"):
        store.rollback("../task")


def test_history_is_bounded(repository, store, contents):
    for content in contents:
        push(repository, content)
        pull(repository, store)
    versions = [kept.version for kept in store.state("task").history]
    assert versions == [4, 5, 6][-KEEP:]
    assert files(store) == ["4", "5", "6", "task.safetensors"]


def test_an_older_version_that_is_pushed_again_is_a_new_one(repository, store, contents):
    for content in (contents[0], contents[1], contents[0]):
        push(repository, content)
        pull(repository, store)
    assert [kept.version for kept in store.state("task").history] == [2, 3]
    assert store.rollback("task")[1].version == 2


def test_the_newest_is_installed_only_where_it_is_newer(repository, store, contents):
    for content in contents[:2]:
        push(repository, content)
    pull(repository, store)
    shutil.rmtree(repository.folder)
    push(repository, contents[2])
    kept = pull(repository, store)[0]
    assert (kept.status, kept.installed, kept.version) == ("kept", 2, 1)
    push(repository, contents[3])
    kept = pull(repository, store)[0]
    assert "other content as version 2" in kept.reason
    assert statuses(repository, store, "task", version=1) == [("installed", 1, 2)]


def test_what_is_older_than_what_was_rolled_back_is_not_installed(repository, store, contents):
    """The version between is no newer one, and it was never here."""
    push(repository, contents[0])
    pull(repository, store)
    push(repository, contents[1])
    index = (repository.folder / "index.json").read_bytes()
    push(repository, contents[2])
    pull(repository, store)
    assert store.rollback("task")[1].version == 1
    (repository.folder / "index.json").write_bytes(index)
    kept = pull(repository, store)[0]
    assert (kept.status, kept.version, kept.installed) == ("kept", 2, 1)
    assert "version 3 was rolled back here" in kept.reason
    assert statuses(repository, store, "task", version=2) == [("installed", 2, 1)]


def test_a_leftover_is_never_written_through(repository, store, contents, tmp_path):
    """What stands where a new file is made may be a link, or the same file as the installed one."""
    push(repository, contents[0])
    pull(repository, store)
    push(repository, contents[1])
    new, other = store.folder / HIDDEN / "task" / "new", tmp_path / "other"
    other.write_bytes(b"another's")
    new.symlink_to(other)
    assert statuses(repository, store) == [("installed", 2, 1)]
    assert other.read_bytes() == b"another's"


def test_links_out_of_the_store_are_not_its_adapters(store, contents, tmp_path):
    store.folder.mkdir()
    (tmp_path / "elsewhere.safetensors").write_bytes(contents[0])
    store.path("inside").write_bytes(contents[0])
    store.path("link").symlink_to(store.path("inside"))
    store.path("evil").symlink_to(tmp_path / "elsewhere.safetensors")
    assert store.names() == ["inside", "link"]


def test_rollback_makes_no_store(store):
    with pytest.raises(ReftEdgeError, match="there is no folder"):
        store.rollback("task")
    assert not store.folder.exists()


def test_a_file_put_there_by_hand_can_be_had_again(repository, store, contents):
    store.folder.mkdir()
    store.path("task").write_bytes(contents[5])
    push(repository, contents[0])
    assert statuses(repository, store) == [("installed", 1, 0)]
    assert store.rollback("task")[1].version == 0
    assert store.path("task").read_bytes() == contents[5]
    store.path("task").write_bytes(contents[4])
    assert store.rollback("task")[1].version == 1
    assert [kept.digest for kept in store.state("task").undone] == [digest_of(contents[4])]


def test_a_removed_file_comes_back(repository, store, contents):
    push(repository, contents[0])
    pull(repository, store)
    store.path("task").unlink()
    assert statuses(repository, store) == [("installed", 1, None)]
    store.path("task").unlink()
    assert store.rollback("task")[1].version == 1


def test_a_damaged_history_is_not_installed(repository, store, contents):
    for content in contents[:2]:
        push(repository, content)
        pull(repository, store)
    store.state("task").history[0].path.write_bytes(b"torn")
    with pytest.raises(ReftEdgeError, match="was damaged; version 1 cannot be restored"):
        store.rollback("task")
    assert store.path("task").read_bytes() == contents[1]


def test_no_room_leaves_what_is_installed(repository, store, contents, monkeypatch):
    push(repository, contents[0])
    pull(repository, store)
    push(repository, contents[1])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    failed = pull(repository, store)[0]
    assert (failed.status, failed.installed) == ("failed", 1)
    assert "No space left" in failed.reason
    monkeypatch.undo()
    assert store.path("task").read_bytes() == contents[0]
    assert statuses(repository, store) == [("installed", 2, 1)]
    assert files(store) == ["1", "2", "task.safetensors"]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every folder and file but the lock, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


OLD_AND_NEW = ["pull", "first pull", "rollback", "by hand"]


@pytest.fixture(params=OLD_AND_NEW)
def change(request, repository, store, contents):
    """A change of the store, what is installed before and after it, and the files that a whole one leaves."""
    before: list[bytes | None] = [contents[0]]
    run = lambda folder: pull(repository, DeviceStore(folder))  # noqa: E731
    left = ["1", "2", "task.safetensors"]
    store.folder.mkdir()
    push(repository, contents[0])
    if request.param == "first pull":
        before, after, left = [None], contents[0], ["1", "task.safetensors"]
    elif request.param == "by hand":
        before, after, left = [contents[5]], contents[0], ["0", "1", "task.safetensors"]
        store.path("task").write_bytes(contents[5])
    else:
        pull(repository, store)
        push(repository, contents[1])
        after = contents[1]
        if request.param == "rollback":
            pull(repository, store)
            before, after = [contents[1]], contents[0]
            run = lambda folder: DeviceStore(folder).rollback("task")  # noqa: E731
    return run, [*before, after], after, left, request.param


def check_and_heal(folder: Path, run, allowed, after, left, what) -> None:
    """Whatever happened: the old file or the new one, and the same again completes it."""
    store = DeviceStore(folder)
    installed = store.path("task")
    found = installed.read_bytes() if installed.exists() else None
    assert found in allowed
    if found is not None:
        load_adapter(installed)
    assert store.names() == ([] if found is None else ["task"])
    if what == "rollback" and found == after:
        with store.changing():
            store.tidy("task")
    else:
        run(folder)
    assert installed.read_bytes() == after
    assert files(store) == left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step_it_holds_the_old_or_the_new(change, store, tmp_path):
    run, allowed, after, left, what = change
    folders = list(killed_at_every_step(store.folder, tmp_path / "killed", run))
    assert DeviceStore(folders[-1]).path("task").read_bytes() == after
    for folder in folders:
        check_and_heal(folder, run, allowed, after, left, what)
    assert len(folders) > 6


def test_without_power_at_every_step_it_holds_the_old_or_the_new(change, store, tmp_path):
    run, allowed, after, left, what = change
    before = tmp_path / "before"
    shutil.copytree(store.folder, before)
    with Disk(store.folder) as disk:
        run(store.folder)
    assert disk.missed == 0
    whole = next(after_power_cut(before, disk, len(disk.steps), tmp_path / "whole"))
    assert tree(whole) == tree(store.folder), "the steps are not all that was done"
    checked = 0
    seen = set()
    for count in range(len(disk.steps) + 1):
        for folder in after_power_cut(before, disk, count, tmp_path / "cut"):
            state = frozenset(tree(folder).items())
            if state not in seen:
                check_and_heal(folder, run, allowed, after, left, what)
            seen.add(state)
            shutil.rmtree(folder)
            checked += 1
    assert checked > len(disk.steps)
    assert next(after_power_cut(before, disk, len(disk.steps), tmp_path / "end")).is_dir()


def test_the_power_cut_notices_a_missing_flush(repository, store, contents, tmp_path, monkeypatch):
    """The test above can fail: with a write that is not flushed before it gets its name, it does."""
    push(repository, contents[0])
    pull(repository, store)
    push(repository, contents[1])
    before = tmp_path / "before"
    shutil.copytree(store.folder, before)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    with Disk(store.folder) as disk:
        pull(repository, store)
    disk.steps = [step for step in disk.steps if step[0] != "fsync"]
    found = {
        (folder / "task.safetensors").read_bytes()
        for count in range(len(disk.steps) + 1)
        for folder in after_power_cut(before, disk, count, tmp_path / "cut")
    }
    assert found - {contents[0], contents[1]}


@pytest.mark.parametrize(("package", "missed"), [("reft_edge.shipping.store", 1), ("some_library.locks", 0)])
def test_the_power_cut_watches_the_project_and_not_its_libraries(package, missed, tmp_path):
    """Whatever a library makes beside the store's files, in a way of its own."""
    with Disk(tmp_path) as disk:
        exec("import os; os.mkdir(place)", {"__name__": package, "place": tmp_path / "made"})
        exec("place.mkdir(exist_ok=True)", {"__name__": package, "place": tmp_path / "made"})
    assert disk.missed == missed
    (tmp_path / "model").mkdir()
    before = tmp_path / "model" / "before"
    before.mkdir()
    whole = next(after_power_cut(before, disk, len(disk.steps), tmp_path / "model" / "whole"))
    assert ("made" in tree(whole)) == bool(missed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_push_that_is_killed_leaves_a_repository_that_can_be_pulled(repository, contents, tmp_path):
    push(repository, contents[0])
    path = tmp_path / "pushed.safetensors"
    path.write_bytes(contents[1])
    goods = [read_goods(path, "task")]
    folders = list(
        killed_at_every_step(
            repository.folder, tmp_path / "killed", lambda folder: FolderRepository(folder).publish(goods)
        )
    )
    versions = []
    for folder in folders:
        found = pull(FolderRepository(folder), DeviceStore(tmp_path / f"store-{folder.name}"))[0]
        assert found.status == "installed"
        versions.append(found.version)
        assert FolderRepository(folder).publish(goods)[0].version == 2
        assert len(list(folder.rglob("*.safetensors"))) == 2
        assert not (folder / ".new").exists()
    assert versions == sorted(versions)
    assert (versions[0], versions[-1]) == (1, 2)


PULL = """
import sys
from pathlib import Path
from reft_edge.shipping.folder import FolderRepository
from reft_edge.shipping.pull import pull
from reft_edge.shipping.store import DeviceStore
for one in pull(FolderRepository(Path(sys.argv[1])), DeviceStore(Path(sys.argv[2]))):
    print(one.name, one.status)
"""


def test_pulls_at_once_into_one_store(repository, store, contents):
    names = [f"task{number}" for number in range(5)]
    for name, content in zip(names, contents, strict=False):
        push(repository, content, name)
    command = [sys.executable, "-c", PULL, str(repository.folder), str(store.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    for name, content in zip(names, contents, strict=False):
        assert store.path(name).read_bytes() == content
        found = sorted(lines[lines.index(name) + 1] for lines in told)
        assert found == ["current", "current", "installed"]
    assert files(store) == ["1"] * 5 + [f"{name}.safetensors" for name in names]


def test_pushes_at_once_into_one_folder(repository, contents):
    script = """
import sys
from pathlib import Path
from reft_edge.shipping.folder import FolderRepository
from reft_edge.shipping.release import read_goods
for path in sys.argv[2:]:
    FolderRepository(Path(sys.argv[1])).publish([read_goods(Path(path), "task")])
"""
    repository.folder.mkdir()
    paths = []
    for number, content in enumerate(contents):
        paths.append(repository.folder.parent / f"{number}.safetensors")
        paths[-1].write_bytes(content)
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(repository.folder), *map(str, half)])
        for half in (paths[:3], paths[3:])
    ]
    assert [process.wait() for process in running] == [0, 0]
    releases = repository.releases()
    assert [release.version for release in releases] == [1, 2, 3, 4, 5, 6]
    assert {release.digest for release in releases} == {digest_of(content) for content in contents}


def test_a_large_file_that_is_no_adapter_takes_no_memory(repository, store, contents, tmp_path):
    size = 64 << 20
    (repository.folder / "junk").mkdir(parents=True)
    junk = tmp_path / "junk.safetensors"
    junk.touch()
    os.truncate(junk, size)
    with junk.open("rb") as file:
        release = Release("junk", 1, digest_of_file(file), size)
    (repository.folder / "index.json").write_bytes(render_index([release]))
    shutil.copy(junk, repository.folder / release.path)
    store.folder.mkdir()
    shutil.copy(junk, store.path("other"))
    tracemalloc.start()
    with pytest.raises(ReftEdgeError, match="not a usable adapter"):
        read_goods(junk)
    assert "unusable" in pull(repository, store)[0].reason
    assert [(found.name, found.size, bool(found.problem)) for found in list_store(store)] == [
        ("other", size, True)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("name", ["._task", "._", "a\udcff"])
def test_names_that_the_runtime_leaves_out_are_not_listed(store, contents, name):
    store.folder.mkdir()
    for given in ("task", name):
        store.path(given).write_bytes(contents[0])
    assert store.names() == ["task"] == AdapterFolder(None, store.folder).names()


def test_folders_in_the_way_are_named_or_left_alone(repository, store, contents):
    push(repository, contents[0])
    pull(repository, store)
    push(repository, contents[1])
    digest = digest_of(contents[1]).removeprefix("sha256:")
    part = Parts(store, repository.address)._path(digest)
    others = [part.with_name("of another.part"), part.with_name(part.name.replace(digest, "0" * 64))]
    for folder in (part, *others):
        folder.mkdir()
    assert str(part) in pull(repository, store)[0].reason
    part.rmdir()
    assert statuses(repository, store) == [("installed", 2, 1)]
    assert all(folder.is_dir() for folder in others)
    push(repository, contents[2])
    (store.folder / HIDDEN / "task/new").mkdir()
    assert "task.safetensors: Is a directory" in pull(repository, store)[0].reason
    assert store.path("task").read_bytes() == contents[1]
