"""Calls of tools behind a marker, in the ways in which models of several families write them, a character at a time."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from reft_edge.runtime.answer_parts import Arguments, CallBegins, Part, Schemas

SPACE = " \t\r\n"
_BETWEEN = frozenset(SPACE + "[],;")
"""Characters between the calls of one block."""
_LONGEST_NAME = 256
_OPENS, _CLOSES = "<function=", "</function>"
_ARGUMENTS = ("arguments", "parameters")
_DEEPEST = 64


class Block(Protocol):
    """What stands behind a marker, a character at a time."""

    over: bool
    """Whether the block's end came with the last character."""

    def feed(self, character: str) -> list[Part] | None:
        """What the character brings; None if it does not belong to calls."""

    @property
    def pending(self) -> bool:
        """Whether something was read that is no part of a call so far."""


def block_of(way: str, closer: str, tools: Schemas) -> Block:
    """What reads calls written in a way (`json`, `named`, `function`, `gemma`) that end with `closer`."""
    if way in ("json", "named"):
        return _Objects(tools, way == "named")
    return _Until(closer, tools, _function if way == "function" else _gemma)


class _Objects:
    """JSON objects, one behind another or in a list; with `named`, the tool's name stands before its arguments."""

    def __init__(self, tools: Schemas, named: bool) -> None:
        self._tools, self._named = tools, named
        self._before = ""
        self._object: _Object | None = None
        self._function: _Until | None = None
        self._calls = 0
        self.over = False

    @property
    def pending(self) -> bool:
        if self._function is not None:
            return self._function.pending
        if self._object is not None:
            return not self._object.begun
        return bool(self._before.strip(SPACE + "[],;")) or not self._calls

    def feed(self, character: str) -> list[Part] | None:
        if self._function is not None:
            return self._function.feed(character)
        if self._object is None:
            if character != "{":
                return self._feed_between(character)
            name = _plain_name(self._before) if self._named else ""
            if name is None or (name and name not in self._tools):
                return None
            self._object, self._before = _Object(self._tools, name), ""
        found = self._object.feed(character)
        if found is None or not self._object.over:
            return found
        if not self._object.begun:
            found = self._object.whole()
        self._object = None
        if found is not None:
            self._calls += 1
        return found

    def _feed_between(self, character: str) -> list[Part] | None:
        before = self._before + character
        if not self._named and character not in _BETWEEN:
            if self._calls or not _OPENS.startswith(before.strip(SPACE)):
                return None
        elif len(before) > _LONGEST_NAME:
            return None
        self._before = before
        if before.strip(SPACE) == _OPENS:
            self._function = _Until(_CLOSES, self._tools, _function)
        return []


def _plain_name(before: str) -> str | None:
    """The name in what stands before a tool's arguments; "" for none, None for other text."""
    if not before.strip(SPACE + "[],;"):
        return ""
    text = before.strip(SPACE + ",;")
    found = re.fullmatch(r"(?:\[TOOL_CALLS\])?\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?", text)
    return found[1] if found else None


