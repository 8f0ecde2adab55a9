"""The form of answer that a request asks for, under the names that clients of OpenAI, vLLM and llama.cpp know."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.constraints import Constraint

Fields = Mapping[str, Any]


def constraint_of(
    response_format: Fields | None, structured_outputs: Fields | None, grammar: str | None
) -> Constraint | None:
    """What three fields of a request ask for together. Raises ValueError that begins with the place of what is wrong."""
    asked: dict[str, Constraint] = {}
    if response_format is not None and (form := _response_format(response_format)) is not None:
        asked["response_format"] = form
    if structured_outputs is not None:
        asked["structured_outputs"] = _structured_outputs(structured_outputs)
    if grammar:
        asked["grammar"] = _made("grammar", Constraint.grammar, grammar)
    if len(asked) > 1:
        raise _wrong(" and ".join(asked), "an answer has one form; send one of them")
    return next(iter(asked.values()), None)


def _response_format(given: Fields) -> Constraint | None:
    """OpenAI's; `schema` beside `json_object` is llama.cpp's."""
    place, kind = "response_format", given.get("type")
    if kind == "text":
        _check_names(place, given, "type")
        return None
    if kind == "json_object":
        _check_names(place, given, "type", "schema")
        return (
            _schema(f"{place}.schema", given["schema"]) if given.get("schema") else Constraint.json_object()
        )
    if kind != "json_schema":
        raise _wrong(f"{place}.type", "expected text, json_object or json_schema")
    _check_names(place, given, "type", "json_schema")
    inner = given.get("json_schema")
    if not isinstance(inner, dict):
        raise _wrong(f"{place}.json_schema", "expected an object with a `schema`")
    _check_names(f"{place}.json_schema", inner, "name", "description", "schema", "strict")
    return _schema(f"{place}.json_schema.schema", inner.get("schema"))


def _structured_outputs(given: Fields) -> Constraint:
    """vLLM's."""
    place = "structured_outputs"
    _check_names(place, given, "json", "json_object", "regex", "choice", "grammar")
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    if len(asked) != 1:
        raise _wrong(place, "expected one of json, json_object, regex, choice and grammar")
    name, value = next(iter(asked.items()))
    place = f"{place}.{name}"
    if name == "json":
        return _schema(place, _read(place, value) if isinstance(value, str) else value)
    if name == "json_object":
        if value is not True:
            raise _wrong(place, "expected true or false")
        return Constraint.json_object()
    if name == "choice":
        return _made(place, Constraint.choices, value)
    if not isinstance(value, str):
        raise _wrong(place, "expected a text")
    return _made(place, Constraint.regex if name == "regex" else Constraint.grammar, value)


def _schema(place: str, value: Any) -> Constraint:
    if not isinstance(value, dict):
        raise _wrong(place, "expected an object: a JSON schema")
    return _made(place, Constraint.json_schema, value)


def _read(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(place, f"not valid JSON: {error}") from error


def _made(place: str, make: Callable[[Any], Constraint], value: Any) -> Constraint:
    try:
        return make(value)
    except ReftEdgeError as error:
        raise _wrong(place, str(error)) from error


def _check_names(place: str, given: Fields, *known: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise _wrong(place, f"{unknown[0][:100]!r}: there is no such field")


def _wrong(place: str, why: str) -> ValueError:
    return ValueError(f"{place}: {why}")
