"""Chat templates: the same text as transformers renders, compiled once, and an end to what a stranger's begins."""

import copy
import importlib.util
import json
import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from reft_edge.errors import ReftEdgeError
from reft_edge.model import template_allowance, templates
from reft_edge.model.prompts import Prompts, load_prompts
from reft_edge.training.turns import view_row
from tests.helpers.tiny import TEMPLATE, make_tokenizer

ARGUMENTS = {"city": "Paris é", "days": [1, 2.5, {"a": None}], "<b>": "&'\""}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
TEXT_CALL = {**CALL, "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "é <b>", "enum": ["a", "b"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "&'\"", "parameters": PARAMETERS},
}
RESULT = {"role": "tool", "content": '{"t": 20}', "name": "get_weather", "tool_call_id": "abcdef123"}


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one message": [user("Hi")],
    "system": [SYSTEM, user("Hi")],
    "turns": [SYSTEM, user("Hi"), answer("Hello"), user("More?"), answer("No.")],
    "two of the user's": [user("Hi"), user("again")],
    "empty": [user(""), answer("")],
    "spaces": [user("  pad \n"), answer("\nx\n")],
    "reasoning": [user("Hi"), answer("Hello", reasoning_content="I think")],
    "reasoning in the text": [
        user("Hi"),
        answer("<think>\nabc\n</think>\n\nHello"),
        user("again"),
        answer("<think>x</think>y"),
    ],
    "a call": [user("Weather?"), answer("", tool_calls=[CALL])],
    "a call with text": [user("Weather?"), answer("One moment.", tool_calls=[CALL, CALL]), RESULT, RESULT],
    "a call, its arguments as text": [user("Weather?"), answer("", tool_calls=[TEXT_CALL])],
    "a result": [user("Weather?"), answer("", tool_calls=[CALL]), RESULT, answer("It is 20.")],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]}
    ],
    "developer": [{"role": "developer", "content": "d"}, user("x")],
    "name": [{"role": "user", "content": "x", "name": "bob"}],
    "the assistant's alone": [answer("x")],
    "no content": [{"role": "user"}],
}
TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
NEWEST = hasattr(chat_template_utils, "_alias_reasoning_fields")
FILES = sorted(TRL.glob("*.jinja"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def base(folder):
    return load_prompts(folder)


def with_template(base, source, **fields):
    return Prompts(base.tokenizer, source, base.special_tokens, **fields)


def both(reference, prompts, source, messages, tools, add_generation_prompt):
    """What transformers renders and what we do, None for a refusal; the names of reasoning are those of its newest release."""
    given = messages if NEWEST else [templates._as_transformers_passes(message) for message in messages]
    found = []
    for refusals, render in (
        (
            (TypeError, ValueError, LookupError, ArithmeticError, TemplateError),
            lambda: reference.apply_chat_template(
                copy.deepcopy(given),
                tools=tools,
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            ),
        ),
        (ReftEdgeError, lambda: prompts.render(copy.deepcopy(messages), add_generation_prompt, tools)),
    ):
        try:
            found.append(render())
        except refusals:
            found.append(None)
    return found


def test_the_templates_are_there():
    assert len(FILES) >= 32
    assert {"qwen3.jinja", "gptoss.jinja", "llama3_training.jinja"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_template_renders_what_transformers_renders(path, reference, base):
    source = path.read_text(encoding="utf-8")
    prompts = with_template(base, source)
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        for tools in (None, [TOOL]):
            for add in (False, True):
                theirs, ours = both(reference, prompts, source, messages, tools, add)
                assert ours == theirs, (name, tools is not None, add)
                rendered += ours is not None
    assert rendered >= 8


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
        "{%- generation -%} a {%- endgeneration -%} b",
        "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}",
        "{{ {'b': 1, 'a': 'é<'} | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true) }}{{ [1, {'a': 2}] | tojson(indent=2) }}",
        "{{ [1, 2] | tojson(indent='\t', separators=('; ', ': ')) }}{{ none | tojson }}",
        "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% for m in messages if m.role == 'user' %}{% set ns.a = ns.a + loop.length %}{% endfor %}{{ ns.a }}",
        *(["{{ namespace(_a=1) }}"] if NEWEST else []),
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y') }}{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab', 1) }}",
        "{{ 'a' ~ 1 ~ none ~ ['x'] }}{{ '%5.1f|%s' % (2.25, 'x') }}{{ '{:>5}|{}'.format('a', 10 ** 9) }}",
        "{{ 'a-b'.replace('-', '+').center(9, '*') }}{{ 'x' | indent(2, true) }}{{ 'a\tb'.expandtabs(4) }}{{ '7'.zfill(3) }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ [3, 1] | sort | first }}{{ [[1], [2]] | map('first') | sum }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [1, 2, 3] | batch(2, 'x') | list }}",
        "{% macro f(a, b=[1, 2]) %}<{{ a }}{{ b | length }}{{ caller() if caller else '' }}>{% endmacro %}{{ f(1) }}{% call f(2) %}c{% endcall %}",
        "{% for key, value in {'x': (1, 2)}.items() %}{{ key }}{{ value }}{{ loop.index }}{{ loop.last }}{% endfor %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ tools is none }}{{ documents is none }}",
        "{{ messages[0]['nothing'] }}{{ nothing }}{{ nothing is defined }}",
        "{{ nothing.more }}",
        # As SmolLM3's: what nobody passed is asked for and looked into, and marks stand in one branch of a loop.
        "{%- if mode is not defined -%}{%- set mode = '/a' -%}{%- endif -%}{%- if '/b' in nobody -%}b{%- else -%}"
        "{{- 'Today: ' ~ strftime_now('%d %B %Y') ~ mode + '\n' -}}{%- if extra is defined or nobody -%}x{%- endif -%}"
        "{%- endif -%}{%- for m in messages -%}{%- set c = m.content if m.content is string else '' -%}"
        "{%- if m.role == 'user' -%}{{ '<' + c + '>\n' }}{%- elif m.role == 'assistant' -%}"
        "{% generation %}{%- if mode == '/a' -%}{{ c.lstrip('\n') + '!' }}{%- else -%}{{ c }}{%- endif -%}{% endgeneration %}"
        "{%- endif -%}{%- endfor -%}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ [][5].x }}",
        "{% if %}",
        "{% include 'x' %}",
    ],
)
def test_what_templates_may_use(source, reference, base):
    theirs, ours = both(reference, with_template(base, source), source, CONVERSATIONS["turns"], None, True)
    assert ours == theirs


