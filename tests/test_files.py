"""Opening strangers' files, and text made safe for terminals."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.errors import ReftEdgeError
from reft_edge.files import open_regular
from reft_edge.terminal import printable


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("follow", [True, False])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, follow: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "fifo", follow=follow)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path)


def test_links_are_followed_only_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
    for name in ("link", "loop"):
        with pytest.raises(OSError, match="it is a link"):
            open_regular(tmp_path / name, follow=False)


@given(st.text())
def test_printable_text_has_no_control_characters_and_loses_nothing_else(text: str) -> None:
    shown = printable(text)
    assert not any(ord(mark) < 32 or 127 <= ord(mark) < 160 for mark in shown if mark not in "\n\t")
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("over\rwritten", "over\\rwritten"),
        ("abc\u202edcb", "abc\\u202edcb"),
        ("\ud83d", "\\ud83d"),
        ("👨‍👩‍👧 日本語\u3000é\tx\n", "👨‍👩‍👧 日本語\u3000é\tx\n"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(ReftEdgeError(text)) == shown
