"""What commands write: nothing that a terminal obeys, in any encoding, to readers that leave."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import save_adapter
from reft_edge.cli import app
from reft_edge.commands.console import show_table
from reft_edge.model.prompts import load_prompts
from tests.helpers.torch_reference import random_adapter

OBEYED = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]")
TITLE = "\x1b]0;title\x07"
CLIPBOARD = "\x9b31m\x1b]52;c;cm0gLXJmIH4=\x1b\\\x7f\r\u202e[/red]"
ROOT = Path(__file__).parents[2]


def call(*arguments: object, codes: tuple[int, ...] = (0,), **options: object) -> str:
    """Both outputs, which have no control characters."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    assert not OBEYED.search(result.stdout_bytes + result.stderr_bytes), result.output
    assert "Traceback" not in result.output
    assert result.exit_code in codes, result.output
    return result.output


def says(model: object, folder: Path, text: str, path: Path) -> Path:
    """An adapter with which every token of an answer is this one."""
    token = load_prompts(folder).tokenizer.encode(text, add_special_tokens=False).ids[0]
    adapter = random_adapter(model, "steering", "all+gen", tied=True, layers=(2,), training={"step": TITLE})
    embedding = model.get_input_embeddings().weight[token].detach().numpy()
    tensors = {
        "v": (1000 * embedding)[None, None, None].astype(np.float32),
        "alpha": np.ones((1, 1, 1), np.float32),
    }
    save_adapter(Adapter(adapter.config, tensors), path)
    return path


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is a sequence for terminals."""
    folder = tmp_path / f"odd{TITLE}{CLIPBOARD.replace('/', '')}"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("mark", "shown"), [("\x1b", "\\x1b"), ("\x07", "\\x07"), ("\r", "\\r")])
def test_answers(tiny_model, device_folder, odd, mark, shown):
    path = says(tiny_model, device_folder / "hf", mark, odd / f"task{TITLE}.safetensors")
    folder = device_folder / "export"
    assert call("run", folder, "hi", "-a", path, "--max-tokens", 3) == 3 * shown + "\n"
    exact = json.loads(call("run", folder, "hi", "-a", path, "--max-tokens", 3, "--json"))
    assert exact["text"] == 3 * mark
    talk = f"/adapter {path.stem}\nhi\n/adapters\n/stats\n/adapter {TITLE}\n/{TITLE}\n"
    told = call("chat", folder, "--adapters", odd, "--max-tokens", 3, input=talk)
    assert told.startswith(3 * shown + "\n")
    assert "there is no command /\\x1b]0;title\\x07" in told


def test_names_metadata_and_labels(tiny_model, device_folder, odd, tmp_path):
    path = says(tiny_model, device_folder / "hf", "a", odd / f"task{TITLE}.safetensors")
    folder = device_folder / "export"
    call("inspect", path, "--with", path)
    call("merge", path, path, "-o", odd / "merged.safetensors")
    call("shrink", path, "-o", odd / "small.safetensors")
    call("pack", path, "--for", folder, "-o", odd / "task.onnx_adapter")
    call("convert", path, "--for", folder, "-o", odd / "task.gguf", codes=(0, 1))
    call("list", odd)
    call("keygen", odd / "fleet.key", "--name", "fleet")
    call("sign", path, "--key", odd / "fleet.key")
    call("verify", path, "--trusted", odd / "fleet.pub")
    call("verify", path, folder / "reft_edge.json", "--trusted", odd / "fleet.pub", codes=(1,))
    call("push", path, odd / "site", codes=(1,))
    call("push", path, odd / "site", "--name", "task")
    call("pull", odd / "site", "--store", odd / "store")
    call("list", odd / "site")
    call("list", odd / "store")
    index = odd / "site/index.json"
    index.write_text(index.read_text().replace('"tiny"', json.dumps(TITLE)))
    call("list", odd / "site", codes=(0, 1))
    call("pull", odd / "site", "--store", odd / "other", codes=(0, 1))
    call("rollback", odd / "store", TITLE, codes=(1,))


def test_rows_and_templates_of_files(device_folder, odd, tmp_path):
    row = {"prompt": TITLE, "choices": [TITLE, CLIPBOARD], "answer": 0}
    rows = odd / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    call("eval", device_folder / "export", rows, "--records", odd / "a.jsonl")
    call("compare", odd / "a.jsonl", odd / "a.jsonl")
    rows.write_text(json.dumps({**row, "answer": TITLE + CLIPBOARD}) + "\n")
    call("eval", device_folder / "export", rows, codes=(1,))
    rows.write_text("{" + TITLE)
    call("eval", device_folder / "export", rows, codes=(1,))
    call("train", device_folder / "hf", rows, "-o", odd / "x.safetensors", codes=(1,))


@pytest.mark.parametrize(
    "arguments",
    [
        [TITLE],
        ["run", CLIPBOARD, TITLE],
        ["run", "nowhere", "hi", f"--{TITLE}"],
        ["run", "nowhere", "hi", "--threads", TITLE],
        ["train", TITLE, CLIPBOARD, "-o", "x", "--recipe", CLIPBOARD],
        ["export", f"./{TITLE}", "-o", "x"],
        ["export", f"{TITLE}.gguf", "-o", "x"],
        ["list", f"https://{TITLE}/"],
        ["serve", TITLE, "--name", CLIPBOARD],
        ["add-ports", TITLE, "-o", "x"],
    ],
)
def test_wrong_arguments(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*arguments, codes=(1, 2))


def test_what_libraries_print_and_what_breaks(monkeypatch):
    import logging

    from reft_edge.commands.streams import clean_streams

    with tempfile.TemporaryFile("w+", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        with clean_streams():
            print(TITLE, "é👍")
            sys.stdout.writelines([TITLE, "\ud800"])
            logging.Logger("x").error(CLIPBOARD)
            assert not hasattr(sys.stdout, "buffer")
        out.seek(0)
        written = out.read()
    assert not OBEYED.search(written.encode())
    assert "\\xe9\\U0001f44d" in written
    assert "\\ud800" in written

    def broken(place: str) -> None:
        raise RuntimeError(CLIPBOARD)

    monkeypatch.setattr("reft_edge.shipping.address.open_repository", broken)
    result = CliRunner().invoke(app, ["list", "https://example.com/"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert not OBEYED.search(result.stderr_bytes)


def test_rich_output_has_colours_of_its_own_only():
    """On a terminal: an error in red, a status line, a table."""
    code = f"""