def test_fields_that_are_null_are_left_out_and_reasoning_has_its_names(base):
    source = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}"
    message = {"role": "assistant", "content": None, "name": None, "reasoning": "r"}
    assert json.loads(with_template(base, source).render([message])) == {
        "reasoning": "r",
        "reasoning_content": "r",
        "role": "assistant",
        "thinking": "r",
    }
    assert message["content"] is None


def test_a_template_of_its_own_for_tools(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    for tools in (None, [TOOL]):
        theirs = reference.apply_chat_template([user("a")], tools=tools, tokenize=False)
        assert load_prompts(tmp_path).render([user("a")], tools=tools) == theirs
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_prompts(tmp_path).render([user("a")], tools=[TOOL]) == "J"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("K")
    assert load_prompts(tmp_path).render([user("a")], tools=[TOOL]) == "K"


def test_a_template_is_compiled_once(base, monkeypatch):
    compiled = Counter()
    compile_ = ImmutableSandboxedEnvironment.from_string

    def from_string(self, source, *more, **named):
        compiled[source] += 1
        return compile_(self, source, *more, **named)

    monkeypatch.setattr(templates.Environment, "from_string", from_string)
    source = TEMPLATE
    prompts = with_template(base, source)
    for _ in range(5):
        prompts.encode_chat([user("a")])
        view_row({"prompt": "a", "completion": "b"}, prompts, "chat")
    assert compiled == {source: 1}


NAMES = "{% set ns = namespace(a='a', l=[1]) %}"
TWICE = NAMES + "{% for i in range(60) %}{% set ns.STEP %}{% endfor %}"
LONG = "{% set x = 'a' * 1000000 %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that is filtered": "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a tree of loops": "{% for x in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "repeated": "{{ 'a' * 10 ** 9 }}",
    "a repeated list": "{{ ([0] * 10 ** 8) | length }}",
    "repeated bytes": "{{ 'a'.encode() * 10 ** 9 }}",
    "bytes": "{{ 'a'.encode().center(10 ** 9) }}",
    "a number": "{{ 9 ** (9 ** 8) }}",
    "a number squared": TWICE.replace("'a'", "9").replace("STEP", "a = ns.a * ns.a"),
    "a number as bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "rounded": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "added": TWICE.replace("STEP", "a = ns.a + ns.a"),
    "joined": TWICE.replace("STEP", "a = ns.a ~ ns.a"),
    "a block's text": NAMES
    + "{% for i in range(60) %}{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}",
    "a macro's text": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + TWICE.replace("STEP", "a = m(ns.a)"),
    "replaced": TWICE.replace("STEP", "a = ns.a.replace('a', 'aa')"),
    "replaced by a filter": LONG + "{{ x | replace('', x) }}",
    "separated": LONG + "{{ x.join(x) }}",
    "made and joined": LONG + "{{ ([''] * 99999) | map('default', x, true) | join }}",
    "made, joined by a method": LONG + "{{ ''.join((['']*99999) | map('default', x, true)) }}",
    "wide": "{{ 'a' | center(10 ** 9) }}",
    "left": "{{ 'a'.ljust(10 ** 9) }}",
    "zeros": "{{ '1'.zfill(10 ** 9) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "indented": "{{ ('a\n' * 100000) | indent(100000) }}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width by a filter": "{{ '%999999999d' | format(1) }}",
    "a width given": "{{ '%*d' % (10 ** 9, 1) }}",
    "many widths": "{{ ('%9999d' * 99999) % ((1,) * 99999) }}",
    "a format": "{{ '{:>999999999}'.format('a') }}",
    "a format in a format": "{{ '{:>{}}'.format('a', 10 ** 9) }}",
    "a mapped format": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "digits": "{{ '{:.999999999f}'.format(1.0) }}",
    "json's indent": "{{ [[1] * 1000] | tojson(indent=1000000) }}",
    "json's separators": LONG + "{{ ([1] * 1000) | tojson(separators=(x, x)) }}",
    "lists in lists": TWICE.replace("STEP", "l = [ns.l, ns.l]") + "{{ ns.l }}",
    "dicts in dicts": TWICE.replace("STEP", "l = dict(a=ns.l, b=ns.l)") + "{{ ns.l | tojson }}",
    "batches in batches": TWICE.replace("STEP", "l = ns.l | batch(2, ns.l) | list") + "{{ ns.l }}",
    "namespaces in namespaces": TWICE.replace("STEP", "l = namespace(a=ns.l, b=ns.l)") + "{{ ns.l }}",
    "a dict's values": LONG + "{{ dict.fromkeys(range(99999), x).values() }}",
    "empty batches": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slices": "{{ [1] | slice(10 ** 8) | list }}",
    "a sum of lists": "{{ ([[0]] * 99999) | sum(start=[]) }}",
    "tags": "{{ ('<' * 1000000) | striptags }}",
    "links": "{{ ('http://a ' * 100000) | urlize }}",
    "lines": "{{ ('a ' * 100000) | wordwrap(1, true, 'b' * 100000) }}",
    "a table": LONG + "{{ x.translate({97: x}) }}",
    "lorem ipsum": "{{ lipsum(n=20000) }}",
    "an encoding": "{{ ('é' * 300000).encode('punycode') }}",
    "a date": "{{ strftime_now('%' ~ '9' * 9 ~ 'Y') }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "many expressions": "{{ a }}" * 18000,
    "a long one": "a" * 200_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_strangers_template_begins_has_an_end(name, base):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ReftEdgeError, match="chat template"):
        with_template(base, HOSTILE[name]).render([user("x")])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_the_work_of_a_rendering_is_counted_not_timed(base, monkeypatch):
    monkeypatch.setattr(template_allowance.time, "thread_time", lambda: 0.0)
    passes = Counter()
    spend = templates.Allowance.spend

    def counted(self, amount):
        passes["all"] += 1
        spend(self, amount)

    monkeypatch.setattr(templates.Allowance, "spend", counted)
    with pytest.raises(ReftEdgeError, match="does not end"):
        with_template(base, HOSTILE["nested loops"]).render([user("x")])
    assert passes["all"] <= 1.1 * template_allowance.ALLOWED


