"""/v1/responses: the newer of OpenAI's two APIs for conversations. Nothing is kept between requests."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response

from reft_edge.runtime.answer_parts import CallBegins, Part, Text, Thought
from reft_edge.runtime.request import Piece
from reft_edge.runtime.serving.answers import event
from reft_edge.runtime.serving.chat_prompts import ChatPrompts
from reft_edge.runtime.serving.choices import Prepared, answer_request
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.guard import Metrics
from reft_edge.runtime.serving.responses_api import ResponsesRequest
from reft_edge.runtime.serving.served import Decoder
from reft_edge.runtime.tool_use import AnswerReader

Events = Iterator[dict[str, Any]]


def add_responses_route(app: FastAPI, served: Decoder, metrics: Metrics, chats: ChatPrompts) -> None:
    """POST /v1/responses."""

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        body = await served.read(request, ResponsesRequest)
        chat = await served.work(body.chat)

        def prepare(_adapters: dict[str, float]) -> Prepared:
            prepared, reader = chats.prepare_with_reader(chat)
            return replace(prepared, answer=ResponseAnswer(body, reader))

        return await answer_request(served, metrics, request, chat, prepare, body.max_output_tokens, None)


class ResponseAnswer:
    """A response, whole or as the events of a stream."""

    def __init__(self, body: ResponsesRequest, reader: Callable[[], AnswerReader | None]) -> None:
        self._body, self._reader = body, reader()
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._items = _Items()
        self._reason: str | None = None
        self._number = 0

    def whole(self, choices: Sequence[Sequence[Piece]], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """See `answers.AnswerForm`."""
        for piece in choices[0]:
            for _ in self._take(piece):
                pass
        return self._response(prompt_tokens, tokens)

    def begin(self) -> Iterator[str]:
        """See `answers.AnswerForm`."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._object("in_progress", [])})

    def take(self, _index: int, piece: Piece) -> Iterator[str]:
        """See `answers.AnswerForm`."""
        for content in self._take(piece):
            yield self._event(content)

    def end(self, prompt_tokens: int, tokens: int) -> Iterator[str]:
        """See `answers.AnswerForm`."""
        response = self._response(prompt_tokens, tokens)
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def failed(self, error: ApiError) -> Iterator[str]:
        """See `answers.AnswerForm`."""
        response = self._object("failed", self._items.done)
        response["error"] = {"code": error.code or "server_error", "message": str(error)}
        yield self._event({"type": "response.failed", "response": response})

    def _take(self, piece: Piece) -> Events:
        last = piece.finish_reason is not None
        if self._reader is None:
            parts: list[Part] = [Text(piece.text)] if piece.text else []
        else:
            parts = self._reader.push(piece.text, last)
        for part in parts:
            yield from self._items.take(part)
        if last:
            self._reason = piece.finish_reason
            yield from self._items.end(cut=piece.finish_reason == "length")

    def _event(self, content: dict[str, Any]) -> str:
        self._number += 1
        return event({**content, "sequence_number": self._number - 1}, content["type"])

    def _response(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        cut = self._reason == "length"
        found = self._object("incomplete" if cut else "completed", self._items.done)
        found["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        found["usage"] = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + tokens,
        }
        return found

    def _object(self, status: str, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }


class _Items:
    """The output's items as they come, with the events that tell of them."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""

    def take(self, part: Part) -> Events:
        """The events of one part of an answer."""
        if isinstance(part, CallBegins):
            yield from self._close("completed")
            call = {"call_id": f"call_{uuid.uuid4().hex[:24]}", "name": part.name, "arguments": ""}
            yield from self._begin("function_call", "fc", call)
            return
        more: dict[str, Any] = {}
        if isinstance(part, Text):
            kind, name, more = "message", "response.output_text.delta", {"logprobs": []}
        elif isinstance(part, Thought):
            kind, name = "reasoning", "response.reasoning_text.delta"
        else:
            kind, name = "function_call", "response.function_call_arguments.delta"
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            own = {"role": "assistant", "content": []} if kind == "message" else {"summary": []}
            yield from self._begin(kind, "msg" if kind == "message" else "rs", own)
        self._text += part.text
        yield {"type": name, **self._place(), "delta": part.text, **more}

    def end(self, cut: bool) -> Events:
        """The events of the output's end; an output has one item at least."""
        if self._open is None and not self.done:
            yield from self._begin("message", "msg", {"role": "assistant", "content": []})
        yield from self._close("incomplete" if cut else "completed")

    def _begin(self, kind: str, prefix: str, fields: dict[str, Any]) -> Events:
        self._open = {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **fields}
        self._text = ""
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.done),
            "item": dict(self._open),
        }
        if kind == "message":
            yield {"type": "response.content_part.added", **self._place(), "part": self._part()}

    def _close(self, status: str) -> Events:
        if self._open is None:
            return
        kind, place = self._open["type"], self._place()
        self._open["status"] = status
        if kind == "function_call":
            self._open["arguments"] = self._text
            done = {"name": self._open["name"], "arguments": self._text}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        elif kind == "reasoning":
            self._open["content"] = [{"type": "reasoning_text", "text": self._text}]
            yield {"type": "response.reasoning_text.done", **place, "text": self._text}
        else:
            self._open["content"] = [self._part()]
            yield {"type": "response.output_text.done", **place, "text": self._text, "logprobs": []}
            yield {"type": "response.content_part.done", **place, "part": self._part()}
        index, item = len(self.done), self._open
        self.done.append(item)
        self._open = None
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self.done)}
        return place if self._open["type"] == "function_call" else {**place, "content_index": 0}
