"""The sandbox in which chat templates run: jinja2's, with loops, calls and joined texts that pay from an allowance."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from reft_edge.model.template_allowance import made, metered, number, spend, spend_text
from reft_edge.model.template_costs import (
    METHODS,
    known_encoding,
    paid_filter,
    spend_lines,
    spend_percent,
    spend_product,
)

MOST_NODES = 8192
"""Expressions and statements of a template; those in use have up to 1,400."""


class _Counted(NodeTransformer):
    """Loops, macros, literals and joined texts that pay."""

    def get_visitor(self, node: nodes.Node) -> Any:
        if isinstance(node, nodes.For):
            return self.loop
        if isinstance(node, nodes.Macro | nodes.CallBlock):
            return self.macro
        if isinstance(node, nodes.Concat):
            return self.joined
        if isinstance(node, nodes.List | nodes.Dict) or (
            isinstance(node, nodes.Tuple) and node.ctx == "load"
        ):
            return self.literal
        return None

    def loop(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _step(node))
        if node.test is not None:
            node.test = nodes.And(_paid(node), node.test, lineno=node.lineno)
        return node

    def macro(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, _step(node))
        return node

    def joined(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("joined", nodes.List(node.nodes, lineno=node.lineno))

    def literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _call("literal", node)


def _paid(node: nodes.Node) -> nodes.Expr:
    return nodes.EnvironmentAttribute("step", lineno=node.lineno)


def _step(node: nodes.Node) -> nodes.Stmt:
    return nodes.ExprStmt(_paid(node), lineno=node.lineno)


def _call(name: str, argument: nodes.Expr) -> nodes.Expr:
    function = nodes.EnvironmentAttribute(name, lineno=argument.lineno)
    return nodes.Call(function, [argument], [], None, None, lineno=argument.lineno)


@dataclass
class Marks:
    """Where a template marks what is trained, as it writes."""

    written: int = 0
    """Characters so far."""
    spans: list[tuple[int, str]] = field(default_factory=list)
    """Of every mark, the character at which it begins, and what it holds."""


marks: ContextVar[Marks | None] = ContextVar("marks", default=None)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what is trained, is written as what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        content = caller()
        if (found := marks.get()) is not None:
            found.spans.append((found.written, content))
        return content


class Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_written,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: paid_filter(name, function) for name, function in self.filters.items()}
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_Dict(),
            namespace=_Namespace,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MOST_NODES:
            raise SecurityError(f"it has more than {MOST_NODES:,} expressions and statements")
        counted: nodes.Template = _Counted().visit(tree)
        return counted

    @property
    def step(self) -> bool:
        """Pays for a pass of a loop or a call of a macro; always true."""
        spend(1)
        return True

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        """What a block, a macro or the whole template wrote."""
        return "".join(metered(parts))

    @staticmethod
    def joined(parts: list[Any]) -> str:
        """`a ~ b`."""
        spend_text(*parts)
        return "".join(map(str, parts))

    @staticmethod
    def literal(value: Any) -> Any:
        """A list, tuple or dict written in the template, paid for by `call`."""
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if (isinstance(obj, bytes) and attr != "decode") or attr in ("to_bytes", "from_bytes"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            spend(len(owner))
            growth = METHODS.get(method.__name__)
            if growth is not None:
                arguments = tuple(
                    list(metered(given)) if isinstance(given, Iterator) else given for given in arguments
                )
                growth(owner, *arguments, **named)
        elif isinstance(owner, bytes):
            known_encoding(owner, *arguments)
        elif function is self.globals["lipsum"]:
            spend_lines(*arguments, **named)
        return made(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str):
                spend_percent(left, right)
        elif operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                spend(len(left) + len(right))
        else:
            spend_product(operator, left, right)
        return made(super().call_binop(context, operator, left, right))


def filter_names() -> list[str]:
    """Every filter that templates have."""
    return sorted(Environment().filters)


@pass_context
def _written(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        spend_text(value)
    return value


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    spend(16 * len(format))
    if re.search(r"\d{3}", format):
        raise SecurityError("a date with a width")
    return datetime.now().strftime(format)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else (separators[0], separators[1]),
        sort_keys=sort_keys,
    )
    if indent is None and separators is None:
        return encoder.encode(x)
    spend(number(indent) * 1000)
    return "".join(metered(encoder.iterencode(x)))


class _Dict:
    """`dict` without the class's own attributes."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """Without attributes that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, given = arguments[0], dict(*arguments[1:], **named)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")
