"""Answers of a given form from the server, through OpenAI's client and by the names that other servers' clients use."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, Field

from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings
from tests.helpers.openai_client import openai_over

jsonschema = pytest.importorskip("jsonschema")

pytest.importorskip("llguidance")

CHAT = [{"role": "user", "content": "Who are you?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


class Fruit(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=99)
    ripe: bool | None


@pytest.fixture(scope="module")
def client(device_folder):
    settings = ServerSettings("tiny", hosts=("testserver",), max_body=200_000)
    with TestClient(create_app(device_folder / "export", None, settings, "cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(client):
    return openai_over(client)


def ask(client, path="/v1/chat/completions", **fields):
    body = {"model": "tiny", "temperature": 1, "max_tokens": 120, **fields}
    if path.startswith("/v1/chat"):
        body["messages"] = CHAT
    else:
        body["prompt"] = "Hi"
    return client.post(path, json=body)


def content(answer):
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_openais_client_parses_answers_into_pydantic_models(openai_client):
    answer = openai_client.chat.completions.parse(
        model="tiny", messages=CHAT, response_format=Fruit, max_tokens=120, seed=5
    )
    assert isinstance(answer.choices[0].message.parsed, Fruit)
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.LengthFinishReasonError):
        openai_client.chat.completions.parse(
            model="tiny", messages=CHAT, response_format=Fruit, max_tokens=3, seed=5
        )


def test_openais_client_streams_them(openai_client):
    with openai_client.chat.completions.stream(
        model="tiny", messages=CHAT, response_format=Fruit, max_tokens=120, seed=6
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Fruit)


def test_openais_client_hears_where_a_schema_is_wrong(openai_client):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "int"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=r"properties\.a\.items: Invalid type: int"):
        openai_client.chat.completions.create(model="tiny", messages=CHAT, response_format=form)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "fruit", "strict": True, "schema": SCHEMA},
            }
        },
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}},
    ],
)
def test_a_schema_under_each_of_its_names(client, path, fields):
    for seed in (1, 2):
        jsonschema.validate(json.loads(content(ask(client, path, seed=seed, **fields))), SCHEMA)


def test_other_forms(client):
    for seed in range(3):
        answer = ask(client, structured_outputs={"choice": ["red", "dark green"]}, seed=seed)
        assert content(answer) in ("red", "dark green")
        assert re.fullmatch(
            "[a-f]{3}x", content(ask(client, structured_outputs={"regex": "[a-f]{3}x"}, seed=seed))
        )
        for grammar in ('start: "a" | "bc"', 'root ::= "a" | "bc"'):
            assert content(ask(client, grammar=grammar, seed=seed)) in ("a", "bc")
            assert content(ask(client, structured_outputs={"grammar": grammar}, seed=seed)) in ("a", "bc")
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        assert content(ask(client, **fields)).startswith("{")
    free = content(ask(client, temperature=0, max_tokens=8))
    text = ask(client, temperature=0, max_tokens=8, response_format={"type": "text"}, grammar="")
    assert content(text) == free


def test_requests_with_different_forms_run_together(client):
    forms = [
        {"structured_outputs": {"json": SCHEMA}},
        {},
        {"structured_outputs": {"choice": ["red"]}},
        {"structured_outputs": {"regex": "[0-9]{4}"}},
    ] * 2
    with ThreadPoolExecutor(len(forms)) as threads:
        jobs = [threads.submit(ask, client, temperature=0, max_tokens=60, **form) for form in forms]
    found = [content(job.result()) for job in jobs]
    assert found[:4] == found[4:]
    jsonschema.validate(json.loads(found[0]), SCHEMA)
    assert found[2] == "red"
    assert re.fullmatch("[0-9]{4}", found[3])
    assert found[1] == content(ask(client, temperature=0, max_tokens=60))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"response_format": {"type": "json"}},
            "response_format.type: expected text, json_object or json_schema",
        ),
        ({"response_format": {}}, "response_format.type: expected"),
        ({"response_format": "json_object"}, "response_format: "),
        (
            {"response_format": {"type": "text", "schema": {}}},
            "response_format: 'schema': there is no such field",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: expected an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema: expected an object: a JSON schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs: expected one of json, json_object, regex, choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: expected one of"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex: expected a text"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: the choices are not a list"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json: not valid JSON"),
        ({"structured_outputs": {"structural_tag": {}}}, "'structural_tag': there is no such field"),
        (
            {"structured_outputs": {"regex": "a" * 70_000}},
            "structured_outputs.regex: the regular expression has 70,000",
        ),
        ({"grammar": "start: nobody"}, 'the grammar is not usable: at 1(8): unknown name: "nobody"'),
        ({"structured_outputs": {"regex": "(" * 20_000}}, "the regular expression is not usable"),
        (
            {"grammar": "a", "response_format": {"type": "json_object"}},
            "response_format and grammar: an answer has one form",
        ),
    ],
)
def test_a_form_that_is_wrong_is_refused(client, fields, message):
    answer = ask(client, **fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_an_answer_that_is_cut_says_so(client):
    answer = ask(client, structured_outputs={"json": SCHEMA}, max_tokens=2).json()
    assert answer["choices"][0]["finish_reason"] == "length"