def test_slow_work_that_counts_for_little_is_ended_by_the_clock(base, monkeypatch):
    now = iter(range(10**9))
    monkeypatch.setattr(template_allowance.time, "thread_time", lambda: float(next(now)))
    with pytest.raises(ReftEdgeError, match="does not end"):
        with_template(base, "{% for i in range(9999) %}{{ i }}{% endfor %}").render([user("x")])


def test_a_long_conversation_is_not_taken_for_a_hostile_template(base):
    source = (
        "{% set ns = namespace(m=[]) %}{% for m in messages %}{% set ns.m = ns.m + [m] %}{% endfor %}"
        "{% for m in ns.m %}{% if (ns.m | selectattr('role', 'equalto', 'user') | list | last) == m %}!{% endif %}"
        "{% set c = m.content.strip().replace('a', 'b').split('</think>')[-1] | trim %}"
        "<{{ m.role ~ ': ' ~ c }}>{% endfor %}"
    )
    messages = [user("a" * 5000), answer("b" * 5000)] * 150
    text = with_template(base, source).render(messages)
    assert len(text) > 1_500_000
    assert text.count("!") == 150


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff{{ 1 }}"),
        ("chat_template.jinja", "{{ 1 }}".encode("utf-16")),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("special_tokens_map.json", b"[" * 100_000),
        ("generation_config.json", b'{"eos_token_id": '),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}'),
    ],
)
def test_files_of_a_model_that_cannot_be_read(folder, tmp_path, name, content):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReftEdgeError, match=name):
        load_prompts(tmp_path)


