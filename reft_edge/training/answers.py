"""One answer of a conversation: where its prompt ends, what of it is trained, and what the chat template makes of it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import ANSWER, Message, Prompts

Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Answer:
    """The last message of a conversation as the chat template writes it."""

    before: str
    """What the model sees before it answers."""
    text: str
    """What it is to write, up to the end of its turn."""
    spans: tuple[tuple[int, int], ...]
    """Characters of `text` that are trained."""
    notes: tuple[str, ...] = ()
    """What is to be told of it; the same words for every row of the same kind."""


def split_answer(messages: Sequence[Message], tools: Tools, prompts: Prompts) -> Answer:
    """The last message's prompt and text. Raises ReftEdgeError if the template does not tell them apart, or leaves it out."""
    before = prompts.render(messages[:-1], tools=tools)
    whole, marked = prompts.render_marked(messages, tools)
    notes: list[str] = []
    if whole.startswith(before):
        answer = whole[len(before) :]
    else:
        answer, notes = _answer_behind_opener(before, whole, messages, tools, prompts)
    if not answer.strip():
        raise ReftEdgeError("the chat template writes nothing of the answer")
    notes += _not_written(messages, tools, before, answer, prompts)
    ended, more = ended_answer(answer, prompts)
    notes += more
    if marked == ((0, len(whole)),):
        return Answer(before, ended, ((0, len(ended)),), tuple(notes))
    if marked is None or not whole.endswith(answer):
        notes.append("answers that are trained wholly, since the chat template's marks cannot be followed")
        return Answer(before, ended, ((0, len(ended)),), tuple(notes))
    start = len(whole) - len(answer)
    spans = [(max(first - start, 0), end - start) for first, end in marked if end > start]
    if (kept := _common(answer, ended)) < len(ended):
        spans.append((kept, len(ended)))  # an end that was added
    return Answer(before, ended, tuple(spans), tuple(notes))


def _answer_behind_opener(
    before: str, whole: str, messages: Sequence[Message], tools: Tools, prompts: Prompts
) -> tuple[str, list[str]]:
    """The answer where a template begins a reply with more than it writes before a finished answer, as `<think>`.

    Raises ReftEdgeError where that is not what the prompt and the conversation differ in.
    """
    probe: Message = {"role": "assistant", "content": ANSWER}
    marked = prompts.render([*messages[:-1], probe], add_generation_prompt=False, tools=tools)
    start = _common(before, marked)
    if before.rfind("<", 0, start) > before.rfind(">", 0, start):
        start = before.rfind("<", 0, start)  # not within a tag
    opener, rest = before[start:], marked[start:]
    in_reply = start >= _common(before, prompts.render(messages[:-1], False, tools))
    closed = opener.startswith("<") and rest.startswith(f"</{opener[1:].strip()}")
    directly = closed or not opener.strip() or rest.lstrip().startswith(ANSWER)
    if not (in_reply and directly and whole.startswith(before[:start])):
        raise ReftEdgeError(
            "the chat template writes the conversation differently once the answer is in it, so what would be trained is "
            "not what the model will see; change the template, or train on prompts and completions with --raw"
        )
    if not opener.strip() or (closed and whole[start:].startswith(f"</{opener[1:].strip()}")):
        return whole[start:], []
    content = str(messages[-1].get("content") or "").lstrip()
    if content.startswith(opener.strip()):
        space = opener[len(opener.rstrip()) :]
        return content[len(opener.strip()) :].removeprefix(space) + (prompts.turn_tail or ""), []
    return whole[start:], [
        f"answers that are trained right behind {opener!r}, with which the chat template begins a reply"
    ]


def _common(one: str, other: str) -> int:
    """Characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, its) in pairs if mine != its), min(len(one), len(other)))


def _not_written(
    messages: Sequence[Message], tools: Tools, before: str, answer: str, prompts: Prompts
) -> list[str]:
    """What of the answer and the tools a template leaves out. Raises ReftEdgeError if that is a tool call or all the text."""
    earlier, message = messages[:-1], messages[-1]
    written = before[-200:] + answer
    calls = message.get("tool_calls") or ()
    notes = _calls_not_written(calls, answer)
    content = message.get("content")
    if prompts.turn_tail is None and isinstance(content, str) and content.strip():
        probe = {**message, "content": ANSWER}
        if ANSWER not in prompts.render([*earlier, probe], add_generation_prompt=False, tools=tools):
            raise ReftEdgeError("the chat template writes nothing of the answer's text")
    if not _holds(written, content):
        notes.append("answers of which the chat template writes only a part or another form; that is trained")
    for name in ("reasoning_content", "reasoning", "thinking"):
        if not _holds(written, message.get(name)):
            notes.append("answers with reasoning that the chat template does not write, so it is not trained")
            break
    if any(_tool_name(tool) not in before for tool in tools or ()):
        notes.append("rows with tools that the chat template does not write")
    return notes


def _calls_not_written(calls: Sequence[Mapping[str, Any]], answer: str) -> list[str]:
    """What of tool calls is not in an answer as it stands. Raises ReftEdgeError if that is a whole call."""
    notes = []
    functions = [_function(call) for call in calls]
    given = [function.get("name") for function in functions]
    for name, count in Counter(name if isinstance(name, str) else None for name in given).items():
        if name is None or answer.count(name) < count:
            raise ReftEdgeError(
                f"the chat template does not write {'the call' if count == 1 else f'all {count} calls'} of the tool {name!r}"
            )
    for arguments in (function.get("arguments") for function in functions):
        if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in answer:
            notes.append(
                "tool calls whose arguments are JSON text, which the chat template quotes once more; give them as an object"
            )
        if not all(_holds(answer, text) or json.dumps(text)[1:-1] in answer for text in _leaves(arguments)):
            notes.append(
                "tool calls of whose arguments the chat template writes only a part, or another form"
            )
    return notes


def _leaves(value: Any) -> Iterator[str]:
    """The texts that objects and lists hold."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _tool_name(tool: Mapping[str, Any]) -> str:
    return str(_function(tool).get("name"))


def _holds(written: str, text: Any) -> bool:
    """Whether a text stands there, white space aside."""
    if not isinstance(text, str) or text.strip() in written:
        return True
    return "".join(text.split()) in "".join(written.split())


def ended_answer(answer: str, prompts: Prompts) -> tuple[str, list[str]]:
    """The answer up to the first token that ends its turn; the model's own is added where the template writes none."""
    tail = prompts.turn_tail or ""
    body, end = (answer[: -len(tail)], tail) if tail and answer.endswith(tail) else (answer.rstrip(), "")
    if prompts.turn_end is not None and end:
        token = token_text(prompts, prompts.turn_end)
        return body + end[: end.index(token) + len(token)], []
    if body != answer and any(body.endswith(token_text(prompts, token)) for token in prompts.stop_ids):
        return body, []
    ended, notes = with_eos(answer if not end else body + end.rstrip(), prompts)
    added = f"answers to which the end {prompts.eos} was added, since the chat template writes none"
    return ended, notes or [added]


def with_eos(answer: str, prompts: Prompts) -> tuple[str, list[str]]:
    if not prompts.eos:
        return answer, ["answers without an end, since the model names no token that ends one"]
    return answer.removesuffix(prompts.eos) + prompts.eos, []


def token_text(prompts: Prompts, token: int | None) -> str:
    return "" if token is None else prompts.tokenizer.id_to_token(token) or ""
