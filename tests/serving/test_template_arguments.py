"""`chat_template_kwargs`: what a client gives the chat template beside the conversation."""

import json
import shutil

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from reft_edge.cli import app as cli
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings

CHAT = [{"role": "user", "content": "Who are you?"}]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}{{ style | default('') }}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% else %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(device_folder / "export", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def client(folder):
    with TestClient(create_app(folder, None, ServerSettings("tiny", hosts=("testserver",)), "cpu")) as client:
        yield client


def ask(client, arguments, path="/v1/chat/completions", **fields):
    body = {"model": "tiny", "chat_template_kwargs": arguments, **fields}
    if path != "/v1/responses":
        body["messages"] = CHAT
    if path == "/v1/chat/completions":
        body |= {"max_tokens": 6, "temperature": 0}
    return client.post(path, json=body)


def test_thinking_is_turned_off_and_on(client):
    thinks = ask(client, {}).json()["choices"][0]["message"]
    assert (thinks["content"], bool(thinks["reasoning_content"])) == ("", True)
    assert ask(client, {"enable_thinking": True}).json()["choices"][0]["message"] == thinks
    plain = ask(client, {"enable_thinking": False}).json()["choices"][0]["message"]
    assert plain["content"]
    assert "reasoning_content" not in plain
    assert ask(client, None).json()["choices"][0]["message"] == thinks


def test_tokenize_and_responses_have_them_too(client):
    def text(arguments):
        tokens = ask(client, arguments, "/tokenize").json()["tokens"]
        return client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]

    assert "Be {{ brief }}." in text({"style": "Be {{ brief }}."})  # a value is text, and no template
    counts = [
        ask(client, {"style": style}, "/v1/responses", input="Hi", max_output_tokens=4).json()["usage"]
        for style in ("", "In few words.")
    ]
    assert counts[0]["input_tokens"] < counts[1]["input_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, "messages comes from the conversation or the model"),
        ({"add_generation_prompt": False}, "add_generation_prompt comes from"),
        ({"bos_token": "x"}, "bos_token comes from"),
        ({"a b": 1}, "'a b' is no name"),
        ({"x" * 101: 1}, "is no name"),
        ([], "chat_template_kwargs"),
        ("enable_thinking", "chat_template_kwargs"),
        ({"style": "\ud83d"}, "half of"),
        ({"style": {"deep": [["\ud83d"]]}}, "half of"),
        ({"style": json.loads("[" * 60 + "]" * 60)}, None),
        ({"style": 1e300, "range": 3, "strftime_now": "x", "super": None}, None),
        ({"self": 1}, "'self' is no name"),
    ],
)
def test_what_no_template_takes_is_refused_and_nothing_fails(client, arguments, message):
    body = json.dumps({"model": "tiny", "messages": CHAT, "max_tokens": 2, "chat_template_kwargs": arguments})
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    if message is None:
        assert answer.status_code == 200, answer.text
    else:
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text


def test_the_commands_take_them(folder):
    def run(*options):
        result = CliRunner().invoke(
            cli, ["run", str(folder), "Hi", "--chat", "--max-tokens", "2", "--json", *options]
        )
        return result.exit_code, result.output

    code, output = run("--chat-template-kwargs", '{"style": "In very few words."}')
    assert code == 0, output
    assert json.loads(output)["prompt_tokens"] > json.loads(run()[1])["prompt_tokens"]
    for text, message in (
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"tools": 1}', "tools comes"),
    ):
        code, output = run("--chat-template-kwargs", text)
        assert (code, message in output) == (1, True), output
    lines = "Hi\n/stats\n"
    with_style = CliRunner().invoke(
        cli, ["chat", str(folder), "--max-tokens", "2", "--chat-template-kwargs", '{"style": "x y z"}'], lines
    )
    without = CliRunner().invoke(cli, ["chat", str(folder), "--max-tokens", "2"], lines)
    counts = [int(result.output.split("prompt ")[1].split()[0]) for result in (with_style, without)]
    assert counts[0] > counts[1]
