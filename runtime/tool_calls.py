"""Calls of tools in an answer, found while it comes."""

from collections.abc import Iterator, Mapping, Sequence

from reft_edge.runtime.answer_parts import CallBegins, Part, Schemas, Text, joined
from reft_edge.runtime.call_blocks import SPACE, Block, block_of


class CallReader:
    """Divides an answer into text and calls.

    A call that names no known tool is text, as is all else. Space around calls is left out.
    """

    def __init__(self, markers: Mapping[str, tuple[str, str]], tools: Schemas, several: bool = True) -> None:
        """`markers`: what calls begin with, and of each, the way in which they are written (`json`, `named`, `function`,
        `gemma`) and what they end with. `several`: whether more than one call is wanted; others are left out."""
        self._markers, self._tools, self._several = markers, tools, several
        self._openings = "{" if any(marker.startswith("[") for marker in markers) else "{["
        """Characters with which an answer begins that may be JSON without a marker."""
        self._closer = ""
        self._block: Block | None = None
        self._raw = ""
        """Of the block: what becomes text if it is no call."""
        self._held = ""
        """Space, and what may become a marker."""
        self._fresh = True
        """Whether there was nothing but space yet."""
        self.calls = 0

    def push(self, text: str) -> list[Part]:
        """What more of the answer brings."""
        return joined(part for character in text for part in self._feed(character))

    def finish(self) -> list[Part]:
        """What is left at the answer's end."""
        left = self._held
        if self._block is not None and self._block.pending:
            left = self._raw
        self._held, self._block = "", None
        if not left or self._done or (self.calls and not left.strip()):
            return []
        return [Text(left)]

    @property
    def _done(self) -> bool:
        return bool(self.calls) and not self._several and self._block is None

    def _feed(self, character: str) -> Iterator[Part]:
        if self._block is None:
            if not self._done:
                yield from self._feed_text(character)
            return
        found = self._block.feed(character)
        if found is None:
            yield from self._leave()
            yield from self._feed(character)
            return
        self._raw = "" if found else self._raw + character
        for part in found:
            if isinstance(part, CallBegins):
                self.calls += 1
            if self._several or self.calls == 1:
                yield part
        if self._block.over:
            self._block, self._raw = None, ""

    def _leave(self) -> Iterator[Part]:
        """Out of a block that is no call, or has no more of them."""
        raw, pending = self._raw, self._block is not None and self._block.pending
        self._block, self._raw = None, ""
        if pending and raw and not self._done:
            self._closer = ""
            yield Text(raw)

    def _feed_text(self, character: str) -> Iterator[Part]:
        if self._fresh and character in self._openings:
            self._begin("", "json", "")
            yield from self._feed(character)
            return
        held = self._held + character
        if self._closer and held.endswith(self._closer):
            self._held, self._closer = "", ""
            return
        for marker, (way, closer) in self._markers.items():
            if held.endswith(marker):
                before = held[: -len(marker)]
                if text := before.rstrip(SPACE):
                    yield Text(text)
                self._held = before[len(text) :]
                self._begin(marker, way, closer)
                return
        markers = (*self._markers, self._closer)
        ready = len(held) - _beginning(held, markers)
        ready = len(held[:ready].rstrip(SPACE))
        self._held = held[ready:]
        if ready:
            self._fresh = False
            yield Text(held[:ready])

    def _begin(self, marker: str, way: str, closer: str) -> None:
        self._block = block_of(way, closer, self._tools)
        self._raw, self._held = self._held + marker, ""
        self._fresh, self._closer = False, closer


def _beginning(text: str, markers: Sequence[str]) -> int:
    """Characters at a text's end with which a marker may begin."""
    longest = min(len(text), max(map(len, markers)))
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)
