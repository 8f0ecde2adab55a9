"""How models of several families write calls of tools: what an answer with calls looks like, what a grammar asks for, and
what a model is told whose template knows no tools."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from reft_edge.runtime.answer_parts import Schemas
from reft_edge.runtime.constraints import JSON_STYLE, Constraint

_OPEN = {"patternProperties", "allOf", "anyOf", "oneOf", "$ref", "unevaluatedProperties", "propertyNames"}
"""Keywords that may name further properties."""
MOST_CALLS = 16
"""That a grammar lets an answer have."""
_HERMES = {"<tool_call>": ("json", "</tool_call>")}
_FENCES = {f"```{name}": ("json", "```") for name in ("json", "tool_call", "tool_code")}
_FUNCTION = {"<function=": ("function", "</function>")}


@dataclass(frozen=True)
class CallForm:
    """One family's way."""

    name: str
    markers: Mapping[str, tuple[str, str]]
    """What calls begin with, as `CallReader` takes them. JSON at an answer's beginning needs none."""
    call: tuple[str, str, str]
    """What stands before a call's name, before its arguments and behind them."""
    before: str = ""
    between: str = "\n"
    after: str = ""
    several: bool = True
    """Whether an answer can have more than one call."""

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """An answer with these calls: names, and arguments as JSON text."""
        first, second, last = self.call
        return (
            self.before
            + self.between.join(f"{first}{name}{second}{given}{last}" for name, given in calls)
            + self.after
        )


_OBJECT = ('{"name": "', '", "arguments": ', "}")
GENERIC = CallForm("generic", {**_HERMES, **_FENCES}, _OBJECT)
HERMES = CallForm(
    "hermes",
    {**_HERMES, **_FUNCTION},
    ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
)
SMOLLM = CallForm("smollm", {**_HERMES, **_FENCES}, _OBJECT, "<tool_call>[", ", ", "]</tool_call>")
LLAMA3 = CallForm(
    "llama3",
    {"<|python_tag|>": ("json", ""), **_FUNCTION},
    ('{"name": "', '", "parameters": ', "}"),
    several=False,
)
MISTRAL = CallForm("mistral", {"[TOOL_CALLS]": ("named", "")}, _OBJECT, "[TOOL_CALLS][", ", ", "]")
MISTRAL_NAMED = CallForm(
    "mistral-named", {"[TOOL_CALLS]": ("named", "")}, ("[TOOL_CALLS]", "[ARGS]", ""), between=""
)
GRANITE = CallForm(
    "granite", {"<|tool_call|>": ("json", ""), **_HERMES}, _OBJECT, "<|tool_call|>[", ", ", "]"
)
GEMMA = CallForm(
    "gemma", {"<start_function_call>": ("gemma", "<end_function_call>"), **_HERMES, **_FENCES}, _OBJECT
)
_BY_TEXT = (
    ("[ARGS]", MISTRAL_NAMED),
    ("[TOOL_CALLS]", MISTRAL),
    ("<start_function_call>", GEMMA),
    ("<|tool_call|>", GRANITE),
    ("<tool_call>[", SMOLLM),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA3),
    ("<|start_header_id|>", LLAMA3),
    ("SmolLM", SMOLLM),
    ("<start_of_turn>", GEMMA),
)
"""Texts of templates that tell a family, the first that is found."""


def form_of(template: str) -> CallForm:
    """The form of the models that have a chat template like this one."""
    return next((form for text, form in _BY_TEXT if text in template), GENERIC)


def special_marks(form: CallForm, tokenizer: Tokenizer, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Special tokens that calls are written with: answers need their text."""
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    closers = [closer for _, closer in form.markers.values()]
    parts = (*form.markers, *closers, "[ARGS]", "[CALL_ID]", "<escape>", *others)
    return tuple(text for text in dict.fromkeys(parts) if text in special)


def calls_constraint(
    form: CallForm,
    schemas: Schemas,
    tokenizer: Tokenizer,
    several: bool,
    thoughts_end: str = "",
    answer: Mapping[str, Any] | None = None,
) -> Constraint:
    """An answer that is one or more calls of these tools, each with arguments that are valid under the tool's schema.

    `thoughts_end`: what ends the thoughts with which the answer begins. `answer`: a schema of JSON that may come in place of
    calls. Raises ReftEdgeError for schemas that are too long together.
    """
    special = {
        added.content: token
        for token, added in tokenizer.get_added_tokens_decoder().items()
        if added.special and added.content
    }

    def literal(text: str) -> str:
        return " ".join(_literals(text, special))

    first, second, last = form.call
    calls = [
        f"call_{number}: {literal(first + name + second)} arguments_{number} {literal(last)}"
        for number, name in enumerate(schemas)
    ]
    arguments = [
        f"arguments_{number}: %json {_embedded(schema)}" for number, schema in enumerate(schemas.values())
    ]
    more = f" ({literal(form.between)} call){{0,{MOST_CALLS - 1}}}" if several and form.several else ""
    lines = [
        f"start: {'thoughts ' if thoughts_end else ''}"
        + ("(calls | answer)" if answer is not None else "calls"),
        f"calls: {literal(form.before)} call{more} {literal(form.after)}",
        f"call: {' | '.join(f'call_{number}' for number in range(len(schemas)))}",
        *calls,
        *arguments,
    ]
    if thoughts_end:
        lines.append(f"thoughts: {_until(thoughts_end, special)}")
    if answer is not None:
        lines.append(f"answer: %json {_embedded(answer)}")
    return Constraint("tool_calls", "\n".join(lines))


def _literals(text: str, special: Mapping[str, int]) -> list[str]:
    """A text as a grammar has it: special tokens by their numbers, all else as texts."""
    found: list[str] = []
    while text:
        places = {at: mark for mark in special if (at := text.find(mark)) >= 0}
        at = min(places, default=len(text))
        if at:
            found.append(json.dumps(text[:at]))
        if at < len(text):
            found.append(f"<[{special[places[at]]}]>")
            at += len(places[at])
        text = text[at:]
    return found


def _until(end: str, special: Mapping[str, int]) -> str:
    """A rule for any text up to `end`, and the space behind it."""
    if end in special:
        return f"/(?s:.*)/ <[{special[end]}]> /[ \\n]{{0,4}}/"
    return f"text_before_end\ntext_before_end[suffix={json.dumps(end)}]: /(?s:.*)/"


def _embedded(schema: Mapping[str, Any]) -> str:
    """As it stands in a grammar, written in the same style."""
    own = schema.get("x-guidance")
    guidance = {**JSON_STYLE, **(own if isinstance(own, dict) else {})}
    return json.dumps({**schema, "x-guidance": guidance})


def arguments_schema(parameters: Mapping[str, Any] | None, strict: bool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object, and hold no names that the tool does not list unless it says
    so. What llguidance does not know of it is passed over, unless the tool is `strict`."""
    schema: dict[str, Any] = {"type": "object", **(parameters or {})}
    if not schema.keys() & _OPEN:
        schema = {"properties": {}, "additionalProperties": False, **schema}
    return schema if strict else {**schema, "x-guidance": {"lenient": True}}


def instruction(form: CallForm, tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told of its tools where its template does not know them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = form.write([("NAME", '{"PARAMETER": "VALUE"}')])
    return (
        "You can call tools. These are the tools, with the JSON schemas of their parameters:\n"
        f"{listed}\n"
        "To call a tool, answer with nothing but this, with the tool's name and its arguments:\n"
        f"{example}\n"
        "You get the result as the next message. If no tool helps, answer in plain text."
    )
