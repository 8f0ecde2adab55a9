"""Tools of the server, through OpenAI's own client: calls that are guaranteed, streams, conversations with results, errors."""

import json
import shutil

import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field

from reft_edge.export import export_model
from reft_edge.model.source import ModelFolder
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings
from tests.helpers.openai_client import openai_over
from tests.helpers.tiny import make_model

pytest.importorskip("llguidance")

CHAT = [{"role": "user", "content": "Is it warm?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tell it", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}<tool_call>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | default('') }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>{% endif %}"
)


class Weather(BaseModel):
    """Tell the weather."""

    city: str = Field(pattern="^(Rome|Oslo)$")
    days: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """With room for tools in the context."""
    folder = tmp_path_factory.mktemp("model")
    source = ModelFolder(make_model(folder / "hf", max_position_embeddings=2048), "tiny-llama")
    export_model(source, folder / "export")
    return folder / "export"


@pytest.fixture(scope="module", params=["generic", "thinks"])
def client(export, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(export, folder)
    if request.param == "thinks":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = ServerSettings("tiny", hosts=("testserver",))
    with TestClient(create_app(folder, None, settings, "cpu")) as client:
        client.thinks = request.param == "thinks"
        yield client


@pytest.fixture
def openai_client(client):
    return openai_over(client)


def ask(client, **fields):
    body = {"model": "tiny", "messages": CHAT, "tools": TOOLS, "max_tokens": 150, "seed": 3, **fields}
    return client.post("/v1/chat/completions", json=body)


def guaranteed(client):
    if client.thinks:
        pytest.skip("a random model thinks until its answer is cut")


def test_required_guarantees_calls(client, openai_client):
    guaranteed(client)
    for seed in range(3):
        answer = openai_client.chat.completions.create(
            model="tiny", messages=CHAT, tools=TOOLS, tool_choice="required", seed=seed, max_tokens=150
        )
        [choice] = answer.choices
        assert choice.finish_reason in ("tool_calls", "length")
        assert choice.message.content is None
        first = choice.message.tool_calls[0]
        assert first.id.startswith("call_")
        assert (first.type, first.function.name in ("weather", "now")) == ("function", True)
    answer = ask(client, tool_choice="required", parallel_tool_calls=False).json()["choices"][0]
    assert (len(answer["message"]["tool_calls"]), answer["finish_reason"]) == (1, "tool_calls")


def test_a_named_tool_is_called(client, openai_client):
    guaranteed(client)
    tool = openai.pydantic_function_tool(Weather)
    answer = openai_client.chat.completions.parse(
        model="tiny",
        messages=CHAT,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
        parallel_tool_calls=False,
        max_tokens=150,
        seed=1,
    )
    [called] = answer.choices[0].message.tool_calls
    assert isinstance(called.function.parsed_arguments, Weather)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    answer = ask(client, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).json()
    assert {call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]} == {"now"}


def test_a_stream_has_openais_deltas(client, openai_client):
    guaranteed(client)
    fields = {
        "model": "tiny",
        "messages": CHAT,
        "tools": TOOLS[:1],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 150,
    }
    whole = openai_client.chat.completions.create(**fields).choices[0].message.tool_calls[0].function
    deltas = [chunk.choices[0] for chunk in openai_client.chat.completions.create(**fields, stream=True)]
    calls = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert deltas[0].delta.role == "assistant"
    assert (calls[0].index, calls[0].function.name, calls[0].function.arguments) == (0, "weather", "")
    assert calls[0].id
    assert all(call.id is None and call.function.name is None and call.index == 0 for call in calls[1:])
    assert len(calls) > 2
    assert "".join(call.function.arguments for call in calls) == whole.arguments
    assert set(json.loads(whole.arguments)) == {"city", "days"}
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["tool_calls"]
    with openai_client.chat.completions.stream(**fields) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.arguments == whole.arguments


def test_free_answers_and_results(client, openai_client):
    answer = openai_client.chat.completions.create(
        model="tiny", messages=CHAT, tools=TOOLS, temperature=0, max_tokens=8
    )
    assert not answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert (getattr(answer.choices[0].message, "reasoning_content", None) is not None) == client.thinks
    called = {"id": "call_7", "type": "function", "function": {"name": "weather", "arguments": '{"days": 1}'}}
    history = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_7", "content": [{"type": "text", "text": "22"}]},
    ]
    more = ask(client, messages=history, max_tokens=4).json()
    assert more["usage"]["prompt_tokens"] > answer.usage.prompt_tokens
    without = ask(client, tool_choice="none", max_tokens=4).json()
    assert without["usage"]["prompt_tokens"] < answer.usage.prompt_tokens


def test_thoughts_stream_by_their_own_name(client):
    if not client.thinks:
        pytest.skip("this template does not think")
    text = ask(client, stream=True, max_tokens=6, temperature=0, logprobs=True).text
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line and "[DONE]" not in line]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert not any(delta.get("content") for delta in deltas)
    assert "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert sum(len((event["choices"][0]["logprobs"] or {"content": []})["content"]) for event in events) == 6
    whole = ask(client, max_tokens=6, temperature=0).json()["choices"][0]["message"]
    assert whole["content"] == ""
    assert whole["reasoning_content"] == "".join(delta.get("reasoning_content", "") for delta in deltas)


def test_a_free_answer_may_be_json_or_calls(client):
    guaranteed(client)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "none"}}}
    found = set()
    for seed in range(8):
        answer = ask(client, response_format=form, seed=seed).json()["choices"][0]["message"]
        found.add("calls" if "tool_calls" in answer else answer["content"])
    assert found == {"calls", '"none"'}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "web"}]}, "tools.0.type: this server has tools of the type `function` only"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name: Field required"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name: expected 1 to 64 letters",
        ),
        (
            {
                "tools": [
                    TOOLS[1],
                    {"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}},
                ]
            },
            "tools.1.function.parameters: the schema is not of an object",
        ),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools.1.function.name: there are two tools of the name 'now'"),
        ({"tools": [TOOLS[1]] * 129}, "tools: "),
        ({"tools": [], "tool_choice": "required"}, "tool_choice: there are no tools to choose from"),
        ({"tool_choice": "any"}, "tool_choice: expected none, auto, required or an object"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name: it names",
        ),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type: expected function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools.mode: expected"),
        ({"structured_outputs": {"regex": "a"}}, "tools: an answer of a given form cannot call tools"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    TOOLS[0],
                    {
                        "type": "function",
                        "function": {"name": "x", "parameters": {"properties": {"a": {"type": "int"}}}},
                    },
                ],
            },
            "tools.1.function.parameters: the JSON schema is not usable at properties.a: Invalid type: int",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "x"}]}]},
            "messages.0.tool_calls: only messages of the role `assistant` have tool calls",
        ),
        (
            {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"id": "x", "function": {}}]}]},
            "messages.1.tool_calls.0.function.name: Field required",
        ),
        (
            {"messages": [*CHAT, {"role": "tool", "content": "4"}]},
            "messages.1.tool_call_id: a tool's result names",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_told_with_its_place(client, fields, message):
    answer = ask(client, **fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_keywords_that_are_not_known_hold_strict_tools_only(client):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "maxItems": 1}}}
    for strict, status in ((False, 200), (True, 400)):
        tool = {"type": "function", "function": {"name": "x", "parameters": schema, "strict": strict}}
        answer = ask(client, tools=[tool], tool_choice="required", max_tokens=4)
        assert answer.status_code == status, answer.text