import sys
from rich.table import Table
from reft_edge.cli import app
from reft_edge.commands.console import fail, say
from reft_edge.commands.screen import Screen
from reft_edge.commands.streams import clean_streams
with clean_streams():
    fail({TITLE + CLIPBOARD!r})
    screen = Screen()
    with screen.working({TITLE + CLIPBOARD!r}) as status:
        status.step({TITLE + CLIPBOARD!r})
        say({TITLE + CLIPBOARD!r})
        print({TITLE + CLIPBOARD!r})
    table = Table({TITLE!r}, title={CLIPBOARD!r})
    table.add_row({TITLE + CLIPBOARD!r})
    screen.print(table)
    screen.rule({TITLE!r})
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "300"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    written = b""
    try:
        while piece := os.read(leader, 1 << 16):
            written += piece
    except OSError:  # Linux says so that the other side is closed
        pass
    os.close(leader)
    assert process.wait() == 0, written
    assert b"\x1b[31merror" in written
    assert b"[/red]" in written
    written = re.sub(rb"\x1b\[(?:[\d;]*m|\?25[hl]|2K|1A)|\r", b"", written)
    assert not OBEYED.search(written), written


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_of_another_encoding(device_folder, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "reft_edge"]
    done = subprocess.run([*command, "run", "👍é\u202e", "hi"], capture_output=True, env=environment)
    assert done.returncode == 1
    assert b"\\U0001f44d" in done.stderr
    assert b"Traceback" not in done.stderr


