"""What clients of /v1/responses send, as a request for a chat completion."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import FailFast, Field, field_validator

from reft_edge.runtime.serving.chat_api import ChatRequest, TemplateArguments
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.openai_api import Body, Generate, read_body

_TOO = set(Generate.model_fields) - {"response_format", "stream_options", "n"}
"""Fields that mean the same in both."""


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: str
    input: Any
    """A text, or a list of items."""
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    tools: Annotated[list[dict[str, Any]], FailFast()] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default_factory=dict)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    stop: Any = None
    structured_outputs: dict[str, Any] | None = None
    grammar: str | None = None
    adapters: dict[str, Any] | None = None
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)

    @field_validator("input")
    @classmethod
    def _text_or_items(cls, value: Any) -> Any:
        if isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(item, dict) for item in value)
        ):
            return value
        raise ValueError("expected a text, or a list of objects")

    def chat(self) -> ChatRequest:
        """The same, as /v1/chat/completions has it. Raises ApiError with the place of what is wrong."""
        messages, places = _messages(self)
        given = self.model_dump(exclude_none=True)
        fields: dict[str, Any] = {name: value for name, value in given.items() if name in _TOO}
        fields |= {
            "messages": messages,
            "tools": [_tool(number, tool) for number, tool in enumerate(self.tools)],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_completion_tokens": self.max_output_tokens,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if self.text.get("format"):
            fields["response_format"] = _response_format(self.text["format"])
        try:
            return read_body(ChatRequest, fields)
        except ApiError as error:
            raise told(error, places) from error


def told(error: ApiError, places: list[str]) -> ApiError:
    """An error of a chat completion with the place that this API has for it."""

    def place(found: re.Match[str]) -> str:
        return places[int(found[1])] if int(found[1]) < len(places) else "input"

    def plain(text: str) -> str:
        text = re.sub(r"^messages\.(\d+)", place, text)
        text = re.sub(r"^messages\b", "input", text)
        text = re.sub(r"^(tools\.\d+)\.function", r"\1", text)
        text = re.sub(r"^max_completion_tokens", "max_output_tokens", text)
        return re.sub(r"^response_format(\.json_schema)?", "text.format", text)

    param = None if error.param is None else plain(error.param)
    return ApiError(error.status, plain(str(error)), error.code, error.headers, param)


def _messages(body: ResponsesRequest) -> tuple[list[dict[str, Any]], list[str]]:
    """The conversation, and the place of each of its messages."""
    found: list[dict[str, Any]] = []
    places: list[str] = []

    def add(message: dict[str, Any], place: str) -> None:
        found.append(message)
        places.append(place)

    if body.instructions is not None:
        add({"role": "system", "content": body.instructions}, "instructions")
    if isinstance(body.input, str):
        add({"role": "user", "content": body.input}, "input")
        return found, places
    for number, item in enumerate(body.input):
        place = f"input.{number}"
        kind = item.get("type", "message")
        if kind == "message":
            fields = {name: item[name] for name in item if name not in ("type", "id", "status", "phase")}
            add(fields, place)
        elif kind == "function_call":
            call = {
                "id": item.get("call_id"),
                "function": {"name": item.get("name"), "arguments": item.get("arguments", "{}")},
            }
            if not found or found[-1].get("role") != "assistant":
                add({"role": "assistant"}, place)
            found[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            add(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output", "")},
                place,
            )
        elif kind != "reasoning":  # thoughts of earlier turns are not shown to the model
            raise ApiError(
                400,
                f"{place}.type: expected message, function_call, function_call_output or reasoning",
                param=f"{place}.type",
            )
    return found, places


def _tool(number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        place = f"tools.{number}.type"
        raise ApiError(400, f"{place}: this server has tools of the type `function` only", param=place)
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


def _response_format(given: Any) -> Any:
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: given[name] for name in given if name != "type"}}
