"""One row to tokens: the answers that are trained, each with the conversation before it as its prompt.

A row is `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`, and may have `tools`. Every answer of the assistant is
an example of its own: its prompt is what the model will see before it gives that answer, earlier answers as the template
writes them then. So positions and template do in training what they do when the model runs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Message, Prompts
from reft_edge.training.answers import Tools, split_answer, with_eos

IGNORED = -100
"""Stands for a token that is not trained where targets are given to torch's cross entropy."""
_WEIGHTS = ("weight", "train", "training")
"""Fields by which files say whether a message is trained; those that are not there mean that it is."""
_OLD_FORMS = {"functions": "tools", "function_call": "tool_calls"}
"""OpenAI's names of before, and those that took their place."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class Example:
    """One answer as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    trained: tuple[bool, ...] | None = None
    """Whether each token of the completion is trained; None for all."""

    @property
    def targets(self) -> tuple[int, ...]:
        """The completion, IGNORED in place of tokens that are not trained."""
        if self.trained is None:
            return self.completion
        pairs = zip(self.completion, self.trained, strict=True)
        return tuple(token if trained else IGNORED for token, trained in pairs)

    @property
    def count(self) -> int:
        """Tokens that are trained."""
        return len(self.completion) if self.trained is None else sum(self.trained)


@dataclass(frozen=True)
class View:
    """One answer as it is trained."""

    example: Example
    notes: tuple[str, ...] = ()
    """What is to be told of it; the same words for every row of the same kind."""


def encode_row(row: Any, prompts: Prompts, prompt_format: str, start: int = 0) -> Example:
    """A row's last answer as tokens. Raises ReftEdgeError as `view_row` does."""
    return view_row(row, prompts, prompt_format, start).example


def view_row(row: Any, prompts: Prompts, prompt_format: str, start: int = 0) -> View:
    """A row's last answer as it is trained. Raises ReftEdgeError as `view_turns` does, and if it is not trained."""
    views, notes = view_turns(row, prompts, prompt_format, start, last_turn=True)
    if not views:
        raise ReftEdgeError(f"the row trains nothing: it has {', '.join(notes)}")
    return View(views[0].example, (*notes, *views[0].notes))


def view_turns(
    row: Any, prompts: Prompts, prompt_format: str, start: int = 0, last_turn: bool = False
) -> tuple[list[View], list[str]]:
    """The answers of a parsed row that are trained, or the last alone, and what is to be told of the row.

    Of `messages`, those before number `start` are only context. Raises ReftEdgeError if the row is not of a known form, or an
    answer cannot be told from its prompt.
    """
    if not isinstance(row, dict):
        raise ReftEdgeError('expected an object like {"prompt": ..., "completion": ...}')
    _refuse_old_forms(row)
    tools = _tools(row.get("tools"))
    if prompt_format == "raw" and ("messages" in row or tools):
        raise ReftEdgeError(
            "messages need the chat template, as tools do; raw rows have `prompt` and `completion`"
        )
    if "messages" in row:
        return _view_answers(_messages(row["messages"]), tools, prompts, start, last_turn)
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ReftEdgeError(
            'expected text under "prompt" and "completion", or a list under "messages"; '
            f"found the fields {sorted(row)}"
        )
    if not completion.strip():
        raise ReftEdgeError("the completion is empty")
    if prompt_format == "chat":
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _view_answers(messages, tools, prompts, 0, last_turn)
    completion, notes = with_eos(completion, prompts)
    if not completion.removesuffix(prompts.eos).strip():
        raise ReftEdgeError("the completion is empty but for the token that ends it")
    ids = tuple(prompts.encode_after(prompt, completion))
    return [_view(Example(tuple(prompts.encode_raw(prompt)), ids), prompts, notes)], []


