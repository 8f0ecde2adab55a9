"""What clients of /v1/chat/completions send, checked: conversations, and tools with the choice among them."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, FailFast, Field, PrivateAttr, field_validator, model_validator

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import check_arguments
from reft_edge.runtime.serving.openai_api import Body, Generate
from reft_edge.runtime.tool_use import ToolChoice

MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_PARTS = {
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "file": "files",
    "input_file": "files",
    "refusal": "refusals",
}
_TEXTS = ("text", "input_text", "output_text")
"""Types of parts that are text; the last two are of /v1/responses."""
_EXTRAS = {
    "function_call": "function calls",
    "audio": "audio answers",
    "refusal": "refusals",
    "annotations": "annotations",
}
"""What messages hold beside their text, as clients send it back; empty, it asks for nothing."""


def _only_functions(what: str) -> AfterValidator:
    """For a `type`; `what` is named in the message."""

    def check(value: str) -> str:
        if value != "function":
            raise ValueError(f"this server has {what} of the type `function` only")
        return value

    return AfterValidator(check)


class Function(Body):
    """What a tool is."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("expected 1 to 64 letters, digits, dots, dashes or underscores")
        return value

    @field_validator("parameters")
    @classmethod
    def _object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError(
                'the schema is not of an object; expected {"type": "object", "properties": {...}}'
            )
        return value


class Tool(Body):
    type: Annotated[str, _only_functions("tools")]
    function: Function


class CalledFunction(Body):
    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call in a message of the assistant."""

    id: str
    type: Annotated[str, _only_functions("calls")] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    role: str
    content: str = ""
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _parts_that_fit(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        found = {name: value for name, value in fields.items() if name not in _EXTRAS or value}
        for name, what in _EXTRAS.items():
            if name in found:
                raise ValueError(f"{name}: {what} are not supported by this server")
        role = found.get("role")
        if role == "function":
            raise ValueError("role: messages of functions are not supported by this server; use tools")
        if role == "tool" and not found.get("tool_call_id"):
            raise ValueError("tool_call_id: a tool's result names the call that it is of")
        if role != "tool" and found.get("tool_call_id"):
            raise ValueError("tool_call_id: only messages of the role `tool` are results of tools")
        if role != "assistant" and found.get("tool_calls"):
            raise ValueError("tool_calls: only messages of the role `assistant` have tool calls")
        if not found.get("tool_calls"):
            found.pop("tool_calls", None)
            if "content" not in found and role != "assistant":
                raise ValueError("content: Field required")
        return found

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("expected a text, or a list of parts of type `text`")
        return "".join(map(_part_text, value))

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        found: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
            if self.name is not None:
                found["name"] = self.name
        if self.reasoning_content is not None:
            found["reasoning_content"] = self.reasoning_content
        return found


def _part_text(part: Any) -> str:
    if not isinstance(part, dict):
        raise ValueError("expected a list of parts, each an object with a `type`")
    kind = part.get("type")
    if kind not in _TEXTS:
        name = _PARTS.get(kind) if isinstance(kind, str) else None
        raise ValueError(
            f"{name} are not supported by this server; send parts of type `text`"
            if name
            else "only parts of type `text` are supported by this server"
        )
    if not isinstance(text := part.get("text"), str):
        raise ValueError("a part of type `text` has no text")
    known = ("type", "text", "cache_control", "annotations", "logprobs")
    if unknown := [name for name in part if name not in known]:
        raise ValueError(f"a part of type `text` has no field {unknown[0][:100]!r}")
    return text


def _template_arguments(given: dict[str, Any]) -> dict[str, Any]:
    try:
        check_arguments(given)
    except ReftEdgeError as error:
        raise ValueError(str(error)) from error
    return given


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_template_arguments)]
"""What a client gives the chat template beside the conversation, as vLLM's and llama.cpp's servers take it."""


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: Annotated[list[Tool], FailFast()] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    _choice: ToolChoice | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"tools.{number}.function.name: there are two tools of the name {name!r}")
        self._choice = self._chosen(names)
        form = self.constraint
        if self._choice is not None and form is not None and form.kind != "json_schema":
            raise ValueError("tools: an answer of a given form cannot call tools; leave out one of the two")
        return self

    def _chosen(self, names: list[str]) -> ToolChoice | None:
        mode, allowed = _mode(self.tool_choice, names)
        if not self.tools:
            if self.tool_choice not in ("auto", "none"):
                raise ValueError("tool_choice: there are no tools to choose from; send `tools`")
            return None
        if mode == "none":
            return None
        tools = tuple(
            tool.model_dump(exclude_none=True) for tool in self.tools if tool.function.name in allowed
        )
        return ToolChoice(tools, mode == "required", self.parallel_tool_calls)

    @property
    def choice(self) -> ToolChoice | None:
        """The tools that the answer may call; None where it may not call any."""
        return self._choice


def _mode(choice: str | dict[str, Any], names: list[str]) -> tuple[str, list[str]]:
    """`none`, `auto` or `required`, and the tools that it is about. Raises ValueError."""
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise ValueError("tool_choice: expected none, auto, required or an object that names a tool")
        return choice, names
    kind = choice.get("type")
    if kind == "function":
        inner = choice.get("function", choice)
        return "required", [_known(inner, names, "tool_choice.function.name")]
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        if not isinstance(inner, dict) or inner.get("mode") not in ("auto", "required"):
            raise ValueError("tool_choice.allowed_tools.mode: expected auto or required")
        listed = inner.get("tools")
        if not isinstance(listed, list) or not listed:
            raise ValueError("tool_choice.allowed_tools.tools: expected a list of tools, at least one")
        place = "tool_choice.allowed_tools.tools"
        found = [
            _known(tool.get("function", tool) if isinstance(tool, dict) else tool, names, f"{place}.{number}")
            for number, tool in enumerate(listed)
        ]
        return inner["mode"], found
    raise ValueError("tool_choice.type: expected function or allowed_tools")


def _known(given: Any, names: list[str], place: str) -> str:
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{place}: it names none of the tools")
    return name
