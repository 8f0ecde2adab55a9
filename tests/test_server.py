"""The server, through FastAPI's test client and through OpenAI's own client against a real socket."""

import json
import math
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from reft_edge.cli import app as cli
from reft_edge.runtime import Sampling, SteeredModel
from reft_edge.runtime.server import ServerSettings, create_app
from tests.tiny import CLASSIFIED

CHAT = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def adapters(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("first", "everywhere"):
        (folder / f"{name}.safetensors").write_bytes((device_folder / f"{name}.safetensors").read_bytes())
    (folder / "broken.safetensors").write_bytes(b"not an adapter")
    return folder


@pytest.fixture(scope="module")
def model(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    for name in ("first", "everywhere"):
        model.load_adapter(device_folder / f"{name}.safetensors")
    return model


@pytest.fixture(scope="module")
def client(device_folder, adapters):
    settings = ServerSettings("tiny", hosts=("testserver",), max_body=20_000, max_inputs=6)
    with TestClient(create_app(device_folder / "export", adapters, settings, "cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def served(device_folder, adapters):
    """An OpenAI client of a server on a socket of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(device_folder / "export", adapters, ServerSettings("tiny", api_key="sesame"), "cpu")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=0)
    server.should_exit = True
    thread.join()


def ask(client, path="/v1/chat/completions", **fields):
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12, **fields}
    if "messages" not in body and "prompt" not in body:
        body["messages"] = CHAT
    return client.post(path, json=body)


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_are_the_base_and_every_adapter(served):
    assert [entry.id for entry in served.models.list()] == [
        "tiny",
        "tiny:broken",
        "tiny:everywhere",
        "tiny:first",
    ]
    assert served.models.retrieve("tiny:first").id == "tiny:first"


@pytest.mark.parametrize("adapter", [None, "first", "everywhere"])
def test_openais_client_gets_the_models_own_answers(served, model, adapter):
    expected = model.generate("Who are you?", adapter, raw=False, max_tokens=12)
    name = f"tiny:{adapter}" if adapter else "tiny"
    answer = served.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == len(model.prompts.encode_prompt("Who are you?", "chat"))
    chunks = list(
        served.chat.completions.create(
            model=name,
            messages=CHAT,
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    raw = model.generate("Who are you?", adapter, raw=True, max_tokens=12)
    text = served.completions.create(model=name, prompt="Who are you?", temperature=0, max_tokens=12)
    assert text.choices[0].text == raw
    stream = served.completions.create(
        model=name, prompt="Who are you?", temperature=0, max_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == raw


def test_a_mix_of_adapters(client, model):
    mix = {"first": 0.6, "everywhere": -0.4}
    expected = model.generate("Who are you?", mix, raw=False, max_tokens=12)
    assert ask(client, adapters=mix).json()["choices"][0]["message"]["content"] == expected
    assert ask(client, model="tiny:first", adapters=mix).status_code == 400


def test_seeds_choices_and_stop(client, model):
    fields = {"temperature": 1.0, "seed": 7, "n": 3}
    first, again = (ask(client, **fields).json()["choices"] for _ in range(2))
    assert first == again
    assert [choice["index"] for choice in first] == [0, 1, 2]
    for index, choice in enumerate(first):
        sampling = Sampling(temperature=1.0, seed=7 + index)
        expected = model.generate("Who are you?", raw=False, max_tokens=12, sampling=sampling)
        assert choice["message"]["content"] == expected
    whole = ask(client).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2]
    cut = ask(client, stop=stop).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    streamed = events(ask(client, stop=stop, stream=True).text)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == whole[: whole.index(stop)]


def test_log_probabilities_of_both_kinds(client, model):
    answer = ask(client, logprobs=True, top_logprobs=2, max_tokens=4).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for entry in content:
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
        assert len(entry["top_logprobs"]) == 2
    streamed = events(ask(client, logprobs=True, top_logprobs=2, max_tokens=4, stream=True).text)
    parts = [event["choices"][0]["logprobs"] for event in streamed]
    assert [entry for part in parts if part for entry in part["content"]] == content
    plain = ask(client, "/v1/completions", prompt="ice", logprobs=3, max_tokens=4).json()["choices"][0]
    assert len(plain["logprobs"]["tokens"]) == 4
    ids = model.prompts.encode_raw("ice")
    row = model.logits([ids])[0][-1].astype(np.float64)
    expected = row.max() - row.max() - math.log(np.exp(row - row.max()).sum())
    assert abs(plain["logprobs"]["token_logprobs"][0] - expected) < 1e-4


def test_prompts_in_a_list_and_as_tokens(client, model):
    prompts = ["ice", "Who are you?"]
    expected = [model.generate(prompt, raw=True, max_tokens=6) for prompt in prompts]
    found = ask(client, "/v1/completions", prompt=prompts, max_tokens=6).json()["choices"]
    assert [choice["text"] for choice in found] == expected
    tokens = [model.prompts.encode_raw(prompt) for prompt in prompts]
    found = ask(client, "/v1/completions", prompt=tokens, max_tokens=6).json()["choices"]
    assert [choice["text"] for choice in found] == expected
    found = ask(client, "/v1/completions", prompt=tokens[0], max_tokens=6).json()["choices"]
    assert [choice["text"] for choice in found] == expected[:1]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "gpt-5"}, 404, "there is no model 'gpt-5'"),
        ({"model": "tiny:nobody"}, 404, "there is no adapter 'nobody'"),
        ({"model": "tiny:../first"}, 404, "there is no adapter"),
        ({"model": "tiny:broken"}, 400, "not a usable adapter"),
        ({"adapters": {"nobody": 1.0}}, 404, "there is no adapter 'nobody'"),
        ({"adapters": {"first": 1e400}}, 400, "finite"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "this model's context is 256"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"n": 7}, 400, "at most 6 are allowed"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"presence_penalty": 1}, 400, "presence_penalty is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({"beam_width": 2}, 400, "beam_width: "),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(client, fields, status, message):
    content = json.dumps({"model": "tiny", "messages": CHAT, **fields}).replace("Infinity", "1e400")
    answer = client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_neutral_parameters_are_taken(client):
    neutral = {"frequency_penalty": 0, "tools": [], "user": "me", "logit_bias": None, "metadata": {"a": "b"}}
    assert ask(client, **neutral).json()["choices"] == ask(client).json()["choices"]


def test_bodies_keys_hosts_and_other_paths(client, served):
    assert ask(client, messages=[{"role": "user", "content": "a" * 30_000}]).status_code == 413
    chunked = client.post("/v1/completions", content=(b"a" * 5000 for _ in range(8)))
    assert chunked.status_code == 413
    assert client.post("/v1/completions", content=b"{").status_code == 400
    assert client.get("/nowhere").json()["error"]["message"] == "GET /nowhere: Not Found"
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    base = str(served.base_url).removesuffix("/v1/")
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}
    for headers in ({}, {"authorization": "Bearer sesamo"}, {"authorization": "Bearer é".encode()}):
        refused = httpx.get(f"{base}/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"


def test_a_client_that_leaves_frees_its_slot(served):
    engine_is_free = "reft_edge_running_requests 0.0"

    def metrics():
        url = str(served.base_url).replace("/v1/", "/metrics")
        return httpx.get(url, headers={"authorization": "Bearer sesame"}).text

    stream = served.completions.create(
        model="tiny:everywhere", prompt="ice", temperature=2, max_tokens=200, stream=True
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        served.with_options(timeout=0.01).completions.create(
            model="tiny:everywhere", prompt="ice", temperature=2, max_tokens=200
        )
    for _ in range(100):
        if engine_is_free in metrics():
            break
        time.sleep(0.05)
    assert engine_is_free in metrics()


def test_a_full_queue_says_when_to_come_back(device_folder):
    settings = ServerSettings("tiny", slots=1, queue_limit=1, hosts=("*",))
    with TestClient(create_app(device_folder / "export", None, settings, "cpu")) as client:
        answer = ask(client, n=4, max_tokens=200)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert ask(client).status_code == 200
        assert ask(client, model="tiny:first").status_code == 404


def test_metrics_count(client):
    before = client.get("/metrics").text
    ask(client)
    after = client.get("/metrics").text

    def value(text, name):
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    for name in ("reft_edge_generated_tokens_total", "reft_edge_request_seconds_count"):
        assert value(after, name) > (value(before, name) if name in before else 0)
    assert 'reft_edge_requests_total{path="/v1/chat/completions",status="200"}' in after


def test_a_replaced_adapter_is_used_at_once(device_folder, tmp_path, model):
    folder = tmp_path / "adapters"
    folder.mkdir()
    task = folder / "task.safetensors"
    task.write_bytes((device_folder / "first.safetensors").read_bytes())
    app = create_app(device_folder / "export", folder, ServerSettings("tiny", hosts=("*",)), "cpu")
    with TestClient(app) as client:
        for name in ("first", "everywhere"):
            replacement = tmp_path / name
            replacement.write_bytes((device_folder / f"{name}.safetensors").read_bytes())
            replacement.replace(task)
            found = ask(client, model="tiny:task").json()["choices"][0]["message"]["content"]
            assert found == model.generate("Who are you?", name, raw=False, max_tokens=12)
        task.unlink()
        assert ask(client, model="tiny:task").status_code == 404


def test_encoders_give_labels_and_embeddings(device_folder, tmp_path):
    (tmp_path / "labels.safetensors").write_bytes((device_folder / "labels.safetensors").read_bytes())
    settings = ServerSettings("bert", hosts=("*",), max_inputs=4)
    with TestClient(create_app(device_folder / "encoder", tmp_path, settings, "cpu")) as client:
        expected = json.loads((device_folder / "probabilities.json").read_text())
        answer = client.post("/v1/classify", json={"model": "bert:labels", "input": CLASSIFIED}).json()
        for found, row in zip(answer["data"], expected, strict=True):
            np.testing.assert_allclose(list(found["probabilities"].values()), row, atol=1e-4)
        assert client.post("/v1/classify", json={"model": "bert", "input": "A"}).status_code == 400
        assert (
            client.post("/v1/classify", json={"model": "bert:labels", "input": ["A"] * 5}).status_code == 400
        )
        api = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=client)
        vectors = [entry.embedding for entry in api.embeddings.create(model="bert", input=CLASSIFIED).data]
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        alone = api.embeddings.create(model="bert", input=CLASSIFIED[1], encoding_format="float").data[0]
        np.testing.assert_allclose(alone.embedding, vectors[1], atol=1e-5)
        edited = api.embeddings.create(
            model="bert:labels", input=CLASSIFIED[1], encoding_format="float"
        ).data[0]
        assert np.abs(np.array(edited.embedding) - vectors[1]).max() > 1e-3
        refused = client.post("/v1/chat/completions", json={})
        assert (refused.status_code, "is an encoder" in refused.text) == (404, True)


def test_a_decoder_has_no_embeddings(client):
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "A"})
    assert (answer.status_code, "continues text" in answer.text) == (404, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--name", "a:b"], "has a colon"),
        (["--adapters", "/nowhere"], "there is no folder /nowhere"),
        (["--api-key-file", "/nowhere"], "cannot read the API key"),
        (["--slots", "0"], "slots is 0"),
    ],
)
def test_the_command_refuses(device_folder, options, message):
    result = CliRunner().invoke(cli, ["serve", str(device_folder / "export"), *options])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
