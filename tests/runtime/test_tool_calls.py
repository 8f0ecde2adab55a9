"""Tools without a server: calls found in answers of every family, thoughts, grammars that guarantee calls, and prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import load_prompts
from reft_edge.runtime import tool_forms
from reft_edge.runtime.answer_parts import Arguments, CallBegins, Text, Thought, joined
from reft_edge.runtime.constraints import Constraints
from reft_edge.runtime.text import TextStream
from reft_edge.runtime.thoughts import MARKS, ThoughtReader
from reft_edge.runtime.tool_calls import CallReader
from reft_edge.runtime.tool_forms import CallForm, arguments_schema, calls_constraint, form_of
from reft_edge.runtime.tool_use import ToolChoice, ToolUse

FORMS = {name: form for name, form in vars(tool_forms).items() if isinstance(form, CallForm)}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/few"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"few": {"type": "integer", "minimum": 0, "maximum": 9}},
}
SCHEMAS = {"weather": WEATHER, "now": {}}
TOOLS = (
    {"type": "function", "function": {"name": "weather", "description": "Tell it", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
)
HISTORY = [
    {"role": "user", "content": "Is it warm?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"},
    {"role": "user", "content": "And now?"},
]
QWEN = (
    "{% if tools %}<|start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<tool_call><|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "<tool_call>{{ call.id }} {{ call.function.name }} {{ call.function.arguments.city }}</tool_call>{% endfor %}"
    "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)


def read(form, text, several=True, step=1):
    reader = CallReader(form.markers, SCHEMAS, several)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    return joined(iter([part for piece in pieces for part in reader.push(piece)] + reader.finish()))


def call(name, arguments):
    return [CallBegins(name), Arguments(arguments)]


@pytest.mark.parametrize("name", FORMS)
def test_what_a_family_writes_is_read(name):
    form = FORMS[name]
    given = [("weather", '{"city": "R}\\"{o", "days": [1, {"a": "]"}]}'), ("now", "{}")]
    for calls in (given[:1], given[1:], given if form.several else given[:1]):
        expected = [part for each in calls for part in call(*each)]
        for step in (1, 2, 5, 1000):
            assert read(form, form.write(calls), step=step) == expected
        if form.several:
            assert read(form, form.write(calls), several=False) == expected[:2]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("HERMES", "Sure.\n<tool_call>\n{}\n</tool_call>", "Sure.\n<tool_call>\n{}\n</tool_call>"),
        ("HERMES", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None),
        ("HERMES", '{"colour": "red"} is a colour', None),
        ("HERMES", "[1] says so", None),
        ("HERMES", "  a < b <tool", None),
        ("HERMES", "ends with space \n", None),
        ("GENERIC", '```json\n{"colour": "red"}\n```\nand so on', None),
        ("MISTRAL", "[TOOL_CALLS] are what?", None),
        ("GEMMA", "<start_function_call>nothing<end_function_call> more", None),
    ],
)
def test_what_is_no_call_stays_text(form, text, expected):
    for step in (1, 3, 100):
        assert read(FORMS[form], text, step=step) == [Text(expected or text)]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (
            "HERMES",
            '\n\n<tool_call>\n{"arguments": {"days": 1}, "name": "weather"}\n</tool_call>\n',
            call("weather", '{"days": 1}'),
        ),
        ("HERMES", '{"name": "now", "arguments": {}}', call("now", "{}")),
        ("HERMES", '<tool_call>{"name": "now"}</tool_call>', call("now", "{}")),
        ("HERMES", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}', call("now", '{"a": 1}')),
        (
            "HERMES",
            "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n<parameter=city>\nRome\n</parameter>\n"
            "</function>\n</tool_call>",
            call("weather", '{"days": 3, "city": "Rome"}'),
        ),
        ("LLAMA3", '<|python_tag|>{"name": "now", "parameters": {}}', call("now", "{}")),
        ("LLAMA3", '<function=now>{"a": 1}</function>', call("now", '{"a": 1}')),
        (
            "GENERIC",
            'Here:\n```json\n{"tool_calls": [{"function": {"name": "now", "arguments": {}}}]}\n```\nDone.',
            [Text("Here:"), *call("now", "{}"), Text("\nDone.")],
        ),
        (
            "MISTRAL_NAMED",
            '[TOOL_CALLS]now[CALL_ID]abc123xyz[ARGS]{"a": {}}[TOOL_CALLS]weather{"days": 2}',
            [*call("now", '{"a": {}}'), *call("weather", '{"days": 2}')],
        ),
        (
            "GEMMA",
            "<start_function_call>call:weather{city:<escape>Ro, x:1<escape>,days:[2,{a:true}]}<end_function_call>",
            call("weather", '{"city": "Ro, x:1", "days": [2, {"a": true}]}'),
        ),
        ("HERMES", '<tool_call>{"name": "weather", "arguments": {"ci', call("weather", '{"ci')),
    ],
)
def test_other_ways_to_write_calls(form, text, expected):
    for step in (1, 4, 1000):
        assert read(FORMS[form], text, step=step) == expected


def test_arguments_come_as_they_are_written():
    reader = CallReader(FORMS["HERMES"].markers, SCHEMAS)
    assert reader.push('<tool_call>{"name": "weather", "argum') == []
    assert reader.push('ents": {"city": ') == call("weather", '{"city": ')
    assert reader.push('"Rome"') == [Arguments('"Rome"')]
    assert reader.push("}}</tool_call>") == [Arguments("}")]
    assert reader.finish() == []


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("begun", [True, False])
def test_thoughts_are_divided_from_the_answer(marks, begun):
    first, last = marks
    text = ("" if begun else f"\n{first}") + f"\nLet me see <b> </t.\n{last}\n\nIt is 4."
    for step in (1, 2, 7, 1000):
        reader = ThoughtReader(marks, begun)
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        parts = [part for piece in pieces for part in reader.push(piece)] + list(reader.finish())
        assert joined(iter(parts)) == [Thought("Let me see <b> </t."), Text("It is 4.")]
    plain = ThoughtReader(marks, False)
    parts = [*plain.push(first[:4]), *plain.push("g> 4"), *plain.finish()]
    assert parts == [Text(f"{first[:4]}g> 4")]
    cut = ThoughtReader(marks, True)
    assert joined(iter([*cut.push("Let me"), *cut.push(" see "), *cut.finish()])) == [Thought("Let me see")]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ tools }} <tool_call>\n{", "HERMES"),
        ("<|start_header_id|>", "LLAMA3"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "MISTRAL"),
        ("[TOOL_CALLS]x[ARGS]", "MISTRAL_NAMED"),
        ("You are a helpful AI assistant named SmolLM", "SMOLLM"),
        ("<start_of_turn>", "GEMMA"),
        ("<|tool_call|>", "GRANITE"),
        ("{{ messages }}", "GENERIC"),
    ],
)
def test_the_template_tells_the_family(template, form):
    assert form_of(template) is FORMS[form]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("end", ["", "</think>"])
def test_a_grammar_guarantees_calls(device_folder, name, special, end):
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    form, tokenizer = FORMS[name], Tokenizer.from_file(str(device_folder / "export/tokenizer.json"))
    if special:
        tokenizer.add_special_tokens([*form.markers, "[ARGS]", end or "<unused>"])
    schemas = {"weather": arguments_schema(WEATHER, True), "now": arguments_schema(None, False)}
    constraint = calls_constraint(form, schemas, tokenizer, True, end)
    constraints, rng = Constraints(tokenizer, [1]), np.random.default_rng(3)
    for _ in range(3):
        progress, tokens = constraints.begin(constraint), []
        stream, text = TextStream(tokenizer, (), (*form.markers, "[ARGS]", end)), ""
        for token in tokenizer.encode(f"Hm.{end}").ids if end else ():
            text += stream.push(token)
            assert token in progress.allowed(10**6)
            progress.take(token)
        while True:
            allowed = progress.allowed(10**6)
            token = 1 if 1 in allowed else int(rng.choice(allowed))
            if token == 1:
                break
            tokens.append(token)
            text += stream.push(token)
            if progress.take(token)[1]:
                break
        parts = read(form, (text + stream.flush()).removeprefix(f"Hm.{end}"))
        names = [part.name for part in parts if isinstance(part, CallBegins)]
        given = [json.loads(part.text) for part in parts if isinstance(part, Arguments)]
        assert len(parts) == 2 * len(names) > 0
        for called, arguments in zip(names, given, strict=True):
            jsonschema.validate(arguments, schemas[called])


def test_a_template_that_knows_tools_gets_them(device_folder):
    prompts = replace(load_prompts(device_folder / "export"), template=QWEN)
    use = ToolUse(prompts)
    assert (use.form, use.marks, use.knows_tools) == (FORMS["HERMES"], MARKS[0], True)
    text = use.render(HISTORY, TOOLS)
    assert '"name": "weather"' in text
    assert "<tool_call>call_1 weather Rome</tool_call>" in text
    assert "<|start|>tool\n22 degrees" in text
    assert use.thinks(text)
    reader = use.reader(ToolChoice(TOOLS), thinks=True)
    assert reader is not None
    parts = reader.push('Hm</think>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', last=True)
    assert parts == [Thought("Hm"), *call("now", "{}")]
    assert reader.called
    mistral = ToolUse(replace(prompts, template=QWEN + "{# [TOOL_CALLS] #}"))
    assert "call_1" not in mistral.render(HISTORY, TOOLS)


def test_other_templates_get_an_instruction(device_folder):
    prompts = load_prompts(device_folder / "export")
    use = ToolUse(prompts)
    assert not use.knows_tools
    text = use.render(HISTORY, TOOLS)
    assert text.startswith("<|start|>system\nYou can call tools.")
    assert '{"name": "weather", "arguments": {"city": "Rome"}}<|end|>' in text
    assert "<|start|>user\nResult of weather:\n22 degrees\n\nAnd now?<|end|>" in text
    own = use.render([{"role": "system", "content": "Be kind."}, *HISTORY], TOOLS)
    assert own.startswith("<|start|>system\nBe kind.\n\nYou can call tools.")
    assert use.render(HISTORY[:1], ()) == prompts.render(HISTORY[:1])
    strict = replace(
        prompts,
        template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(prompts.template),
    )
    text = ToolUse(strict).render(HISTORY, TOOLS)
    assert text.startswith("<|start|>user\nYou can call tools.")
    assert "Is it warm?<|end|>" in text
    with pytest.raises(ReftEdgeError, match="no system"):
        ToolUse(strict).render(
            [{"role": "system", "content": "Be kind."}, {"role": "system", "content": "x"}], ()
        )


def test_special_tokens_that_are_shown(device_folder):
    tokenizer = Tokenizer.from_file(str(device_folder / "export/tokenizer.json"))
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    ids = tokenizer.encode("a[TOOL_CALLS]b").ids
    for shown, expected in (((), "ab"), (("[TOOL_CALLS]",), "a[TOOL_CALLS]b")):
        stream = TextStream(tokenizer, (), shown)
        assert "".join(map(stream.push, ids)) + stream.flush() == expected
