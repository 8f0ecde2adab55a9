"""Training data: JSONL rows to prompt and completion tokens.

A row is `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`, which ends with the assistant's answer, and may have
`tools`; other fields are ignored. A loss is only taken on the answer. Its prompt is what the model will see before it
answers, its completion what the chat template writes behind that, up to the end of the turn. What the user may not
expect of this is told as notices.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.adapter.positions import active, group_names, parse_positions
from reft_edge.errors import ReftEdgeError
from reft_edge.jsonl import RowSource, load_rows
from reft_edge.model.prompts import ANSWER, Message, Prompts

Tools = list[dict[str, Any]] | None

_WEIGHTS = ("weight", "train", "training")
"""Fields by which files say how much a message is trained; those that are not there mean wholly."""
_OLD_FORMS = {"functions": "tools", "function_call": "tool_calls"}
"""OpenAI's names of before, and those that took their place."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The rows of one file."""

    examples: list[Example]
    left_out: int
    """Rows longer than the limit, which are not trained on."""
    digest: str
    """SHA-256 of the file."""
    notices: tuple[str, ...] = ()
    """What of the rows is not trained, or not as it stands in the file."""


@dataclass(frozen=True)
class View:
    """One row as it is trained."""

    example: Example
    notes: tuple[str, ...] = ()
    """What is to be told of it; the same words for every row of the same kind."""


def load_dataset(source: RowSource, prompts: Prompts, prompt_format: str, max_length: int) -> Dataset:
    """Read and tokenise a JSONL file, or rows in memory; `prompt_format` is `chat` or `raw`, `max_length` in tokens a row.

    Raises ReftEdgeError that names the file and line, or the row, for anything that is not such a row.
    """
    examples, left_out, notes = [], 0, Counter[str]()
    views, digest = load_rows(source, lambda row: view_row(row, prompts, prompt_format))
    for view in views:
        if len(view.example.prompt) + len(view.example.completion) > max_length:
            left_out += 1
        else:
            examples.append(view.example)
            notes.update(view.notes)
    if not examples:
        raise ReftEdgeError(
            f"{source} has no row to train on"
            + (
                f": all {left_out} are longer than {max_length} tokens; raise --max-length"
                if left_out
                else ""
            )
        )
    return Dataset(examples, left_out, digest, notices(notes, prompts, prompt_format))


def notices(notes: Counter[str], prompts: Prompts, prompt_format: str) -> tuple[str, ...]:
    """What is to be told of a file's rows, from the notes of them all."""
    told = [f"{note}: {count:,}" for note, count in notes.items()]
    if prompt_format == "raw" and prompts.template is None:
        told.append("the model has no chat template: prompts are trained as they stand, as with --raw")
    if prompt_format == "chat" and prompts.end_ids and prompts.turn_end not in (None, *prompts.end_ids):
        told.append(
            f"the chat template ends answers with {_text(prompts, prompts.turn_end)}, at which the model's own "
            "configuration does not stop; `reft-edge export` adds it, other programs must be told"
        )
    return tuple(told)


def encode_row(row: Any, prompts: Prompts, prompt_format: str) -> Example:
    """One parsed row as tokens. Raises ReftEdgeError if it is not of a known form."""
    return view_row(row, prompts, prompt_format).example


