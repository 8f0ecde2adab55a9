"""Datasets of the Hub and folders of one, with what the `datasets` library is asked for."""

import json
import sys
from types import SimpleNamespace

import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.rows.given import HELD_OUT, held_out_source, row_source
from reft_edge.rows.reading import load_rows, read_rows
from reft_edge.rows.source import HubRows

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": "a", "completion": "b", "note": None}, {"prompt": "c", "completion": "d", "note": "x"}]
PLAIN = [{"prompt": "a", "completion": "b"}, ROWS[1]]


@pytest.fixture
def hub(monkeypatch):
    """The library at its border: what it was asked for, and rows for an answer."""
    asked = []
    size = SimpleNamespace(dataset_size=5000, download_size=None)

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter(ROWS) if streaming else datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "test", "extra"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: SimpleNamespace(info=size))
    return SimpleNamespace(asked=asked, size=size)


def rows_of(source):
    return load_rows(source, lambda row: row)


def test_a_dataset_is_named_by_its_owner_and_name(hub):
    for given in ("hub:owner/some.name", "owner/some.name"):
        source = row_source(given, config="main")
        rows, digest = rows_of(source)
        assert (rows, len(digest), str(source)) == (PLAIN, 64, "owner/some.name (main, train)")
    assert rows_of(row_source("owner/name", "test[:10]", limit=5))[0] == PLAIN
    assert rows_of(row_source("owner/name", splits=HELD_OUT))[0] == PLAIN
    assert [asked[1:] for asked in hub.asked] == [
        ("main", "train", False),
        ("main", "train", False),
        (None, "test[:10]", False),
        (None, "test", False),
    ]
    assert [str(place) for place, _ in read_rows(source, lambda row: row)][1].endswith(" row 2")


def test_large_datasets_are_streamed_and_so_are_their_first_rows(hub):
    assert rows_of(row_source("owner/name", "train", limit=2))[0] == PLAIN
    hub.size.download_size = 2 << 30
    assert rows_of(row_source("owner/name", "train"))[0] == PLAIN
    assert [streamed for *_, streamed in hub.asked] == [True, True]


def test_a_split_that_nothing_tells_is_asked_for(hub):
    with pytest.raises(
        ReftEdgeError, match=r"owner/name has the splits train, test, extra; choose one with --split"
    ):
        row_source("owner/name", splits=("validation",))
    assert row_source("owner/name", splits=("validation", "test")).split == "test"


def test_held_out_rows_share_the_configuration_of_a_dataset(hub, tmp_path):
    source = held_out_source("owner/name", None, "main")
    assert (source.config, source.split) == ("main", "test")
    path = tmp_path / "x.jsonl"
    assert held_out_source(path, None, "main") == path
    assert held_out_source(None) is None
    with pytest.raises(ReftEdgeError, match="the split 'test' is of held-out rows; say with --eval"):
        held_out_source(None, "test")


def test_files_that_are_missing_are_no_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/rows.jsonl", "data/rows.csv", "rows", "data/x/rows"):
        with pytest.raises(ReftEdgeError, match="cannot read"):
            rows_of(row_source(name))
    with pytest.raises(ReftEdgeError, match="'hub:name' names no dataset of the Hub; write hub:owner/name"):
        row_source("hub:name")


def test_what_the_library_raises_is_told(monkeypatch):
    def fails(*given, **named):
        raise ValueError("Config name is missing.\nPlease pick one: ['a', 'b']")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fails)
    with pytest.raises(
        ReftEdgeError,
        match=r"owner/name: there is no file of that name, and the dataset cannot be read: Config name",
    ):
        row_source("owner/name")


def test_a_missing_library_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ReftEdgeError, match=r"the package 'datasets'; install it with: pip install 'reft-edge\[data\]'"
    ):
        row_source("hub:owner/name")
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\n")
    assert rows_of(row_source(tmp_path / "x.csv"))[0] == [{"prompt": "a", "completion": "b"}]


def test_folders_that_hold_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    assert rows_of(row_source(tmp_path / "one"))[0] == PLAIN
    assert rows_of(row_source(tmp_path / "both"))[0] == PLAIN
    assert rows_of(row_source(str(tmp_path / "both"), "test"))[0] == PLAIN[1:]
    (tmp_path / "files").mkdir()
    for name, rows in (("train", PLAIN), ("test", PLAIN[1:])):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "files" / f"{name}.jsonl").write_text(content)
    source = row_source(tmp_path / "files", splits=("test",))
    assert isinstance(source, HubRows)
    assert rows_of(source)[0] == PLAIN[1:]
    assert rows_of(row_source(tmp_path / "files", "train[:1]"))[0] == PLAIN[:1]
    with pytest.raises(ReftEdgeError, match="the dataset cannot be read"):
        rows_of(row_source(tmp_path / "files", "unknown"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReftEdgeError, match="the dataset cannot be read"):
        rows_of(row_source(tmp_path / "empty"))
