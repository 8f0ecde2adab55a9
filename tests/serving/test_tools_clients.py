"""Tools of the server through other libraries' clients: LangChain's agents, pydantic-ai and instructor.

They are no part of the extra `dev`: pip install 'reft-edge[clients]'
"""

import socket
import threading
import time
from contextlib import suppress
from typing import Literal

import openai
import pytest
import uvicorn
from pydantic import BaseModel, ConfigDict, Field

from reft_edge.export import export_model
from reft_edge.model.source import ModelFolder
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings
from tests.helpers.tiny import make_model

pytestmark = pytest.mark.peers
pytest.importorskip("llguidance")


class Fruit(BaseModel):
    """A fruit."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    source = ModelFolder(make_model(folder / "hf", max_position_embeddings=4096), "tiny-llama")
    export_model(source, folder / "export")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(folder / "export", None, ServerSettings("tiny"), "cpu")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


def test_langchain(url):
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain.agents import create_agent
    from langchain.agents.structured_output import ToolStrategy
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def count(colour: Literal["red", "green"]) -> str:
        """Count the fruit of a colour."""
        return f"3 {colour}"

    model = langchain_openai.ChatOpenAI(base_url=url, api_key="x", model="tiny", seed=1, max_tokens=200)
    messages = [HumanMessage("How many are red?")]
    called = model.bind_tools([count], tool_choice="any", parallel_tool_calls=False).invoke(messages)
    [call] = called.tool_calls
    result = count.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content in ("3 red", "3 green")
    free = model.bind(max_tokens=5).bind_tools([count]).invoke([*messages, called, result])
    assert free.response_metadata["finish_reason"] in ("length", "stop")
    streamed = None
    for chunk in model.bind_tools([count], tool_choice="count").stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    assert {call["name"] for call in streamed.tool_calls} == {"count"}
    assert model.with_structured_output(Fruit, method="function_calling").invoke("A fruit").count < 10
    assert model.with_structured_output(Fruit, method="json_schema").invoke("A fruit").count < 10
    one = model.model_copy(update={"model_kwargs": {"parallel_tool_calls": False}})
    agent = create_agent(one, [], response_format=ToolStrategy(Fruit))
    assert isinstance(agent.invoke({"messages": messages})["structured_response"], Fruit)


def test_pydantic_ai(url):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent, NativeOutput, UsageLimitExceeded, UsageLimits
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="x"))
    settings = {"max_tokens": 200, "seed": 2, "parallel_tool_calls": False}
    agent = Agent(model, output_type=Fruit, model_settings=settings)
    assert isinstance(agent.run_sync("A fruit").output, Fruit)
    native = Agent(model, output_type=NativeOutput(Fruit), model_settings=settings)
    assert isinstance(native.run_sync("A fruit").output, Fruit)
    asked, limits = [], UsageLimits(request_limit=3)
    tools = Agent(model, output_type=Fruit, model_settings=settings | {"temperature": 2.0}, retries=5)

    @tools.tool_plain
    def count(colour: Literal["red", "green"]) -> str:
        """Count the fruit of a colour."""
        asked.append(colour)
        return f"3 {colour}"

    for seed in range(5):
        with suppress(UsageLimitExceeded):
            output = tools.run_sync(
                "How many are red?", model_settings={"seed": seed}, usage_limits=limits
            ).output
            assert isinstance(output, Fruit)
        if asked:
            break
    assert set(asked) <= {"red", "green"}
    assert asked


def test_instructor(url):
    instructor = pytest.importorskip("instructor")
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        fruit = instructor.from_openai(client, mode=mode).chat.completions.create(
            model="tiny",
            response_model=Fruit,
            messages=[{"role": "user", "content": "A fruit"}],
            max_tokens=200,
            seed=1,
            max_retries=0,
        )
        assert isinstance(fruit, Fruit)
