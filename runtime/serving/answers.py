"""Answers in OpenAI's forms, whole or as the events of a stream."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from reft_edge.runtime.answer_parts import Arguments, CallBegins, Part, Text, Thought
from reft_edge.runtime.request import Piece
from reft_edge.runtime.serving.errors import ApiError, error_body
from reft_edge.runtime.serving.logprobs import ChatScores, CompletionScores
from reft_edge.runtime.tool_use import AnswerReader

DONE = "data: [DONE]\n\n"
Counts = dict[str, int]


class AnswerForm(Protocol):
    """Makes the answer of one request out of its choices' pieces."""

    def whole(self, choices: Sequence[Sequence[Piece]], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The body of an answer that does not stream. Raises ReftEdgeError for numbers that are none."""

    def begin(self) -> Iterator[str]:
        """What a stream begins with."""

    def take(self, index: int, piece: Piece) -> Iterator[str]:
        """What a piece of a choice adds to the stream. Raises ReftEdgeError as `whole` does."""

    def end(self, prompt_tokens: int, tokens: int) -> Iterator[str]:
        """What ends a stream that went well."""

    def failed(self, error: ApiError) -> Iterator[str]:
        """What ends a stream that did not."""


def usage(prompt_tokens: int, completion_tokens: int) -> Counts:
    """Token counts as the API names them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One event of a stream, as text."""
    data = f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
    return data if name is None else f"event: {name}\n{data}"


class _Choices:
    """What answers of chat and text completions have in common."""

    kinds: tuple[str, str]
    """Of a whole answer and of an event."""
    prefix: str

    def __init__(self, model: str, wants_usage: bool) -> None:
        self._model, self._wants_usage = model, wants_usage
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _chunk(self, choice: dict[str, Any]) -> str:
        extra = {"usage": None} if self._wants_usage else {}
        return event({**self._object(self.kinds[1], [choice]), **extra})

    def whole(self, choices: Sequence[Sequence[Piece]], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        found = [self._choice(index, pieces) for index, pieces in enumerate(choices)]
        return {**self._object(self.kinds[0], found), "usage": usage(prompt_tokens, tokens)}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise AssertionError(index, pieces)

    def begin(self) -> Iterator[str]:
        yield from ()

    def end(self, prompt_tokens: int, tokens: int) -> Iterator[str]:
        if self._wants_usage:
            yield event({**self._object(self.kinds[1], []), "usage": usage(prompt_tokens, tokens)})
        yield DONE

    def failed(self, error: ApiError) -> Iterator[str]:
        yield event(error_body(error))


class TextAnswer(_Choices):
    """Of /v1/completions."""

    kinds = ("text_completion", "text_completion")
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        wants_usage: bool,
        scores: Sequence[CompletionScores] | None,
        echoes: Sequence[str] | None = None,
    ) -> None:
        """`scores`: one a choice; `echoes`: what each choice's text begins with."""
        super().__init__(model, wants_usage)
        self._scores = scores
        self._echoes = dict(enumerate(echoes or ()))

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = self._echoes.get(index, "") + "".join(piece.text for piece in pieces)
        logprobs = None
        if self._scores is not None:
            scores = self._scores[index]
            found = [score for piece in pieces for score in piece.tokens]
            logprobs = scores.take(found, text, last=True) or scores.nothing
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}

    def take(self, index: int, piece: Piece) -> Iterator[str]:
        last = piece.finish_reason is not None
        text = self._echoes.pop(index, "") + piece.text
        logprobs = None if self._scores is None else self._scores[index].take(piece.tokens, text, last)
        yield self._chunk(
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        )


class ChatAnswer(_Choices):
    """Of /v1/chat/completions."""

    kinds = ("chat.completion", "chat.completion.chunk")
    prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        wants_usage: bool,
        scores: Sequence[ChatScores] | None,
        reader: Callable[[], AnswerReader | None],
    ) -> None:
        """`reader`: makes what divides one choice into its parts, None where all of it is text."""
        super().__init__(model, wants_usage)
        self._scores, self._make_reader = scores, reader
        self._streams: dict[int, _Deltas] = {}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        parts, reason = parts_of(pieces, self._make_reader())
        message: dict[str, Any] = {"role": "assistant", **message_of(parts), "refusal": None}
        logprobs = None
        if self._scores is not None:
            found = [score for piece in pieces for score in piece.tokens]
            text = "".join(piece.text for piece in pieces)
            logprobs = self._scores[index].take(found, text, last=True) or ChatScores.nothing
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def take(self, index: int, piece: Piece) -> Iterator[str]:
        last = piece.finish_reason is not None
        logprobs = None if self._scores is None else self._scores[index].take(piece.tokens, piece.text, last)
        if index not in self._streams:
            self._streams[index] = _Deltas(self._make_reader())
        stream = self._streams[index]
        deltas = list(stream.take(piece)) or ([{}] if logprobs else [])
        for delta in deltas:
            yield self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
            logprobs = None
        if last:
            reason = finish_reason(piece.finish_reason, stream.reader)
            yield self._chunk({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})


class _Deltas:
    """What one choice gains, as `delta` objects."""

    def __init__(self, reader: AnswerReader | None) -> None:
        self.reader = reader
        self._begun = False
        self._calls = 0

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        last = piece.finish_reason is not None
        deltas = [self._delta(part) for part in _parts(piece.text, self.reader, last)]
        if not deltas and not self._begun and (last or self.reader is None):
            deltas = [{"content": ""}]
        for delta in deltas:
            yield delta if self._begun else {"role": "assistant", **delta}
            self._begun = True

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"content": part.text}
        if isinstance(part, Thought):
            return {"reasoning_content": part.text}
        if isinstance(part, CallBegins):
            self._calls += 1
            return {"tool_calls": [{"index": self._calls - 1, **call_object(part.name, "")}]}
        return {"tool_calls": [{"index": self._calls - 1, "function": {"arguments": part.text}}]}


def _parts(text: str, reader: AnswerReader | None, last: bool) -> list[Part]:
    if reader is None:
        return [Text(text)] if text else []
    return reader.push(text, last)


def parts_of(pieces: Sequence[Piece], reader: AnswerReader | None) -> tuple[list[Part], str | None]:
    """The parts of a choice that has ended, and why it ended."""
    parts = _parts("".join(piece.text for piece in pieces), reader, last=True)
    return parts, finish_reason(pieces[-1].finish_reason, reader)


def finish_reason(reason: str | None, reader: AnswerReader | None) -> str | None:
    """As the API has it, where calls of tools are a reason of their own."""
    return "tool_calls" if reason == "stop" and reader is not None and reader.called else reason


def call_object(name: str, arguments: str) -> dict[str, Any]:
    """A call, with an id of its own."""
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def calls_of(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Names and arguments of the calls in an answer."""
    found: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallBegins):
            found.append((part.name, ""))
        elif isinstance(part, Arguments):
            found[-1] = (found[-1][0], found[-1][1] + part.text)
    return found


def message_of(parts: Sequence[Part]) -> dict[str, Any]:
    """The content of an assistant's message."""
    text = "".join(part.text for part in parts if isinstance(part, Text))
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    calls = [call_object(*call) for call in calls_of(parts)]
    return {
        "content": text if text or not calls else None,
        **({"reasoning_content": thought} if thought else {}),
        **({"tool_calls": calls} if calls else {}),
    }
