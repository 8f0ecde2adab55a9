"""What a model thinks before it answers, apart from the answer: templates of such models write it between marks."""

from collections.abc import Sequence

from reft_edge.runtime.answer_parts import Part, Text, Thought

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


def marks_of(template: str) -> tuple[str, str] | None:
    """What stands before and behind thoughts in a chat template; None if it has no such thing."""
    return next((marks for marks in MARKS if marks[0] in template), None)


class ThoughtReader:
    """Divides an answer into what is thought first, and what is answered."""

    def __init__(self, marks: tuple[str, str], begun: bool) -> None:
        """`begun`: whether the prompt ends with the first mark, so that the answer begins with thoughts."""
        self._first, self._last = marks
        self._state = "thoughts" if begun else "start"
        self._held = ""
        self._told = False

    def push(self, text: str) -> Sequence[Part]:
        """What more of the answer brings."""
        found: list[Part] = []
        self._held += text
        if self._state == "start":
            begins = self._held.lstrip()
            if begins.startswith(self._first):
                self._state, self._held = "thoughts", begins.removeprefix(self._first)
            elif not self._first.startswith(begins):
                self._state = "answer"
        if self._state == "thoughts":
            found += self._thoughts()
        if self._state == "space" and (rest := self._held.lstrip()):
            self._state, self._held = "answer", rest
        if self._state == "answer" and self._held:
            found.append(Text(self._held))
            self._held = ""
        return found

    def _thoughts(self) -> list[Part]:
        thought, ended, rest = self._held.partition(self._last)
        if ended:
            self._state, self._held = "space", rest
            return self._thought(thought.rstrip())
        keep = next((n for n in range(len(self._last) - 1, 0, -1) if self._held.endswith(self._last[:n])), 0)
        ready = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(ready) :]
        return self._thought(ready)

    def _thought(self, text: str) -> list[Part]:
        text = text if self._told else text.lstrip()
        self._told = self._told or bool(text)
        return [Thought(text)] if text else []

    def finish(self) -> Sequence[Part]:
        """What is left at the answer's end."""
        left, self._held = self._held, ""
        if self._state == "thoughts":
            return self._thought(left.rstrip())
        return [Text(left)] if left and self._state != "space" else []
