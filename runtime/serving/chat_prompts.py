"""Conversations as prompts: with the tools that the answer may call, and the form that it must have."""

import json
from collections.abc import Callable
from functools import partial

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.constraints import Constraint
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.serving.answers import ChatAnswer
from reft_edge.runtime.serving.chat_api import ChatRequest
from reft_edge.runtime.serving.choices import Prepared
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.logprobs import ChatScores
from reft_edge.runtime.serving.prompt_tokens import encoded
from reft_edge.runtime.token_bytes import TokenBytes
from reft_edge.runtime.tool_use import AnswerReader, ToolChoice, ToolUse


class ChatPrompts:
    """Of one model."""

    def __init__(self, model: SteeredModel, names: TokenBytes) -> None:
        self._model, self._names = model, names
        self._tools = ToolUse(model.prompts)

    def prepare(self, body: ChatRequest) -> Prepared:
        """A chat completion's prompt. Raises ApiError."""
        return self.prepare_with_reader(body)[0]

    def prepare_with_reader(self, body: ChatRequest) -> tuple[Prepared, Callable[[], AnswerReader | None]]:
        """The same, and what makes a reader of one answer."""
        prompt, thinks = self._rendered(body)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        scores = [ChatScores(self._names) for _ in range(body.n)] if body.logprobs else None
        reader = partial(self._reader, body, thinks)
        answer = ChatAnswer(body.model, wants_usage, scores, reader)
        return Prepared([prompt], answer, self._constraint(body, thinks), self._shown(body)), reader

    def _rendered(self, body: ChatRequest) -> tuple[list[int], bool]:
        """A conversation's tokens, and whether they end where thoughts begin."""
        if self._model.prompts.template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions with a prompt")
        messages = [message.plain() for message in body.messages]
        tools = body.choice.tools if body.choice is not None else ()
        text = self._tools.render(messages, tools, body.chat_template_kwargs)
        [ids] = encoded([text], self._model, special=False, what="messages")
        return ids, self._tools.thinks(text)

    def _reader(self, body: ChatRequest, thinks: bool) -> AnswerReader | None:
        return self._tools.reader(body.choice, thinks)

    def _shown(self, body: ChatRequest) -> tuple[str, ...]:
        return self._tools.shown if body.choice is not None or self._tools.marks is not None else ()

    def _constraint(self, body: ChatRequest, thinks: bool) -> Constraint | None:
        """The form that answers must have. Raises ApiError with the place of a tool that cannot be held to its schema."""
        if body.choice is None:
            return body.constraint
        answer = None if body.constraint is None else json.loads(body.constraint.text)
        try:
            form = self._tools.constraint(body.choice, thinks, answer)
            if form is not None:
                self._model.check_constraint(form)
        except ReftEdgeError as error:
            self._find_fault(body, body.choice)
            raise ApiError(400, f"tools: {error}", param="tools") from error
        return form

    def _find_fault(self, body: ChatRequest, choice: ToolChoice) -> None:
        """Raise ApiError for the first tool whose schema is not usable by itself."""
        if body.constraint is not None:
            self._model.check_constraint(body.constraint)
        places = {tool.function.name: number for number, tool in enumerate(body.tools)}
        for name, schema in choice.schemas.items():
            try:
                self._model.check_constraint(Constraint.json_schema(schema))
            except ReftEdgeError as error:
                place = f"tools.{places[name]}.function.parameters"
                raise ApiError(400, f"{place}: {error}", param=place) from error
