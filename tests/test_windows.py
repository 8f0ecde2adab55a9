"""What only POSIX has is not touched on Windows. The types hold there, too: `mypy --platform win32` is in the gate."""

import os
import sys

import pytest

from reft_edge.model.cache import check_own
from reft_edge.runtime.bench import peak_memory
from reft_edge.runtime.chat import load_history
from reft_edge.runtime.serving.connections import MOST_CONNECTIONS, most_connections
from reft_edge.shipping.parts import _is_own

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the other tests tell")


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "geteuid")
    for module in ("resource", "readline", "fcntl"):
        monkeypatch.setitem(sys.modules, module, None)


def test_a_cache_belongs_to_who_uses_it(windows, tmp_path):
    tmp_path.chmod(0o777)
    check_own(tmp_path)


def test_a_download_goes_on_where_it_ended(windows, tmp_path):
    (tmp_path / "part").write_bytes(b"half")
    assert _is_own((tmp_path / "part").stat())
    assert not _is_own(tmp_path.stat())


def test_connections_have_no_limit_of_files(windows):
    assert most_connections() == MOST_CONNECTIONS


def test_a_chat_has_no_history(windows, tmp_path):
    load_history(tmp_path / "history")()
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_knows_no_peak_of_memory(windows):
    assert peak_memory() == 0
