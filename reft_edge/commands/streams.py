"""What a command reads from standard input and writes to its two outputs: UTF-8 in, nothing that a terminal obeys out."""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO, cast

from reft_edge.errors import ReftEdgeError
from reft_edge.files import decode_text
from reft_edge.terminal import printable

_READER_LEFT = 128 + 13
"""The exit code that shells give a program which a closed pipe stopped."""


class CleanStream:
    """A text stream whose control characters are escaped, but for newline and tab.

    It says that it is no terminal, so that nobody sends it colours. Rich's consoles look for `rich_proxied_file` and
    write there: what of them goes out is cleaned by `Screen`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text. Raises ReftEdgeError if it cannot be, and SystemExit where the reader of a pipe is gone."""
        with _no_reader(self.rich_proxied_file):
            self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts. Raises as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written. Raises as `write` does."""
        with _no_reader(self.rich_proxied_file):
            self.rich_proxied_file.flush()

    def isatty(self) -> bool:
        """No."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach"):  # ways around `write`
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


@contextmanager
def clean_streams() -> Iterator[None]:
    """Put clean streams in the places of standard output and standard error.

    Characters that an output's encoding lacks are escaped, too.
    """
    plain = sys.stdout, sys.stderr
    for stream in plain:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    clean = [cast(TextIO, CleanStream(stream)) if stream is not None else stream for stream in plain]
    sys.stdout, sys.stderr = clean
    try:
        yield
    finally:
        try:
            for stream in clean:
                if stream is not None:
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = plain


@contextmanager
def _no_reader(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _leave(stream)
    except OSError as error:
        _drop(stream)
        raise ReftEdgeError(f"cannot write the output: {error.strerror}") from error


def _leave(stream: TextIO) -> NoReturn:
    """End quietly: whoever read this does not want more, as `head` does not."""
    _drop(stream)
    raise SystemExit(_READER_LEFT)


def _drop(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere, or Python would complain of it at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def read_input() -> str:
    """All of standard input. Raises ReftEdgeError if it is not UTF-8."""
    return decode_text(_input().read(), "standard input")


def read_input_line() -> str:
    """The next line of standard input. Raises EOFError at its end, and ReftEdgeError if the line is not UTF-8."""
    line = _input().readline()
    if not line:
        raise EOFError
    return decode_text(line, "a line of standard input")


def _input() -> Any:
    if sys.stdin is None:
        raise ReftEdgeError("there is no standard input")
    return sys.stdin.buffer