class _Object:
    """One JSON object. Its arguments are given as they come, where the name of a known tool stands before them."""

    def __init__(self, tools: Schemas, name: str = "") -> None:
        """`name`: of the tool whose arguments the whole object is; "" for an object that holds name and arguments."""
        self._tools, self._name, self._bare = tools, name, bool(name)
        self._text: list[str] = []
        self._outside = 0 if name else 1
        """Depth of what holds the arguments."""
        self._depth = 0
        self._string = self._escaped = self._streams = False
        self._string_at = self._value_at = 0
        self._key: str | None = None
        self._last_string = ""
        self.begun = False
        """Whether its call was told."""
        self.over = False

    def feed(self, character: str) -> list[Part] | None:
        """What the character brings; None where the object is nested too deep."""
        at, streamed = len(self._text), self._streams
        self._text.append(character)
        begins = self._follow(character, at)
        if self._depth > _DEEPEST:
            return None
        if begins:
            self._streams = self.begun = True
            return [CallBegins(self._name), Arguments(character)]
        if streamed:
            self._streams = self._depth > self._outside
            return [Arguments(character)]
        return []

    def _follow(self, character: str, at: int) -> bool:
        """Go on by a character; whether a known tool's arguments begin with it."""
        if self._string:
            self._follow_string(character, at)
        elif character == '"':
            self._string, self._string_at = True, at
        elif character in "{[":
            self._depth += 1
            return (
                character == "{" and not self.begun and self._depth == self._outside + 1 and self._awaited(at)
            )
        elif character in "}]":
            self._depth -= 1
            self.over = self._depth == 0
            if self.over:
                self._end_value(at)
        elif character == ":" and self._depth == 1 and self._key is None:
            key = _loaded(self._last_string)
            self._key, self._value_at = key if isinstance(key, str) else "", at + 1
        elif character == "," and self._depth == 1:
            self._end_value(at)
        return False

    def _follow_string(self, character: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._string = False
            if self._depth == 1 and self._key is None:
                self._last_string = "".join(self._text[self._string_at : at + 1])

    def _awaited(self, at: int) -> bool:
        """Whether the object that begins here is a known tool's arguments."""
        if self._bare:
            return True
        before = "".join(self._text[self._value_at : at])
        return self._key in _ARGUMENTS and self._name in self._tools and not before.strip()

    def _end_value(self, at: int) -> None:
        if self._key == "name" and not self._bare:
            name = _loaded("".join(self._text[self._value_at : at]))
            self._name = name if isinstance(name, str) else ""
        self._key = None

    def whole(self) -> list[Part] | None:
        """The calls in an object that is complete; None if there are none."""
        found = list(_calls_in(_loaded("".join(self._text))))
        if not found or not all(name in self._tools for name, _ in found):
            return None
        return [part for name, given in found for part in (CallBegins(name), Arguments(given))]


def _calls_in(value: Any) -> Iterator[tuple[str, str]]:
    """Names and arguments, as JSON text, of what an object may call under the names that models use."""
    if not isinstance(value, dict):
        return
    for key in ("tool_calls", "tool_call", "function_call"):
        if key in value:
            inner = value[key] if isinstance(value[key], list) else [value[key]]
            for part in inner:
                yield from _calls_in(part)
            return
    if isinstance(value.get("function"), dict):
        yield from _calls_in(value["function"])
        return
    name = value.get("name", value.get("function", value.get("tool")))
    given = next((value[key] for key in _ARGUMENTS if key in value), None)
    if isinstance(given, str):
        given = _loaded(given)
    if isinstance(name, str) and (isinstance(given, dict) or (given is None and len(value) == 1)):
        yield name, json.dumps(given or {}, ensure_ascii=False)


def _loaded(text: str) -> Any:
    """JSON text as a value; None for what is no JSON."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


class _Until:
    """A call whose text is read when it is whole."""

    def __init__(
        self, closer: str, tools: Schemas, read: "Callable[[str, Schemas], tuple[str, dict[str, Any]] | None]"
    ) -> None:
        self._closer, self._tools, self._read = closer, tools, read
        self._text = ""
        self.over = False
        self.pending = True

    def feed(self, character: str) -> list[Part] | None:
        self._text += character
        if not self._text.endswith(self._closer):
            return []
        found = self._read(self._text.removesuffix(self._closer), self._tools)
        if found is None or found[0] not in self._tools:
            return None
        self.over, self.pending = True, False
        return [CallBegins(found[0]), Arguments(json.dumps(found[1], ensure_ascii=False))]


def _function(text: str, tools: Schemas) -> tuple[str, dict[str, Any]] | None:
    """`NAME>{"key": value}`, or `NAME>` with `<parameter=KEY>value</parameter>` behind it."""
    name, found, rest = text.partition(">")
    if not found:
        return None
    name = name.strip().strip('"')
    if rest.strip().startswith("{"):
        given = _loaded(rest)
        return (name, given) if isinstance(given, dict) else None
    schema = tools.get(name, {}).get("properties")
    properties = schema if isinstance(schema, dict) else {}
    pairs = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", rest, re.DOTALL)
    return name, {key: _typed(value, properties.get(key)) for key, value in pairs}


def _typed(text: str, schema: Any) -> Any:
    """A value as its schema has it: text where that may be one, else what JSON makes of it."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    value = _loaded(text.strip())
    return text if value is None and text.strip() != "null" else value


_ESCAPE = "<escape>"


def _gemma(text: str, _tools: Schemas) -> tuple[str, dict[str, Any]] | None:
    """FunctionGemma's `call:NAME{key:<escape>text<escape>,key:1}`: JSON but for the quotes."""
    found = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", text, re.DOTALL)
    if found is None:
        return None
    pieces = found[2].split(_ESCAPE)
    pieces[::2] = [re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', piece) for piece in pieces[::2]]
    pieces[1::2] = [json.dumps(piece) for piece in pieces[1::2]]
    given = _loaded("".join(pieces))
    return (found[1], given) if isinstance(given, dict) else None
