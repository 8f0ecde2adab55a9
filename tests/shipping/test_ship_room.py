"""What a pull may leave on a disk, and what a store and a folder repository make of links, FIFOs and folders in them."""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_edge.adapter.file import save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.shipping import parts as parting
from reft_edge.shipping import pull as pulling
from reft_edge.shipping.address import open_repository
from reft_edge.shipping.folder import FolderRepository
from reft_edge.shipping.listing import list_store
from reft_edge.shipping.pull import pull
from reft_edge.shipping.release import MAX_NAMES, Release, digest_of, parse_index, read_goods, render_index
from reft_edge.shipping.store import HIDDEN, DeviceStore
from tests.adapter.test_algebra import make_adapter
from tests.commands.test_cli import call
from tests.helpers.servers import Answer, StaticServer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and FIFOs are POSIX's")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "PAUSE", 0.0)
    monkeypatch.setattr(pulling, "ATTEMPTS", 2)


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    return DeviceStore(tmp_path / "store")


@pytest.fixture
def contents(tmp_path: Path) -> list[bytes]:
    """Three adapter files, all different."""
    path = tmp_path / "made.safetensors"
    made = []
    for seed in range(3):
        save_adapter(make_adapter("loreft", seed), path)
        made.append(path.read_bytes())
    return made


@pytest.fixture
def repository(tmp_path: Path, contents: list[bytes]) -> FolderRepository:
    """With version 1 of `task`."""
    found = FolderRepository(tmp_path / "site")
    push(found, contents[0])
    return found


@pytest.fixture
def site(repository: FolderRepository) -> Iterator[StaticServer]:
    """The same behind a web server."""
    with StaticServer(repository.folder).running() as server:
        assert isinstance(server, StaticServer)
        yield server


def push(repository: FolderRepository, content: bytes, name: str = "task") -> Release:
    path = repository.folder.parent / "pushed.safetensors"
    path.write_bytes(content)
    return repository.publish([read_goods(path, name)])[0]


def offer(site: StaticServer, names: list[str], size: int) -> None:
    """Releases whose every file breaks off a byte early."""
    releases = [Release(name, 1, digest_of(name.encode()), size) for name in names]
    site.replaced = {f"/{one.path}": Answer(200, bytes(size), broken_after=size - 1) for one in releases}
    site.replaced["/index.json"] = Answer(200, render_index(releases))


def left(store: DeviceStore) -> list[int]:
    """Sizes of the parts that wait."""
    return sorted(path.stat().st_size for path in store.folder.rglob("*.part"))


# Room


def test_what_a_pull_may_leave_is_bounded_over_all_names(site, store):
    offer(site, [f"a{number}" for number in range(20)], 10_000)
    found = pull(open_repository(site.url), store, max_bytes=35_000)
    assert left(store) == [9_999] * 3
    assert [("has another" in one.reason, "--max-bytes" in one.reason) for one in found[3:]] == [
        (False, True)
    ] * 17
    assert len(list(store.folder.rglob("*.lock"))) == 1, "the store's own"
    again = pull(open_repository(site.url), store, max_bytes=35_000)
    assert {one.status for one in again} == {"failed"}
    assert left(store) == [9_999] * 3


def test_a_pull_ends(repository, store, contents, monkeypatch):
    """However many adapters a slow server has."""
    push(repository, contents[1], "other")
    monkeypatch.setattr(pulling, "LONGEST", -1.0)
    found = pull(repository, store)
    assert ["pull again for" in one.reason for one in found] == [True, True]
    assert left(store) == []


def test_a_small_one_still_fits_after_one_that_is_too_large(repository, store, contents):
    save_adapter(make_adapter("loreft", 7, rank=8), repository.folder.parent / "large")
    push(repository, (repository.folder.parent / "large").read_bytes(), "a-large-one")
    found = pull(repository, store, max_bytes=len(contents[0]) + 10)
    assert [(one.name, one.status) for one in found] == [("a-large-one", "failed"), ("task", "installed")]


def test_what_waits_does_not_grow_with_every_pull(site, store):
    """New names come first, and the old ones are still offered."""
    names = ["m", "n"]
    for new in ("c", "b", "a"):
        names.insert(0, new)
        offer(site, names, 10_000)
        pull(open_repository(site.url), store, max_bytes=25_000)
        assert left(store) == [9_999] * 2
    pull(open_repository(site.url), store, max_bytes=15_000)
    assert left(store) == [9_999]


