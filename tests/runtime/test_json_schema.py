"""Masks against JSON Schema: what a schema takes can be written token by token, and what it refuses cannot.

With JSON Schema's own test suite (https://github.com/json-schema-org/JSON-Schema-Test-Suite) in a folder that
$REFT_EDGE_JSON_SCHEMA_SUITE names, `pytest -m peers` runs its cases for the keywords that llguidance knows.
"""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.constraints import Constraint, Constraints

pytest.importorskip("llguidance")

KEYWORDS = [
    ({"type": "integer"}, [0, -12], ["1", 1.5, None]),
    ({"type": "number"}, [0, -1.25, 1e21], ["1", True]),
    ({"type": "string"}, ["", 'a "b" \\ ü 😀\n'], [1, None]),
    ({"type": "boolean"}, [True, False], [0, "true"]),
    ({"type": "null"}, [None], [False, ""]),
    ({"type": ["integer", "null"]}, [3, None], ["3", []]),
    ({"const": {"a": [1, "x"]}}, [{"a": [1, "x"]}], [{"a": [1]}, "a"]),
    ({"enum": ["red", 3, None]}, ["red", 3, None], ["blue", 4]),
    ({"type": "integer", "minimum": -3, "maximum": 12}, [-3, 0, 12], [-4, 13, 100]),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}, [1, 2], [0, 3]),
    ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 1, 1.75, 2], [0.4, 2.5]),
    ({"type": "integer", "multipleOf": 5}, [0, 5, 25], [3, 7]),
    ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "äöüß"], ["a", "abcde"]),
    ({"type": "string", "pattern": "^[a-c]+$"}, ["a", "cab"], ["", "d", "ad"]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024", "29.02.2024"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    ({"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"], [1, None], {}]),
    ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], [1, "a"]], [[], [1, 2, 3]]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[1, "a"], [1]],
        [["a", 1], [1, "a", 2]],
    ),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b"]},
        [{"a": 1, "b": None}, {"b": 2}, {"b": 2, "c": 3}],
        [{}, {"a": 1}, {"a": "x", "b": 1}],
    ),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"a": 1}],
        [{"b": 1}, {"a": 1, "b": 1}],
    ),
    ({"type": "object", "additionalProperties": {"type": "string"}}, [{"x": "y"}], [{"x": 1}]),
    (
        {"type": "object", "patternProperties": {"^n": {"type": "integer"}}, "additionalProperties": False},
        [{"n1": 1}],
        [{"n1": "a"}, {"m": 1}],
    ),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [1, "a"], ["ab", None]),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["a"]),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6]),
    (
        {
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
            "$ref": "#/$defs/node",
        },
        [{}, {"next": {"next": {}}}],
        [{"next": 1}, []],
    ),
]


@pytest.fixture(scope="module")
def constraints(device_folder):
    return Constraints(Tokenizer.from_file(str(device_folder / "export/tokenizer.json")), [1])


def takes(constraints, tokenizer, schema, value):
    """Whether a value can be written under a schema, its names in the schema's order."""
    progress = constraints.begin(Constraint("json_schema", json.dumps(schema)))
    over = False
    for token in tokenizer.encode(json.dumps(ordered(value, schema), ensure_ascii=False)).ids:
        if over or token not in progress.allowed(10**6):
            return False
        _, over = progress.take(token)
    return over or 1 in progress.allowed(10**6)


def ordered(value, schema):
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        first = schema.get("prefixItems") if isinstance(schema.get("prefixItems"), list) else []
        rest = schema.get("items")
        return [ordered(v, first[i] if i < len(first) else rest) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
    names = [name for name in known if name in value] + [name for name in value if name not in known]
    return {name: ordered(value[name], known.get(name)) for name in names}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"), KEYWORDS, ids=[json.dumps(schema) for schema, *_ in KEYWORDS]
)
def test_keywords(constraints, schema, valid, invalid):
    tokenizer = constraints._tokenizer
    for value in valid:
        assert takes(constraints, tokenizer, schema, value), f"{value!r} is valid"
    for value in invalid:
        assert not takes(constraints, tokenizer, schema, value), f"{value!r} is not valid"


@pytest.mark.peers
def test_the_suite_of_json_schema(constraints):
    folder = os.environ.get("REFT_EDGE_JSON_SCHEMA_SUITE")
    if not folder:
        pytest.skip("REFT_EDGE_JSON_SCHEMA_SUITE names no folder of the suite")
    tokenizer = constraints._tokenizer
    counts = {"refused schemas": 0, "right": 0, "valid, and not written": 0}
    wrong = []
    for path in sorted(Path(folder, "tests/draft2020-12").glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            for case in group["tests"]:
                try:
                    taken = takes(constraints, tokenizer, group["schema"], case["data"])
                except ReftEdgeError:
                    counts["refused schemas"] += 1
                    continue
                if taken == case["valid"]:
                    counts["right"] += 1
                elif case["valid"]:
                    counts["valid, and not written"] += 1
                else:
                    wrong.append((path.stem, group["description"], case["description"]))
    print(counts, wrong)
    assert not wrong
    assert counts["right"] > 10 * counts["valid, and not written"]
