"""Opening strangers' files, and text made safe for terminals."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.commands.serve import _api_key
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_apart, decode_text, open_regular, read_text, same_file
from reft_edge.model.manifest import load_manifest
from reft_edge.model.prompts import load_prompts
from reft_edge.rows.reading import read_rows
from reft_edge.shipping.release import FORMAT, VERSION, parse_index
from reft_edge.signing.keys import generate_key, load_private_key, load_trusted
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


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (BOM + "é\r\nb\n".encode(), "é\nb\n"),
        (b"a\rb\r\rc", "a\nb\n\nc"),
        (BOM, ""),
        (b"", ""),
        (b"a" + BOM + b"b", "a\ufeffb"),
        ("👍".encode(), "👍"),
    ],
)
def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "a").write_bytes(content)
    assert read_text(tmp_path / "a") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n".encode("utf-16"), "names is UTF-16 text; save it as UTF-8"),
        ("a,b\n".encode("utf-16-be"), "names is UTF-16 text"),
        ("é\n".encode("utf-16-le"), "names is UTF-16 text"),
        ("a,b\n".encode("utf-32"), "names is UTF-32 text"),
        ("a\nb\né\n".encode("latin-1"), "names is not UTF-8 text: line 3 has the byte 0xe9"),
        (b"a row of text\n and \0\n", "names holds a zero byte"),
    ],
)
def test_text_of_another_encoding_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ReftEdgeError, match=message):
        decode_text(content, "names")


def test_every_file_of_text_may_begin_with_a_mark(device_folder: Path, tmp_path: Path) -> None:
    row = {"prompt": "2+2=", "choices": ["4", "5"], "answer": "4"}
    (tmp_path / "rows.jsonl").write_bytes(BOM + json.dumps(row).encode() + b"\r\n" + json.dumps(row).encode())
    assert [place.number for place, _ in read_rows(tmp_path / "rows.jsonl", lambda row: row)] == [1, 2]
    (tmp_path / "key.txt").write_bytes(BOM + b"sesame\r\n")
    assert _api_key(tmp_path / "key.txt") == "sesame"
    (tmp_path / "key.txt").write_text("sesame", encoding="utf-16")
    with pytest.raises(ReftEdgeError, match=r"the API key in .* is UTF-16"):
        _api_key(tmp_path / "key.txt")
    generate_key(tmp_path / "fleet.key", "fleet")
    for name in ("fleet.key", "fleet.pub"):
        path = tmp_path / name
        path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))
    private = load_private_key(tmp_path / "fleet.key")
    assert list(load_trusted(tmp_path / "fleet.pub").keys) == [private.id]
    folder = tmp_path / "export"
    shutil.copytree(device_folder / "export", folder)
    before = load_prompts(folder)
    for path in (folder / "reft_edge.json", folder / "tokenizer_config.json", folder / "chat_template.jinja"):
        if path.is_file():
            path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_manifest(folder).base_name == "tiny-llama"
    after = load_prompts(folder)
    assert (after.template, after.special_tokens) == (before.template, before.special_tokens)
    index = json.dumps({"format": FORMAT, "version": VERSION, "releases": []}).encode()
    assert parse_index(BOM + index) == parse_index(index)


def test_one_file_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    one, other = tmp_path / "folder" / "a", tmp_path / "link" / ".." / "folder" / "a"
    assert same_file(one, other)  # not there yet
    one.write_bytes(b"")
    os.link(one, tmp_path / "b")
    assert same_file(other, tmp_path / "b")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("c", "x" * 300, "loop"):
        assert not same_file(one, tmp_path / name)
        check_apart(tmp_path / name, one, None)
    with pytest.raises(ReftEdgeError, match="give another name"):
        check_apart(tmp_path / "b", None, one)