def test_parts_that_nobody_asks_for_are_removed(site, store, contents):
    offer(site, ["a", "b"], 500)
    pull(open_repository(site.url), store)
    assert left(store) == [499, 499]
    offer(site, ["b", "c"], 700)
    pull(open_repository(site.url), store)
    assert left(store) == [699, 699]
    pull(open_repository(site.url), store, ["c"])
    assert left(store) == [699]
    site.replaced = {}
    assert pull(open_repository(site.url), store)[0].status == "installed"
    assert left(store) == []


def test_another_repository_s_parts_wait_for_a_week(site, store, tmp_path, contents, monkeypatch):
    offer(site, ["a"], 500)
    pull(open_repository(site.url), store)
    other = FolderRepository(tmp_path / "other")
    push(other, contents[1], "other")
    pull(other, store)
    assert left(store) == [499]
    [part] = store.folder.rglob("*.part")
    os.utime(part, (time.time() - parting.AGE - 60,) * 2)
    pull(other, store)
    assert left(store) == []


def test_parts_of_earlier_versions_of_the_program_are_removed(repository, store):
    old = store.folder / HIDDEN / "gone"
    old.mkdir(parents=True)
    (old / f"{'0' * 64}.part").write_bytes(b"x" * 100)
    pull(repository, store)
    assert left(store) == []


def test_one_that_fails_for_good_leaves_nothing(repository, store):
    [release] = repository.releases()
    (repository.folder / release.path).write_bytes(b"x" * release.size)
    assert "has another content" in pull(repository, store)[0].reason
    assert left(store) == []


def test_an_index_has_a_bounded_number_of_names():
    releases = [Release(f"a{number}", 1, digest_of(b""), 1) for number in range(MAX_NAMES + 1)]
    assert len(parse_index(render_index(releases[:-1]))) == MAX_NAMES
    with pytest.raises(ReftEdgeError, match="begin another repository"):
        render_index(releases)
    more = render_index(releases[:-1]).replace(
        b'"releases": [', b'"releases": [' + render_index(releases[-1:]).split(b"[\n")[1][:-4] + b","
    )
    with pytest.raises(ReftEdgeError, match="lists more than 1,000 adapters"):
        parse_index(more)


