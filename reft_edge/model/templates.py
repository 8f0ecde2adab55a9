"""Chat templates, rendered as transformers renders them, in a sandbox that ends what a stranger's template begins.

Everything that a template does costs from an allowance: a pass of a loop, a call, every character or element that comes
of them. What would grow past it is refused before it is made. The allowance grows with the conversation, so that no
template that only writes its conversation down meets it.
"""

import json
import re
import time
import warnings
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from reft_edge.errors import ReftEdgeError

LONGEST_SOURCE = 128 * 1024
"""Characters of a template."""
MOST_NODES = 8192
"""Expressions and statements of a template; those in use have up to 1,400."""
ALLOWED = 2_000_000
"""Passes, characters and elements that any rendering may cost."""
ALLOWED_A_CHARACTER = 64
"""The same, for every character of its conversation."""
SECONDS = 2.0
"""Of this thread's processor time that a rendering may take."""
MOST_BITS = 1 << 16
"""Of a whole number."""
AN_ELEMENT = 4
"""What an element of a list costs, in characters."""


class Template:
    """A compiled template. Raises ReftEdgeError if it cannot be compiled."""

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_SOURCE:
            raise ReftEdgeError(
                f"the model's chat template has {len(source):,} characters; "
                f"at most {LONGEST_SOURCE:,} are taken"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of Python, at what jinja2 made of the source
                self._template = _Environment().from_string(source)
        except Exception as error:  # a parser's and a compiler's kinds are many
            raise _failed(error) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as text. Raises ReftEdgeError where the template fails, refuses, or does not end."""
        plain = [_as_transformers_passes(message) for message in messages]
        try:
            token = _allowance.set(_Allowance(_measure([plain, list(variables.values())], None)))
            try:
                return self._template.render(messages=plain, **variables)
            finally:
                _allowance.reset(token)
        except Exception as error:  # a template's own expressions raise of every kind
            raise _failed(error) from error


def _failed(error: Exception) -> ReftEdgeError:
    if isinstance(error, ReftEdgeError):
        return error
    words = str(error) if isinstance(error, TemplateError | SecurityError) else _named(error)
    return ReftEdgeError(f"the model's chat template failed: {words}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _as_transformers_passes(message: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are null are left out, and reasoning goes by the names that templates know."""
    if not isinstance(message, Mapping):
        raise ReftEdgeError(f"a message must be an object, not {type(message).__name__}")
    given = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


class _Allowance:
    """What a rendering may still cost."""

    def __init__(self, size: int) -> None:
        self.left = ALLOWED + ALLOWED_A_CHARACTER * size
        self._until = time.thread_time() + SECONDS
        self._next_look = self.left

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < self._next_look:
            self._next_look = self.left - 200
            if self.left < 0 or time.thread_time() > self._until:
                self.left = -1
                raise ReftEdgeError(
                    "the model's chat template does not end, or writes far more than its conversation; "
                    "use another template"
                )


_allowance: ContextVar[_Allowance] = ContextVar("allowance")


def _spend(amount: int) -> None:
    _allowance.get().spend(amount)


def _measure(value: Any, most: int | None, characters: bool = True) -> int:
    """Characters and elements of a value, all that it holds included; stops once they are more than `most`."""
    total, todo = 0, [value]
    while todo:
        part = todo.pop()
        total += AN_ELEMENT
        if isinstance(part, str):
            total += len(part) if characters else 0
        elif isinstance(part, Mapping):
            todo.extend(part.keys())
            todo.extend(part.values())
        elif isinstance(part, Namespace):
            todo.append(part._Namespace__attrs)  # type: ignore[attr-defined]
        elif isinstance(part, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            total += len(part)
            if most is not None and total > most:
                break
            todo.extend(part)
        if most is not None and total > most:
            break
    return total


def _spend_text(*values: Any) -> None:
    """Before values become text."""
    allowance = _allowance.get()
    for value in values:
        allowance.spend(len(value) if isinstance(value, str) else _measure(value, allowance.left))


def _made(value: Any) -> Any:
    """What an expression made, paid for."""
    allowance = _allowance.get()
    if isinstance(value, str):
        allowance.spend(1 + len(value))
    elif isinstance(value, list | tuple | dict | set | frozenset):
        allowance.spend(_measure(value, allowance.left, characters=False))
    else:
        allowance.spend(1)
    return value


def _metered(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield _made(item)


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0


def _spend_replace(text: Any, old: Any = "", new: Any = "", *more: Any, **named: Any) -> None:
    text, old, new = str(text), str(named.get("old", old)), str(named.get("new", new))
    _spend((text.count(old) if old else len(text) + 1) * len(new))


def _spend_join(separator: Any, items: Any = (), *more: Any, **named: Any) -> None:
    _spend_text(items)
    _spend(len(items) * len(str(separator)) if hasattr(items, "__len__") else 0)


def _spend_format(text: Any, *values: Any, **named: Any) -> None:
    fields = list(Formatter().parse(str(text)))
    specs = [spec for _, _, spec, _ in fields if spec]
    widths = [int(digits) for spec in specs for digits in re.findall(r"\d+", spec)]
    if any("{" in spec for spec in specs):
        widths += [_number(value) for value in (*values, *named.values())]
    _spend(len(fields) * max(widths, default=0))
    for _ in fields:
        _spend_text(*values, *named.values())


def _spend_percent(text: Any, *values: Any, **named: Any) -> None:
    fields = re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", str(text))
    if any("*" in field for field in fields):
        raise SecurityError("a width that is computed")
    widths = [int(digits) for field in fields for digits in re.findall(r"\d+", field)]
    _spend(len(fields) * max(widths, default=0))
    for _ in fields:
        _spend_text(*values, *named.values())


def _spend_widths(text: Any, *values: Any, **named: Any) -> None:
    """Where every line or tab of a text may become as wide as a number or text says."""
    widest = max(map(_number, (*values, *named.values())), default=0)
    _spend((str(text).count("\n") + str(text).count("\t") + 1) * widest)


def _spend_table(text: Any, table: Any = (), *more: Any, **named: Any) -> None:
    longest = max(map(_number, table.values()), default=0) if isinstance(table, Mapping) else 0
    _spend(len(text) * longest)


def _spend_square(text: Any, *values: Any, **named: Any) -> None:
    """Where a text's patterns may be sought from every character to its end."""
    _spend(len(str(text)) ** 2 // 64)


def _spend_wrapped(text: Any, *values: Any, **named: Any) -> None:
    longest = max(map(_number, (*values, *named.values())), default=0)
    _spend(len(str(text)) * (16 + longest))


def _spend_slow(value: Any, *more: Any, **named: Any) -> None:
    _spend(16 * _measure(value, _allowance.get().left))


def _spend_counted(items: Any, *values: Any, **named: Any) -> None:
    """Where a number says how many elements there will be."""
    _spend(AN_ELEMENT * sum(_number(value) for value in (*values, *named.values()) if isinstance(value, int)))


def _spend_sum(items: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("a sum of other things than numbers")


def _spend_lines(*values: Any, **named: Any) -> None:
    _spend(16 * max(1, *map(_number, (*values, *named.values())), 100) ** 2)


def _spend_digits(value: Any, precision: Any = 0, *more: Any) -> None:
    if _number(precision) > 300:
        raise SecurityError("a number of that many digits")


def _known_encoding(text: Any, encoding: Any = "utf-8", *more: Any) -> None:
    if str(encoding).lower() not in ("utf-8", "utf8", "ascii", "latin-1"):
        raise SecurityError("an encoding other than utf-8, ascii and latin-1")


_METHODS: dict[str, Callable[..., None]] = {
    "replace": _spend_replace,
    "join": _spend_join,
    "format": _spend_format,
    "format_map": lambda text, values=(), *more: _spend_format(text, values),
    "center": _spend_widths,
    "ljust": _spend_widths,
    "rjust": _spend_widths,
    "zfill": _spend_widths,
    "expandtabs": _spend_widths,
    "translate": _spend_table,
    "encode": _known_encoding,
    "striptags": _spend_square,
}
"""What methods of a text cost before they are called, where more than their text and result."""

_FILTERS: dict[str, Callable[..., None]] = {
    "replace": _spend_replace,
    "join": lambda items, separator="", *more, **named: _spend_join(named.get("d", separator), items),
    "format": _spend_percent,
    "center": _spend_widths,
    "indent": _spend_widths,
    "batch": _spend_counted,
    "slice": _spend_counted,
    "sum": _spend_sum,
    "round": _spend_digits,
    "striptags": _spend_square,
    "urlize": _spend_square,
    "wordwrap": _spend_wrapped,
    "pprint": _spend_slow,
}
"""The same, of filters."""

_SHALLOW = {
    *(
        "attr",
        "batch",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "groupby",
        "items",
        "last",
        "length",
        "list",
    ),
    *(
        "map",
        "max",
        "min",
        "random",
        "reject",
        "rejectattr",
        "reverse",
        "select",
        "selectattr",
        "slice",
        "sort",
    ),
    *("sum", "unique"),
}
"""Filters that hand elements on, and make no text of what these hold."""


def _paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    extra = 1 if hasattr(function, "jinja_pass_arg") else 0
    growth, shallow = _FILTERS.get(name), name in _SHALLOW

    @wraps(function)
    def paid(*arguments: Any, **named: Any) -> Any:
        passed, (value, *values) = arguments[:extra], arguments[extra:]
        if isinstance(value, Iterator):
            value = list(_metered(value)) if name == "join" else _metered(value)
        if isinstance(value, str) or not shallow:
            _spend_text(value, *values, *named.values())
        if growth is not None:
            growth(value, *values, **named)
        return _made(function(*passed, value, *values, **named))

    return paid


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


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's words, is written as what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
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
        self.filters = {name: _paid_filter(name, function) for name, function in self.filters.items()}
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
        _spend(1)
        return True

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        """What a block, a macro or the whole template wrote."""
        return "".join(_metered(parts))

    @staticmethod
    def joined(parts: list[Any]) -> str:
        """`a ~ b`."""
        _spend_text(*parts)
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
            _spend(len(owner))
            growth = _METHODS.get(method.__name__)
            if growth is not None:
                arguments = tuple(
                    list(_metered(given)) if isinstance(given, Iterator) else given for given in arguments
                )
                growth(owner, *arguments, **named)
        elif isinstance(owner, bytes):
            _known_encoding(owner, *arguments)
        elif function is self.globals["lipsum"]:
            _spend_lines(*arguments, **named)
        return _made(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str):
                _spend_percent(left, right)
        elif operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                _spend(len(left) + len(right))
        else:
            _spend_product(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))


def filter_names() -> list[str]:
    """Every filter that templates have."""
    return sorted(_Environment().filters)


def _spend_product(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise SecurityError("a number of that many digits")
        return
    for one, other in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(other, int):
            _spend(len(one) * max(0, other))


@pass_context
def _written(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        _spend_text(value)
    return value


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    _spend(16 * len(format))
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
    _spend(_number(indent) * 1000)
    return "".join(_metered(encoder.iterencode(x)))


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
