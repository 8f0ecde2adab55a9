"""Chat templates, rendered as transformers renders them, in a sandbox that ends what a stranger's template begins.

Everything that a template does costs from an allowance: a pass of a loop, a call, every character or element that comes
of them. What would grow past it is refused before it is made. The allowance grows with the conversation, so that no
template that only writes its conversation down meets it.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

from reft_edge.errors import ReftEdgeError
from reft_edge.model.template_allowance import Allowance, allowance, measure, metered
from reft_edge.model.template_environment import Environment, Marks, marks

Span = tuple[int, int]
"""Characters of a text: the first, and the one behind the last."""

LONGEST_SOURCE = 128 * 1024
"""Characters of a template."""


class Template:
    """A compiled template. Raises ReftEdgeError if it cannot be compiled."""

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_SOURCE:
            raise ReftEdgeError(
                f"the model's chat template has {len(source):,} characters; "
                f"at most {LONGEST_SOURCE:,} are taken"
            )
        self.marked = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        """Whether it says by `{% generation %}` what is trained."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of Python, at what jinja2 made of the source
                self._template = Environment().from_string(source)
        except Exception as error:  # a parser's and a compiler's kinds are many
            raise _failed(error) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as text. Raises ReftEdgeError where the template fails, refuses, or does not end."""
        return self._bounded(self._template.render, messages, variables)

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> tuple[str, tuple[Span, ...] | None]:
        """The same, and the characters that `{% generation %}` marks, as `render` raises.

        None in place of them if the template marks in a macro or another part that is written elsewhere.
        """
        found = Marks()

        def write(**given: Any) -> str:
            parts = []
            for part in metered(self._template.generate(**given)):
                parts.append(part)
                found.written += len(part)
            return "".join(parts)

        token = marks.set(found)
        try:
            text = self._bounded(write, messages, variables)
        finally:
            marks.reset(token)
        spans = tuple((start, start + len(content)) for start, content in found.spans)
        whole = all(text.startswith(content, start) for start, content in found.spans)
        return text, spans if whole else None

    def _bounded(
        self, write: Callable[..., str], messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]
    ) -> str:
        plain = [_as_transformers_passes(message) for message in messages]
        try:
            token = allowance.set(Allowance(measure([plain, list(variables.values())], None)))
            try:
                return write(messages=plain, **variables)
            finally:
                allowance.reset(token)
        except Exception as error:  # a template's own expressions raise of every kind
            raise _failed(error) from error


def _failed(error: Exception) -> ReftEdgeError:
    if isinstance(error, ReftEdgeError):
        return error
    words = str(error) if isinstance(error, TemplateError | SecurityError) else _named(error)
    return ReftEdgeError(f"the model's chat template failed: {words}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _as_transformers_passes(message: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are null are left out, and reasoning goes by the names that templates know."""
    if not isinstance(message, Mapping):
        raise ReftEdgeError(f"a message must be an object, not {type(message).__name__}")
    given = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}