def test_the_disk_is_looked_at_before(repository, store, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    [failed] = pull(repository, store)
    assert f"cannot write to {store.folder}: No space left on device" in failed.reason
    assert "100 are free" in failed.reason
    assert left(store) == []
    monkeypatch.undo()
    assert pull(repository, store)[0].status == "installed"


LIMITED = """
import resource, sys
from pathlib import Path
from reft_edge.shipping import pull as pulling
from reft_edge.shipping.address import open_repository
from reft_edge.shipping.store import DeviceStore
pulling.PAUSE = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
for one in pulling.pull(open_repository(sys.argv[1]), DeviceStore(Path(sys.argv[2]))):
    print(one.name, one.status, one.reason)
"""


@pytest.mark.parametrize("source", ["folder", "server"])
@pytest.mark.parametrize("limit", [1, 1000])
def test_a_write_that_fails_is_the_store_s_fault(site, store, source, limit):
    """Not the repository's, which was read well; the system's limit of a file's size stands for a full disk."""
    address = site.url if source == "server" else site.folder
    command = [sys.executable, "-c", LIMITED, str(address), str(store.folder), str(limit)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"task failed cannot write to {store.folder}: File too large")
    assert left(store) == []
    assert pull(site and open_repository(str(address)), store)[0].status == "installed"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_s_reason_is_told(repository, store, monkeypatch):
    def full(self: object, piece: bytes) -> None:
        with open("/dev/full", "wb", buffering=0) as device, self._writing():  # type: ignore[attr-defined]
            device.write(piece)

    monkeypatch.setattr(parting.Part, "add", full)
    [failed] = pull(repository, store)
    assert failed.reason == f"cannot write to {store.folder}: No space left on device"


def test_the_command_s_bound(repository, store):
    told = call("pull", repository.folder, "--store", store.folder, "--max-bytes", 100, ok=False)
    assert "allow more with --max-bytes" in told.stderr.replace("\n", " ")
    assert (
        "installed version 1"
        in call("pull", repository.folder, "-s", store.folder, "--max-bytes", 10**6).stdout
    )


# A store in which others put things


@pytest.fixture
def secret(tmp_path: Path, contents: list[bytes]) -> Path:
    """A file that only its owner may read."""
    path = tmp_path / "secret"
    path.write_bytes(contents[2])
    path.chmod(0o600)
    return path


def everything(store: DeviceStore) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize("target", ["secret", "missing", "folder", "fifo", "link"])
def test_an_installed_file_that_is_a_link_is_replaced_and_never_read(
    repository, store, secret, tmp_path, contents, target
):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(secret)
    store.folder.mkdir()
    store.path("task").symlink_to(tmp_path / target)
    [found] = pull(repository, store)
    assert (found.status, found.previous) == ("installed", None)
    assert not store.path("task").is_symlink()
    assert store.path("task").read_bytes() == contents[0]
    assert secret.read_bytes() == contents[2]
    assert all(path.read_bytes() != contents[2] for path in everything(store))


def test_a_link_inside_the_store_stays_what_it_names(repository, store, contents):
    store.folder.mkdir()
    store.path("other").write_bytes(contents[1])
    store.path("task").symlink_to("other.safetensors")
    assert [(one.name, one.problem) for one in list_store(store)] == [("other", ""), ("task", "")]
    pull(repository, store)
    assert store.path("other").read_bytes() == contents[1]
    assert store.path("task").read_bytes() == contents[0]


def test_a_fifo_is_no_installed_file(repository, store):
    store.folder.mkdir()
    os.mkfifo(store.path("task"))
    os.mkfifo(store.path("other"))
    assert list_store(store) == []
    assert pull(repository, store)[0].status == "installed"


def test_a_copy_of_a_file_is_for_no_more_people_than_the_file(repository, store, contents):
    store.folder.mkdir()
    store.path("task").write_bytes(contents[1])
    store.path("task").chmod(0o600)
    pull(repository, store)
    [kept] = [kept for kept in store.state("task").history if kept.version == 0]
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    store.rollback("task", 0)
    assert store.path("task").read_bytes() == contents[1]
    assert stat.S_IMODE(store.path("task").stat().st_mode) == 0o600
    assert pull(repository, store, ["task"], version=1)[0].status == "installed"
    assert stat.S_IMODE(store.path("task").stat().st_mode) == 0o666 & ~umask()


def test_nor_is_the_copy_of_one_that_is_the_release_already(repository, store, contents):
    store.folder.mkdir()
    store.path("task").write_bytes(contents[0])
    store.path("task").chmod(0o640)
    assert pull(repository, store)[0].status == "current"
    assert {stat.S_IMODE(path.stat().st_mode) & 0o004 for path in store.folder.rglob("*.safetensors")} == {0}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def part_of(store: DeviceStore, repository: FolderRepository) -> Path:
    """Where a release of the repository is downloaded to."""
    taken = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            parting, "_open_own", lambda path: taken.append(path) or os.open(os.devnull, os.O_RDWR)
        )
        with store.changing():
            part = parting.Parts(store, repository.address).take(repository.releases()[0])
            assert part is not None
            part.put_away()
    return taken[0]


@pytest.mark.parametrize("planted", ["link", "hard link", "fifo", "dangling", "device"])
def test_a_part_that_was_planted_is_neither_read_nor_written(
    repository, store, secret, tmp_path, contents, planted
):
    part = part_of(store, repository)
    if planted == "hard link":
        os.link(secret, part)
    elif planted == "fifo":
        os.mkfifo(part)
    else:
        part.symlink_to({"link": secret, "dangling": tmp_path / "made-by-us", "device": "/dev/zero"}[planted])
    [found] = pull(repository, store)
    assert found.status == "installed"
    assert secret.read_bytes() == contents[2]
    assert not (tmp_path / "made-by-us").exists()


@pytest.mark.parametrize("planted", ["link", "fifo", "link in a folder"])
def test_a_kept_version_that_was_planted_is_no_version(repository, store, secret, contents, planted):
    pull(repository, store)
    push(repository, contents[1])
    pull(repository, store)
    first = store.state("task").history[0].path
    first.unlink()
    if planted == "fifo":
        os.mkfifo(first)
    else:
        first.symlink_to(secret)
    with pytest.raises(ReftEdgeError):
        store.rollback("task")
    assert store.path("task").read_bytes() == contents[1]
    push(repository, contents[0])
    assert pull(repository, store)[0].status == "installed"