def view_row(row: Any, prompts: Prompts, prompt_format: str) -> View:
    """One parsed row as it is trained. Raises ReftEdgeError if it is not of a known form, or its answer cannot be told from
    its prompt.
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
        return _view_chat(_messages(row["messages"]), tools, prompts)
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
        return _view_chat(messages, tools, prompts)
    completion, notes = _with_eos(completion, prompts)
    if not completion.removesuffix(prompts.eos).strip():
        raise ReftEdgeError("the completion is empty but for the token that ends it")
    return _view(prompts.encode_raw(prompt), prompts.encode_after(prompt, completion), prompts, notes)


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
    plain = [_message(message) for message in messages]
    last = plain[-1]
    if last["role"] != "assistant":
        raise ReftEdgeError(f"the last message must be the assistant's, not {last['role']!r}")
    if not (last.get("content") or "").strip() and not last.get("tool_calls"):
        raise ReftEdgeError("the answer is empty: the last message has neither text nor tool calls")
    for name in _WEIGHTS:
        if last.get(name) not in (None, 1):
            raise ReftEdgeError(
                f"the last message has the {name} {last[name]!r}, but it is what is trained, wholly; "
                f"leave the row out, or end it with an answer of {name} {'1' if name == 'weight' else 'true'}"
            )
    return plain


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


def _view_chat(messages: Sequence[Message], tools: Tools, prompts: Prompts) -> View:
    before = prompts.render(messages[:-1], tools=tools)
    whole = prompts.render(messages, add_generation_prompt=False, tools=tools)
    notes = [
        "earlier answers that are context only, since a row's last answer is what is trained"
        for message in messages[:-1]
        if message["role"] == "assistant"
    ]
    if whole.startswith(before):
        answer = whole[len(before) :]
    else:
        answer, more = _answer_behind_opener(before, whole, messages, tools, prompts)
        notes += more
    if not answer.strip():
        raise ReftEdgeError("the chat template writes nothing of the answer")
    notes += _not_written(messages, tools, before, answer, prompts)
    answer, more = _ended(answer, prompts)
    prompt, completion = prompts.encode_both(before, answer)
    return _view(prompt, completion, prompts, [*notes, *more])


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


def _ended(answer: str, prompts: Prompts) -> tuple[str, list[str]]:
    """The answer up to the first token that ends its turn; the model's own is added where the template writes none."""
    tail = prompts.turn_tail or ""
    body, end = (answer[: -len(tail)], tail) if tail and answer.endswith(tail) else (answer.rstrip(), "")
    if prompts.turn_end is not None and end:
        token = _text(prompts, prompts.turn_end)
        return body + end[: end.index(token) + len(token)], []
    if body != answer and any(body.endswith(_text(prompts, token)) for token in prompts.stop_ids):
        return body, []
    ended, notes = _with_eos(answer if not end else body + end.rstrip(), prompts)
    added = f"answers to which the end {prompts.eos} was added, since the chat template writes none"
    return ended, notes or [added]


def _with_eos(answer: str, prompts: Prompts) -> tuple[str, list[str]]:
    if not prompts.eos:
        return answer, ["answers without an end, since the model names no token that ends one"]
    return answer.removesuffix(prompts.eos) + prompts.eos, []


def _text(prompts: Prompts, token: int | None) -> str:
    return "" if token is None else prompts.tokenizer.id_to_token(token) or ""


def _view(prompt: list[int], completion: list[int], prompts: Prompts, notes: Iterable[str]) -> View:
    if not prompt:
        raise ReftEdgeError("the prompt is empty; an intervention needs at least one token")
    notes = list(notes)
    if not set(prompts.stop_ids).isdisjoint(completion[:-1]):
        notes.append("answers that hold a token at which the model stops, so that it will end them there")
    return View(Example(tuple(prompt), tuple(completion)), tuple(notes))


def check_positions(rows: Sequence[Example], positions: str, tied: bool) -> tuple[str, ...]:
    """Notices on rows, and on positions, at which nothing is edited. Raises ReftEdgeError if no row has any to learn from."""
    spans = parse_positions(positions, tied)
    # The last token of a completion is predicted, but never read.
    lengths = Counter((len(row.prompt), len(row.prompt) + len(row.completion) - 1) for row in rows)
    open_at = {
        (n, end): [any(bool(active(span, t, n)) for t in _edges(n, end)) for span in spans]
        for n, end in lengths
    }
    idle = sum(count for key, count in lengths.items() if not any(open_at[key]))
    if idle == len(rows):
        raise ReftEdgeError(
            f"nothing can be learnt: in none of the {len(rows):,} rows do the positions {positions} edit a token; fN and lN "
            "reach over half of a prompt at most, and gen over tokens behind the answer's first: choose all, or longer prompts"
        )
    told = [
        f"rows in which the positions {positions} edit no token, so nothing is learnt from them: {idle:,}"
    ]
    never = [
        name
        for name, column in zip(
            group_names(positions, tied), zip(*open_at.values(), strict=True), strict=True
        )
        if not any(column)
    ]
    if never:
        told.append(f"positions that edit no token in any row, so they learn nothing: {', '.join(never)}")
    return tuple(told if idle else told[1:])


def _edges(n: int, end: int) -> Iterable[int]:
    """Tokens among which every gate that is open somewhere is open: the first and last of the prompt, the next."""
    return [t for t in {0, n - 1, n} if t < end]