@pytest.mark.parametrize("text", ["\ud83d", "caf\udce9", "ok \udfff ok", "\ude00\ud83d"])
def test_half_a_character_is_refused_wherever_text_becomes_tokens(base, text):
    calls = (
        base.encode_raw,
        base.encode_plain,
        lambda text: base.encode_after("a", text),
        lambda text: base.encode_after(text, "a"),
        lambda text: base.encode_prompt(text, "raw"),
        lambda text: base.encode_prompt(text, "chat"),
        lambda text: base.encode_chat([user(text)]),
        lambda text: with_template(base, "{{ '" + text + "' }}").encode_chat([user("a")]),
    )
    for call in calls:
        with pytest.raises(ReftEdgeError, match="is half of one"):
            call(text)
    with pytest.raises(ReftEdgeError, match="message 2: character"):
        base.encode_chat([user("a"), {"role": "assistant", "content": "", "tool_calls": [{"name": text}]}])


def test_what_a_tokenizer_fails_at_is_told():
    class Panic(BaseException):
        pass

    @dataclass
    class Broken:
        error: BaseException

        def encode(self, *given, **named):
            raise self.error

    Panic.__name__ = "PanicException"
    for error in (Panic("index out of bounds"), Exception("no unk token"), TypeError("x")):
        with pytest.raises(ReftEdgeError, match="tokenizer cannot take this text"):
            Prompts(Broken(error), None, {}).encode_raw("a")
    with pytest.raises(KeyboardInterrupt):
        Prompts(Broken(KeyboardInterrupt()), None, {}).encode_raw("a")
