"""What is fuzzed of chat templates: their text with a conversation, and templates that a grammar makes of the input's bytes."""

import json
from collections.abc import Callable
from pathlib import Path

from harness import Target

from reft_edge.model.template_environment import filter_names
from reft_edge.model.templates import Template

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi é <b> " * 20},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}],
    },
    {"role": "tool", "content": '{"t": 20}', "name": "f"},
    {"role": "assistant", "content": "<think>x</think>Hello", "reasoning": "r"},
]
_TEMPLATES = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}{{ eos_token }}",
    "{% set ns = namespace(a='', l=[]) %}{% for m in messages if m.content %}{% set ns.a = ns.a ~ m.content.split('</think>')[-1] %}{% endfor %}{{ ns.a }}",
    "{% macro f(x, d=1) %}{{ x | tojson(indent=2) }}{{ caller() if caller }}{% endmacro %}{% for m in messages %}{% generation %}{{ f(m) }}{% endgeneration %}{% endfor %}",
    "{{ '%s:%5d' % ('a', 3) }}{{ '{:>5}'.format('b') }}{{ 'a' * 3 + 'b' }}{{ (2 ** 8) // 3 }}{{ [1] * 3 }}{{ 'x'.center(9) | indent(2) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}{{ strftime_now('%Y') }}",
]
_METHODS = [
    "split",
    "rsplit",
    "splitlines",
    "strip",
    "replace",
    "join",
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "translate",
    "format",
    "format_map",
    "encode",
    "decode",
    "upper",
    "title",
    "casefold",
    "swapcase",
    "partition",
    "count",
    "index",
    "startswith",
    "items",
    "keys",
    "values",
    "get",
    "copy",
    "to_bytes",
    "bit_length",
    "hex",
    "next",
    "fromkeys",
    "removeprefix",
]
_ATOMS = (
    *(
        "'a'",
        "'é<&\\n\\t'",
        "'{:>99999}{0}'",
        "'%9999d%s'",
        "''",
        "0",
        "1",
        "-3",
        "7",
        "1000",
        "99999",
        "10 ** 9",
        "1.5",
    ),
    *(
        "none",
        "true",
        "messages",
        "messages[1].content",
        "messages[2]",
        "x",
        "ns.a",
        "ns.l",
        "loop",
        "loop.index",
        "self",
    ),
    *(
        "range(9)",
        "range(99999)",
        "namespace(a=x)",
        "dict(a=x, b=ns.l)",
        "lipsum(n=3)",
        "cycler(1, 2)",
        "joiner(x)",
        "caller",
    ),
)
_OPERATORS = ("+", "*", "**", "%", "~", "-", "/", "//", "==", "<", "in", "not in", "and", "or")


class _Choices:
    """Choices that an input's bytes make; the first of each once there are no more."""

    def __init__(self, content: bytes) -> None:
        self._bytes = iter(content)

    def below(self, count: int) -> int:
        return next(self._bytes, 0) % count

    def expression(self, depth: int) -> str:
        kind = self.below(9) if depth else 0
        if kind <= 1:
            return _ATOMS[self.below(len(_ATOMS))]
        inner = self.expression(depth - 1)
        if kind == 2:
            return f"({inner} {_OPERATORS[self.below(len(_OPERATORS))]} {self.expression(depth - 1)})"
        if kind == 3:
            return f"({inner} | {_FILTERS[self.below(len(_FILTERS))]}{self.arguments(depth)})"
        if kind == 4:
            return f"({inner}).{_METHODS[self.below(len(_METHODS))]}{self.arguments(depth) or '()'}"
        if kind == 5:
            return f"[{inner}, {self.expression(depth - 1)}]"
        if kind == 6:
            return f"{{'a': {inner}, {self.expression(depth - 1)}: 1}}"
        if kind == 7:
            return f"({inner})[{self.expression(depth - 1)}:]"
        return f"({inner} if {self.expression(depth - 1)} else {self.expression(depth - 1)})"

    def arguments(self, depth: int) -> str:
        count = self.below(4)
        return f"({', '.join(self.expression(depth - 1) for _ in range(count))})" if count else ""

    def statements(self, depth: int) -> str:
        return "".join(self.statement(depth) for _ in range(1 + self.below(3)))

    def statement(self, depth: int) -> str:
        kind = self.below(9) if depth else 0
        value = self.expression(3)
        if kind == 0:
            return f"{{{{ {value} }}}}"
        if kind == 1:
            return f"{{% set x = {value} %}}"
        if kind == 2:
            return f"{{% set ns.{'al'[self.below(2)]} = {value} %}}"
        inner = self.statements(depth - 1)
        return {
            3: f"{{% for x in {value} %}}{inner}{{% endfor %}}",
            4: f"{{% for x in range(60) if {value} %}}{inner}{{% endfor %}}",
            5: f"{{% set x %}}{inner}{{{{ x }}}}{{% endset %}}",
            6: f"{{% macro m(x) %}}{inner}{{% endmacro %}}{{{{ m({value}) }}}}",
            7: f"{{% call m({value}) %}}{inner}{{% endcall %}}",
            8: f"{{% for x in [{value}] recursive %}}{inner}{{{{ loop([x, x]) }}}}{{% endfor %}}",
        }[kind]


_FILTERS = filter_names()


def grown(content: bytes) -> str:
    """The template that bytes stand for."""
    return "{% set ns = namespace(a='a', l=[1]) %}{% set x = 'ab' * 50 %}" + _Choices(content).statements(3)


def _render(source: str, messages: list[dict[str, object]]) -> None:
    text = Template(source).render(
        messages, tools=None, documents=None, add_generation_prompt=True, eos_token="</s>"
    )
    assert isinstance(text, str)


def template_target(folder: Path) -> Target:
    """A template's text, a zero byte, and a conversation as JSON."""

    def read(content: bytes) -> None:
        source, _, conversation = content.partition(b"\0")
        try:
            messages = json.loads(conversation)
            assert isinstance(messages, list)
            assert all(isinstance(message, dict) for message in messages)
        except (ValueError, RecursionError, AssertionError):
            messages = _MESSAGES
        _render(source.decode(errors="surrogateescape"), messages)

    conversation = json.dumps(_MESSAGES).encode()
    seeds = [source.encode() + b"\0" + conversation for source in _TEMPLATES]
    return Target(read, [*seeds, b"{% for i in range(99999) %}{{ i ~ i }}{% endfor %}\0[]"], len(seeds))


def grown_template_target(folder: Path) -> Target:
    """Templates that a grammar makes of the input: every operator, filter and method on every kind of value."""
    read: Callable[[bytes], None] = lambda content: _render(grown(content), _MESSAGES)  # noqa: E731
    return Target(read, [b"", bytes([0, 0, 1, 0]), *(bytes(range(k, k + 60)) for k in range(0, 180, 30))], 2)