@pytest.mark.parametrize("place", [HIDDEN, f"{HIDDEN}/task", f"{HIDDEN}/.parts", f"{HIDDEN}/.lock"])
@pytest.mark.parametrize("kind", ["link", "file", "fifo", "folder"])
def test_the_store_s_own_folders_are_no_links_out(repository, store, tmp_path, place, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = store.folder / place
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "file":
        path.write_bytes(b"")
    else:
        path.mkdir()
    try:
        [found] = pull(repository, store)
        refused = found.status == "failed"
    except ReftEdgeError:
        refused = True
    fine = (kind == "folder") != place.endswith(".lock") and kind in ("folder", "file")
    assert refused != fine
    assert not any(elsewhere.iterdir())


def test_odd_things_in_a_store_break_nothing(repository, store, contents):
    """Folders where files should be."""
    pull(repository, store)
    (store.folder / HIDDEN / "task" / f"000009-9-{'a' * 64}.safetensors").mkdir()
    (store.folder / HIDDEN / ".parts" / "x.part").mkdir()
    push(repository, contents[1])
    assert pull(repository, store)[0].status == "installed"
    assert [kept.version for kept in store.state("task").history] == [1, 2]
    store.path("task").unlink()
    store.path("task").mkdir()
    assert pull(repository, store)[0].status == "failed"


# A repository folder of a stranger's


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling", "folder", "device"])
@pytest.mark.parametrize("what", ["index", "release"])
def test_a_repository_s_files_are_plain_ones(repository, store, tmp_path, secret, kind, what):
    [release] = repository.releases()
    path = repository.folder / (release.path if what == "release" else "index.json")
    (tmp_path / "whole").write_bytes(path.read_bytes())
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(
            {"link": tmp_path / "whole", "dangling": tmp_path / "none", "device": "/dev/zero"}[kind]
        )
    if what == "index":
        with pytest.raises(ReftEdgeError, match=r"index\.json"):
            pull(repository, store)
        with pytest.raises(ReftEdgeError):
            push(repository, secret.read_bytes())
        assert "index.json" in call("list", repository.folder, ok=False).stderr.replace("\n", "")
    else:
        [found] = pull(repository, store)
        assert found.status == "failed"
        assert f"cannot read {path}" in found.reason
        assert left(store) == []


def test_a_folder_in_a_repository_does_not_lead_out(repository, store, tmp_path, contents):
    (repository.folder / "task").rename(tmp_path / "outside")
    (repository.folder / "task").symlink_to(tmp_path / "outside")
    [found] = pull(repository, store)
    assert "is a link, which no folder inside a repository may be" in found.reason
    before = sorted((tmp_path / "outside").iterdir())
    with pytest.raises(ReftEdgeError, match="is a link"):
        push(repository, contents[1])
    assert sorted((tmp_path / "outside").iterdir()) == before


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_push_writes_through_nothing(repository, tmp_path, secret, contents, kind):
    for name in (".new", ".lock"):
        (repository.folder / name).unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(repository.folder / name)
        else:
            (repository.folder / name).symlink_to(secret)
    with pytest.raises(ReftEdgeError, match="no plain file"):
        push(repository, contents[1])
    (repository.folder / ".lock").unlink()
    assert push(repository, contents[1]).version == 2
    assert secret.read_bytes() == contents[2]


def test_push_does_not_wait_for_a_fifo(tmp_path, repository):
    os.mkfifo(tmp_path / "a.safetensors")
    assert "cannot read" in call("push", tmp_path / "a.safetensors", repository.folder, ok=False).stderr


# Two at once


PULL = """
import sys, time
from pathlib import Path
from reft_edge.shipping.pull import pull
from reft_edge.shipping.address import open_repository
from reft_edge.shipping.store import DeviceStore
for one in pull(open_repository(sys.argv[1]), DeviceStore(Path(sys.argv[2]))):
    print(one.name, one.status, one.reason)
"""


def test_two_pulls_of_one_release_share_one_download(site, store, contents):
    """Whoever comes second waits, and finds it installed; the file is asked for once."""
    command = [sys.executable, "-c", PULL, site.url, str(store.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = sorted(process.communicate()[0].strip() for process in running)
    assert told == ["task current", "task current", "task installed"]
    assert len([path for _, path, _ in site.requests if path.endswith(".safetensors")]) == 1
    assert store.path("task").read_bytes() == contents[0]


def test_what_was_installed_meanwhile_stays(repository, store, contents, monkeypatch):
    """A newer version arrives from elsewhere while an older one is downloaded."""
    second = FolderRepository(repository.folder.parent / "second")
    for content in contents:
        push(second, content)
    real = pulling.download

    def slow(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(pulling, "download", real)
        assert pull(second, store)[0].installed == 3

    monkeypatch.setattr(pulling, "download", slow)
    [found] = pull(repository, store)
    assert (found.status, found.installed) == ("kept", 3)
    assert store.path("task").read_bytes() == contents[2]
    assert left(store) == []
