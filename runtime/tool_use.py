"""One model's tools: how its template is told of them, and how its answers are read."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Message, Prompts
from reft_edge.runtime.answer_parts import Part, Schemas, Text, joined
from reft_edge.runtime.constraints import Constraint
from reft_edge.runtime.thoughts import ThoughtReader, marks_of
from reft_edge.runtime.tool_calls import CallReader
from reft_edge.runtime.tool_forms import (
    MISTRAL,
    MISTRAL_NAMED,
    CallForm,
    arguments_schema,
    calls_constraint,
    form_of,
    instruction,
    special_marks,
)

Tool = Mapping[str, Any]
"""As OpenAI's API has it: `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`."""
_PROBE = "reft_edge_probe"
_ID_SIZE = 9
"""Characters of a call's id that Mistral's templates take."""


@dataclass(frozen=True)
class ToolChoice:
    """Which tools an answer may call, and whether it must."""

    tools: tuple[Tool, ...]
    must: bool = False
    several: bool = True

    @cached_property
    def schemas(self) -> Schemas:
        """Of the arguments, by the tools' names."""
        return {
            tool["function"]["name"]: arguments_schema(
                tool["function"].get("parameters"), bool(tool["function"].get("strict"))
            )
            for tool in self.tools
        }


class ToolUse:
    """What one model's template says of tools and of thinking."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self.form: CallForm = form_of(f"{prompts.tool_template or ''}{prompts.template or ''}")
        self.marks = marks_of(prompts.template or "")
        """What stands around thoughts; None where the model does not think."""

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes tools down when it is given them."""
        tool = {"type": "function", "function": {"name": _PROBE, "description": _PROBE, "parameters": {}}}
        try:
            return _PROBE in self._prompts.render([{"role": "user", "content": "Hi"}], tools=[tool])
        except ReftEdgeError:
            return False

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """Special tokens whose text is needed to read calls and thoughts."""
        return special_marks(self.form, self._prompts.tokenizer, self.marks or ())

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool], arguments: Mapping[str, Any] | None = None
    ) -> str:
        """The conversation as text, with the tools where there are any. Raises ReftEdgeError as `Prompts.render`."""
        render = partial(self._prompts.render, arguments=arguments)
        if self.knows_tools:
            return render([self._known(message) for message in messages], tools=tools)
        plain = _merged([self._plain(message, messages) for message in messages])
        if not tools:
            return render(plain)
        told = instruction(self.form, tools)
        system = plain[0]["role"] == "system"
        if system:
            first = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}
            with_system = [first, *plain[1:]]
        else:
            with_system = [{"role": "system", "content": told}, *plain]
        try:
            return render(with_system)
        except ReftEdgeError:  # templates that refuse system messages
            first = {"role": "user", "content": with_system[0]["content"]}
            return render(_merged([first, *with_system[1:]]))

    def _known(self, message: Message) -> dict[str, Any]:
        """For a template that knows tools: arguments as objects, and ids that the family takes."""
        found = dict(message)
        if message.get("tool_calls"):
            found["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            found["tool_call_id"] = self._id(message["tool_call_id"])
        return found

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        given = {**function, "arguments": _as_object(function["arguments"])}
        return {**call, "id": self._id(call["id"]), "function": given}

    def _id(self, given: str) -> str:
        if self.form not in (MISTRAL, MISTRAL_NAMED) or (len(given) == _ID_SIZE and given.isalnum()):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[:_ID_SIZE]

    def _plain(self, message: Message, messages: Sequence[Message]) -> dict[str, Any]:
        """For a template that knows user and assistant only."""
        if message["role"] == "tool":
            return {
                "role": "user",
                "content": f"Result of {_called(message, messages)}:\n{message['content']}",
            }
        if not message.get("tool_calls"):
            return dict(message)
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        written = self.form.write(calls)
        text = f"{message['content']}\n{written}" if message.get("content") else written
        return {"role": message["role"], "content": text}

    def constraint(
        self, choice: ToolChoice, thinks: bool, answer: Mapping[str, Any] | None = None
    ) -> Constraint | None:
        """The form of an answer that must call tools, or call them or be JSON under the schema `answer`; None for a free
        one. `thinks`: whether the prompt ends where thoughts begin."""
        if not choice.must and answer is None:
            return None
        return calls_constraint(
            self.form,
            choice.schemas,
            self._prompts.tokenizer,
            choice.several,
            self.marks[1] if thinks and self.marks else "",
            None if choice.must else answer,
        )

    def thinks(self, prompt: str) -> bool:
        """Whether a rendered prompt ends where thoughts begin."""
        return self.marks is not None and prompt.rstrip().endswith(self.marks[0])

    def reader(self, choice: ToolChoice | None, thinks: bool) -> "AnswerReader | None":
        """What divides an answer into its parts; None where all of it is text."""
        if choice is None and self.marks is None:
            return None
        thoughts = None if self.marks is None else ThoughtReader(self.marks, thinks)
        calls = None if choice is None else CallReader(self.form.markers, choice.schemas, choice.several)
        return AnswerReader(thoughts, calls)


class AnswerReader:
    """Divides an answer, as it comes, into thoughts, text and calls."""

    def __init__(self, thoughts: ThoughtReader | None, calls: CallReader | None) -> None:
        self._thoughts, self._calls = thoughts, calls

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self._calls is not None and self._calls.calls > 0

    def push(self, text: str, last: bool = False) -> list[Part]:
        """What more of the answer brings; with `last`, all that is left."""
        parts: list[Part] = [Text(text)] if text else []
        if self._thoughts is not None:
            parts = [*self._thoughts.push(text), *(self._thoughts.finish() if last else ())]
        if self._calls is not None:
            parts = [found for part in parts for found in self._read(part, self._calls.push)]
            parts += self._calls.finish() if last else ()
        return joined(iter(parts))

    def _read(self, part: Part, push: Callable[[str], list[Part]]) -> list[Part]:
        return push(part.text) if isinstance(part, Text) else [part]


def _as_object(arguments: str) -> Any:
    """A call's arguments as templates take them; text that is no JSON object stays as it is."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _called(result: Message, messages: Sequence[Message]) -> str:
    """The name of the tool that gave a result."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            if call["id"] == result.get("tool_call_id"):
                return str(call["function"]["name"])
    return str(result.get("name") or "the tool")


def _merged(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of the user that follow each other as one: many templates want turns."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if found and message["role"] == "user" and found[-1]["role"] == "user":
            found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append(dict(message))
    return found
