"""Rich's console for texts of strangers: no markup, no control characters but rich's own."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from reft_edge.terminal import printable


class Screen(Console):
    """A console on which texts stand as they are, control characters escaped.

    Rich's markup, its emoji names and its colouring of numbers and paths are off, since paths and names may hold what it
    takes for markup.
    """

    def __init__(self, stderr: bool = False, quiet: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(
            file=getattr(stream, "rich_proxied_file", stream),
            stderr=stderr,
            quiet=quiet,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Rich's lines of text with styles; what moves the cursor are segments of another kind."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Who read what a command says of its work is gone: the work goes on, and says nothing more."""
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True

    def say(self, text: str, style: str | None = None) -> None:
        """Print a text without breaking its lines."""
        self.print(printable(text), style=style, soft_wrap=True)

    def working(self, text: str) -> "Working":
        """A status line with what is being done, as a context."""
        return Working(Text(printable(text)), console=self)


class Working(Status):
    """Rich's status, whose texts are no markup."""

    def __enter__(self) -> "Working":
        super().__enter__()
        return self

    def step(self, text: str) -> None:
        """Say what is being done now."""
        self.update(Text(f"{printable(text)} …"))