def _tools(tools: Any) -> Tools:
    """A row's tools, which some files hold as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ReftEdgeError(f"the text under `tools` is not valid JSON ({error})") from error
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tools or None
    raise ReftEdgeError("expected a list of objects under `tools`")


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ReftEdgeError("expected at least two messages")
    return [_message(message) for message in messages]


def _refuse_old_forms(fields: Mapping[str, Any]) -> None:
    for old, new in _OLD_FORMS.items():
        if fields.get(old):
            raise ReftEdgeError(f"`{old}` is the old form of `{new}`, and is not read; write `{new}`")


def _message(message: Any) -> dict[str, Any]:
    """One message as the server, too, hands it on: texts in parts are joined, a developer is the system."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ReftEdgeError('every message needs text under "role" and "content"')
    _refuse_old_forms(message)
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ReftEdgeError("expected a list of objects under `tool_calls`")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else None
            for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise ReftEdgeError('every message needs text under "role" and "content"; its parts, too')
        content = "".join(map(str, texts))
    if not isinstance(content, str) and not (content is None and calls):
        raise ReftEdgeError('every message needs text under "role" and "content"')
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}


def _view_answers(
    messages: Sequence[Message], tools: Tools, prompts: Prompts, start: int, last_turn: bool
) -> tuple[list[View], list[str]]:
    chosen, notes = _trained(messages, start, last_turn)
    views = []
    for number in chosen:
        try:
            answer = split_answer(messages[: number + 1], tools, prompts)
        except ReftEdgeError as error:
            if len(chosen) == 1:
                raise
            raise ReftEdgeError(
                f"message {number + 1}: {error} (--last-turn trains only the last answer)"
            ) from error
        prompt, ids, places = prompts.encode_with_places(answer.before, answer.text)
        trained = [any(first < end and begin < last for begin, end in answer.spans) for first, last in places]
        if not any(trained):
            notes.append("answers in which the chat template marks nothing to train, so they are left out")
            continue
        told = list(answer.notes)
        if not all(trained):
            told.append("answers of which only the part that the chat template marks is trained")
        example = Example(tuple(prompt), tuple(ids), None if all(trained) else tuple(trained))
        views.append(_view(example, prompts, told))
    return views, notes


def _trained(messages: Sequence[Message], start: int, last_turn: bool) -> tuple[list[int], list[str]]:
    """Which messages are trained, and what is to be told of the others."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] < max(start, 1):
        found = ", ".join(dict.fromkeys(repr(message["role"]) for message in messages[start:]))
        raise ReftEdgeError(
            f"no message is an answer of the assistant's, so there is nothing to train; found {found}"
        )
    notes = ["messages behind a row's last answer, which are not read"] * (len(messages) - 1 - answers[-1])
    if answers[0] == 0 and start == 0:
        notes.append("answers that nothing comes before, which are context only")
    answers = [number for number in answers if number >= max(start, 1)]
    if last_turn:
        notes += ["earlier answers that are context only, since a row's last answer is what is trained"] * (
            len(answers) - 1
        )
    chosen = []
    for number in answers[-1:] if last_turn else answers:
        message = messages[number]
        if not _wanted(message):
            notes.append("answers that the rows take out of the training (weight 0, or train false)")
        elif (message.get("content") or "").strip() or message.get("tool_calls"):
            chosen.append(number)
        elif number == answers[-1]:
            raise ReftEdgeError("the answer is empty: the last message has neither text nor tool calls")
        else:
            notes.append("earlier answers that are empty, so they are not trained")
    return chosen, notes


def _wanted(message: Message) -> bool:
    """Whether a message is trained, by its own fields. Raises ReftEdgeError for a weight between, or for parts of a text."""
    for name in _WEIGHTS:
        value = message.get(name)
        if value is not None and (not isinstance(value, bool | int | float) or value not in (0, 1)):
            raise ReftEdgeError(
                f"a message has the {name} {value!r}; expected 0 or 1, since an answer is trained wholly or not at all"
            )
    for name in ("train_detail", "training_detail"):
        if message.get(name):
            raise ReftEdgeError(f"a message has `{name}`; only whole messages can be taken out, by `train`")
    return all(message.get(name) in (None, 1) for name in _WEIGHTS)


def _view(example: Example, prompts: Prompts, notes: Iterable[str]) -> View:
    if not example.prompt:
        raise ReftEdgeError("the prompt is empty; an intervention needs at least one token")
    notes = list(notes)
    if not set(prompts.stop_ids).isdisjoint(example.completion[:-1]):
        notes.append("answers that hold a token at which the model stops, so that it will end them there")
    return View(example, tuple(notes))
