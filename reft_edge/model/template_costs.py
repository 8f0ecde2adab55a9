"""What methods, filters and operators of a template cost before they are called, where more than their text and result."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError

from reft_edge.model.template_allowance import (
    AN_ELEMENT,
    allowance,
    made,
    measure,
    metered,
    number,
    spend,
    spend_text,
)

MOST_BITS = 1 << 16
"""Of a whole number."""


def _spend_replace(text: Any, old: Any = "", new: Any = "", *more: Any, **named: Any) -> None:
    text, old, new = str(text), str(named.get("old", old)), str(named.get("new", new))
    spend((text.count(old) if old else len(text) + 1) * len(new))


def _spend_join(separator: Any, items: Any = (), *more: Any, **named: Any) -> None:
    spend_text(items)
    spend(len(items) * len(str(separator)) if hasattr(items, "__len__") else 0)


def _spend_format(text: Any, *values: Any, **named: Any) -> None:
    fields = list(Formatter().parse(str(text)))
    specs = [spec for _, _, spec, _ in fields if spec]
    widths = [int(digits) for spec in specs for digits in re.findall(r"\d+", spec)]
    if any("{" in spec for spec in specs):
        widths += [number(value) for value in (*values, *named.values())]
    spend(len(fields) * max(widths, default=0))
    for _ in fields:
        spend_text(*values, *named.values())


def spend_percent(text: Any, *values: Any, **named: Any) -> None:
    fields = re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", str(text))
    if any("*" in field for field in fields):
        raise SecurityError("a width that is computed")
    widths = [int(digits) for field in fields for digits in re.findall(r"\d+", field)]
    spend(len(fields) * max(widths, default=0))
    for _ in fields:
        spend_text(*values, *named.values())


def _spend_widths(text: Any, *values: Any, **named: Any) -> None:
    """Where every line or tab of a text may become as wide as a number or text says."""
    widest = max(map(number, (*values, *named.values())), default=0)
    spend((str(text).count("\n") + str(text).count("\t") + 1) * widest)


def _spend_table(text: Any, table: Any = (), *more: Any, **named: Any) -> None:
    longest = max(map(number, table.values()), default=0) if isinstance(table, Mapping) else 0
    spend(len(text) * longest)


def _spend_square(text: Any, *values: Any, **named: Any) -> None:
    """Where a text's patterns may be sought from every character to its end."""
    spend(len(str(text)) ** 2 // 64)


def _spend_wrapped(text: Any, *values: Any, **named: Any) -> None:
    longest = max(map(number, (*values, *named.values())), default=0)
    spend(len(str(text)) * (16 + longest))


def _spend_slow(value: Any, *more: Any, **named: Any) -> None:
    spend(16 * measure(value, allowance.get().left))


def _spend_counted(items: Any, *values: Any, **named: Any) -> None:
    """Where a number says how many elements there will be."""
    spend(AN_ELEMENT * sum(number(value) for value in (*values, *named.values()) if isinstance(value, int)))


def _spend_sum(items: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("a sum of other things than numbers")


def spend_lines(*values: Any, **named: Any) -> None:
    spend(16 * max(1, *map(number, (*values, *named.values())), 100) ** 2)


def _spend_digits(value: Any, precision: Any = 0, *more: Any) -> None:
    if number(precision) > 300:
        raise SecurityError("a number of that many digits")


def known_encoding(text: Any, encoding: Any = "utf-8", *more: Any) -> None:
    if str(encoding).lower() not in ("utf-8", "utf8", "ascii", "latin-1"):
        raise SecurityError("an encoding other than utf-8, ascii and latin-1")


METHODS: dict[str, Callable[..., None]] = {
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
    "encode": known_encoding,
    "striptags": _spend_square,
}
"""What methods of a text cost before they are called, where more than their text and result."""

FILTERS: dict[str, Callable[..., None]] = {
    "replace": _spend_replace,
    "join": lambda items, separator="", *more, **named: _spend_join(named.get("d", separator), items),
    "format": spend_percent,
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


def paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    extra = 1 if hasattr(function, "jinja_pass_arg") else 0
    growth, shallow = FILTERS.get(name), name in _SHALLOW

    @wraps(function)
    def paid(*arguments: Any, **named: Any) -> Any:
        passed, (value, *values) = arguments[:extra], arguments[extra:]
        if isinstance(value, Iterator):
            value = list(metered(value)) if name == "join" else metered(value)
        if isinstance(value, str) or not shallow:
            spend_text(value, *values, *named.values())
        if growth is not None:
            growth(value, *values, **named)
        return made(function(*passed, value, *values, **named))

    return paid


def spend_product(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise SecurityError("a number of that many digits")
        return
    for one, other in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(other, int):
            spend(len(one) * max(0, other))