def test_readers_that_leave_and_full_disks(device_folder):
    command = [sys.executable, "-m", "reft_edge", "run", str(device_folder / "export"), "hi"]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (141, b"")
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"a\xffb", "line 1 has the byte 0xff"),
        (b"one\ntw\xed\xa0\x80o\n", "line 2 has the byte 0xed"),
        ("hi".encode("utf-16"), "UTF-16"),
        ("hi".encode("utf-16-le"), "UTF-16"),
        (b"what is a \0 byte", "zero byte"),
    ],
)
def test_standard_input_that_is_not_utf8(device_folder, given, message):
    told = call("run", device_folder / "export", "-", codes=(1,), input=given)
    assert f"error: standard input {'is not' if 'byte 0x' in message else ''}" in told
    assert message in told
    told = call("chat", device_folder / "export", "--max-tokens", 2, input=given + b"\n/help\n")
    assert message.replace("line 2", "line 1") in told
    assert "this list" in told


@pytest.mark.parametrize("given", [b"hi\n", b"hi\r\n", b"\xef\xbb\xbfhi\n", b"hi"])
def test_a_piped_prompt_is_the_same_prompt(device_folder, given):
    options = [device_folder / "export", "--max-tokens", 5]
    assert call("run", *options, "-", input=given) == call("run", *options, "hi")


def test_a_piped_prompt_keeps_what_is_its_own(device_folder):
    options = [device_folder / "export", "--max-tokens", 1, "--json"]

    def tokens(*arguments: object, **given: object) -> int:
        return json.loads(call("run", *options, *arguments, **given))["prompt_tokens"]

    assert tokens("-", input="a\r\nb\n\n") == tokens("a\nb\n")


def test_texts_to_classify_are_lines(device_folder):
    options = [device_folder / "encoder", "-a", device_folder / "labels.safetensors", "--json"]
    told = call("run", *options, "-", input=b"\xef\xbb\xbfone\xe2\x80\xa8text\r\nanother\r\n\r\n")
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "x", "hi", "--threads", "0"],
        ["run", "x", "hi", "--threads", "-3"],
        ["run", "x", "hi", "--max-tokens", "-1"],
        ["run", "x", "hi", "--top-k", "-1"],
        ["run", "x", "hi", "--seed", "-1"],
        ["chat", "x", "--threads", "-3"],
        ["chat", "x", "--max-tokens", "0"],
        ["serve", "x", "--threads", "-3"],
        ["serve", "x", "--port", "65536"],
        ["bench", "x", "--threads", "-3"],
        ["eval", "x", "y", "--threads", "0"],
        ["eval", "x", "y", "--batch-size", "0"],
        ["eval", "x", "y", "--limit", "-2"],
        ["train", "x", "y", "-o", "z", "--save-every", "0"],
        ["train", "x", "y", "-o", "z", "--seed", str(2**64)],
        ["merge", "x", "y", "-o", "z", "--rank", "0"],
        ["compare", "x", "y", "--seed", "-1"],
    ],
)
def test_numbers_that_make_no_sense(arguments):
    assert arguments[-2] in call(*arguments, codes=(2,))


def test_tables_are_whole_in_pipes(capsys):
    show_table([("name", "what"), ("日本", "1"), ("a\nb\x1b", "x" * 300), ("[red]:smile:", "")])
    head, wide, long, plain = capsys.readouterr().out.splitlines()
    assert head == "name          what"
    assert wide == "日本          1", "two columns a character"
    assert long == "a\\nb\\x1b" + " " * 6 + "x" * 300
    assert plain == "[red]:smile:"


def test_nobody_writes_around_the_clean_streams():
    """But for `input`, which gets a printable prompt."""
    around = {"print", "input", "typer.echo", "typer.secho", "click.echo", "Console", "sys.stdout.write"}
    allowed = {
        "streams.py",
        "screen.py",
        "console.py",
        "builder_process.py",
    }  # the last one prints into a pipe
    for folder in ("reft_edge", "runtime", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in allowed or "web" in path.parts:
                continue
            used = {
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            }
            assert not used & (around - ({"input"} if path.name == "chat.py" else set())), path
