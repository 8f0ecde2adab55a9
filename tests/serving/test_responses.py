"""/v1/responses through OpenAI's own client: text, forms, tools, streams, conversations, errors."""

import json
from typing import Literal

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict

from reft_edge.export import export_model
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.request import Piece
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.responses import ResponseAnswer
from reft_edge.runtime.serving.responses_api import ResponsesRequest
from reft_edge.runtime.serving.served import ServerSettings
from tests.helpers.openai_client import openai_over
from tests.helpers.tiny import make_model

pytest.importorskip("llguidance")

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Tell it",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Rome", "Oslo"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Fruit(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    source = ModelFolder(make_model(folder / "hf", max_position_embeddings=2048), "tiny-llama")
    export_model(source, folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def server(export):
    settings = ServerSettings("tiny", hosts=("testserver",))
    with TestClient(create_app(export, None, settings, "cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    return openai_over(server)


def test_text_is_the_models_own(client, export):
    model = SteeredModel(export, device="cpu")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    expected = model.generate(messages, raw=False, max_tokens=9)
    asked = {"model": "tiny", "temperature": 0, "max_output_tokens": 9}
    for given in (
        "Who are you?",
        [{"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]}],
    ):
        answer = client.responses.create(input=given, instructions="Be kind.", **asked)
        assert answer.output_text == expected
        assert answer.status in ("completed", "incomplete")
        assert answer.usage.input_tokens == len(model.prompts.encode_chat(messages))
    cut = client.responses.create(input="Who are you?", **{**asked, "max_output_tokens": 1})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(
        client.responses.create(input="Who are you?", instructions="Be kind.", stream=True, **asked)
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert events[-1].response.output_text == expected


def test_forms(client):
    answer = client.responses.parse(model="tiny", input="A fruit", text_format=Fruit, max_output_tokens=60)
    assert isinstance(answer.output_parsed, Fruit)
    with client.responses.stream(
        model="tiny", input="A fruit", text_format=Fruit, max_output_tokens=60
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Fruit)


def test_tools(client):
    asked = {"model": "tiny", "tools": [TOOL], "max_output_tokens": 150, "parallel_tool_calls": False}
    answer = client.responses.create(input="Is it warm?", tool_choice="required", **asked)
    [call] = answer.output
    assert (call.type, call.name, answer.status) == ("function_call", "weather", "completed")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    history = [
        {"role": "user", "content": "Is it warm?"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"},
    ]
    free = client.responses.create(input=history, **{**asked, "max_output_tokens": 5})
    assert free.output[0].type == "message"
    assert free.usage.input_tokens > answer.usage.input_tokens
    named = {"type": "function", "name": "weather"}
    events = list(
        client.responses.create(input="Is it warm?", tool_choice=named, stream=True, temperature=0, **asked)
    )
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == events[-1].response.output[0].arguments
    assert events[-1].type == "response.completed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": [{"type": "image"}]}, "input.0.type: expected message, function_call"),
        ({"input": []}, "input: List should have at least 1 item"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content: images are not",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools.0.type: this server has tools of the type `function` only",
        ),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name: expected 1 to 64"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type: expected text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema: expected an object"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens: "),
        ({"temperature": 5}, "temperature: "),
        ({"beams": 5}, "beams: there is no such field"),
        (
            {"input": [{"type": "function_call_output", "output": "4"}]},
            "input.0.tool_call_id: a tool's result",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "int"}}}},
            "the JSON schema is not usable",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(server, fields, message):
    answer = server.post("/v1/responses", json={"model": "tiny", "input": "Hi", **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_failure_ends_a_stream_in_its_form():
    body = ResponsesRequest(model="tiny", input="Hi")
    answer = ResponseAnswer(body, lambda: None)
    lines = [
        *answer.begin(),
        *answer.take(0, Piece("Hm")),
        *answer.failed(ApiError(400, "no", "generation_failed")),
    ]
    last = json.loads(lines[-1].partition("data: ")[2])
    assert lines[-1].startswith("event: response.failed\n")
    assert last["response"]["error"] == {"code": "generation_failed", "message": "no"}
    assert last["response"]["status"] == "failed"
