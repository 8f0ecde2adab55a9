"""Where in a JSON schema a fault is."""

from collections.abc import Callable, Iterator
from typing import Any

_MOST_LOOKS = 2000
"""Parts of a schema that are looked at, so that a stranger's schema takes bounded time."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")


def inside(schema: Any, message: str, fault: Callable[[Any], str]) -> str:
    """` at properties.name`, the innermost part of `schema` that has the same fault by itself; "" for the whole.

    `fault(part)` is what is wrong with a part; `message`, of the whole, may have more behind that.
    """
    places: list[str] = []
    looks = 0
    part, found = schema, True
    while found:
        found = False
        for names, inner in _parts(part):
            looks += 1
            if looks > _MOST_LOOKS:
                break
            if (own := fault(inner)) and message.startswith(own):
                places += names
                part, found = inner, True
                break
    return f" at {'.'.join(places)[:300]}" if places else ""


def _parts(schema: Any) -> Iterator[tuple[list[str], Any]]:
    """The schemas inside a schema, with the names that lead to them."""
    if not isinstance(schema, dict):
        return
    for keyword in _NAMED:
        if isinstance(inner := schema.get(keyword), dict):
            yield from (([keyword, name], part) for name, part in inner.items())
    for keyword in _LISTED:
        if isinstance(inner := schema.get(keyword), list):
            yield from (([keyword, str(number)], part) for number, part in enumerate(inner))
    for keyword in _SINGLE:
        if isinstance(inner := schema.get(keyword), dict):
            yield [keyword], inner
