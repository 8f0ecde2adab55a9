"""The server, through FastAPI's test client and through OpenAI's own client against a real socket."""

import asyncio
import contextlib
import json
import math
import os
import pkgutil
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from tokenizers import Tokenizer
from typer.testing import CliRunner

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.cli import app as cli
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Sampling, SteeredModel
from reft_edge.runtime.memory import NoMemoryError
from reft_edge.runtime.request import Piece
from reft_edge.runtime.serving import prompt_tokens
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.guard import check_host
from reft_edge.runtime.serving.served import LOOPBACK, ServerSettings
from tests.helpers.tiny import CLASSIFIED

CHAT = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def adapters(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("first", "everywhere"):
        (folder / f"{name}.safetensors").write_bytes((device_folder / f"{name}.safetensors").read_bytes())
    (folder / "broken.safetensors").write_bytes(b"not an adapter")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
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


@pytest.mark.parametrize("speculate", [True, False])
def test_answers_are_the_same_with_guessed_tokens(device_folder, client, speculate):
    settings = ServerSettings("tiny", hosts=("testserver",), speculate=speculate)
    app = create_app(device_folder / "export", None, settings, "cpu")
    fields = {"messages": [{"role": "user", "content": "ice ice ice ice"}], "max_tokens": 40, "seed": 4}
    with TestClient(app) as other:
        assert (app.state.served.engine.batch.speculation is not None) == speculate
        for temperature in (0, 0.6):
            answers = [
                each.post(
                    "/v1/chat/completions", json={"model": "tiny", **fields, "temperature": temperature}
                )
                for each in (client, other)
            ]
            assert answers[0].json()["choices"] == answers[1].json()["choices"]


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
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "maximum context length is 256"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"n": 7}, 400, "at most 6 are allowed"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.function: Field required"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type: expected text, json_object"),
        ({"presence_penalty": 3}, 400, "presence_penalty: "),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias: 'x' is not a token id"),
        ({"logit_bias": {"3": 101}}, 400, "logit_bias: what token 3 gets is not a number from -100 to 100"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias: a token id is not from 0 to 319"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({"beam_width": 2}, 400, "beam_width: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "images are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "audio are not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, 400, "only parts of type `text`"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: Field required"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            400,
            "messages.0.tool_calls.0.id: Field required",
        ),
        ({"messages": [{"role": "tool", "content": "4"}]}, 400, "a tool's result names the call"),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, 400, "are results of tools"),
        ({"messages": [3]}, 400, "messages.0: expected an object"),
        ({"stop": ["a", 3]}, 400, "stop: expected a text, or a list of at most 16 texts"),
        ({"stop": ["a"] * 17}, 400, "stop: expected"),
        ({"adapters": {"first": True}}, 400, "adapters: the scale of 'first' is not a finite number"),
        ({"adapters": {"first": 10**400}}, 400, "the scale of 'first' is not a finite number"),
        ({"adapters": {str(i): 1 for i in range(65)}}, 400, "at most 64 adapters"),
        ({"seed": 10**400}, 400, "seed: "),
        ({"model": "tiny:" + "a" * 300}, 404, "there is no adapter 'aaa"),
        ({"model": "tiny:loop"}, 404, "there is no adapter 'loop'"),
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


def test_bias_and_penalties(client, model):
    ids = model.prompts.encode_raw("ice")
    fields = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {"70": 3, "71": -2.5}}
    sampling = Sampling(frequency_penalty=1.5, presence_penalty=-0.5, logit_bias={70: 3, 71: -2.5})
    expected = model.generate("ice", raw=True, max_tokens=12, sampling=sampling)
    answer = ask(client, "/v1/completions", prompt=ids, **fields).json()["choices"][0]["text"]
    assert answer == expected != ask(client, "/v1/completions", prompt=ids).json()["choices"][0]["text"]
    always = ask(client, "/v1/completions", prompt=ids, logit_bias={"70": 100}, max_tokens=3).json()
    assert always["choices"][0]["text"] == model.prompts.decode([70]) * 3


def test_bodies_keys_hosts_and_other_paths(client, served):
    assert ask(client, messages=[{"role": "user", "content": "a" * 30_000}]).status_code == 413
    chunked = client.post("/v1/completions", content=(b"a" * 5000 for _ in range(8)))
    assert chunked.status_code == 413
    assert client.post("/v1/completions", content=b"{").status_code == 400
    form = client.post("/v1/completions", content=b'{"model": "tiny", "prompt": "ice"}')
    assert (form.status_code, "send Content-Type: application/json" in form.text) == (400, True)
    assert client.post("/nowhere", content=b"a").status_code == 404
    assert client.post("/health", content=b"a").status_code == 405
    wrong = client.delete("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"], "error" in wrong.json()) == (405, "GET", True)
    assert client.get("/nowhere").json()["error"]["message"] == "GET /nowhere: Not Found"
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    base = str(served.base_url).removesuffix("/v1/")
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}
    assert httpx.get(f"{base}/v1/models", headers={"authorization": "bearer  sesame"}).status_code == 200
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
            model="tiny:everywhere",
            prompt="ice",
            temperature=2,
            max_tokens=200,
            logit_bias={"1": -100},  # the end, which may come by chance
        )
    for _ in range(100):
        if engine_is_free in metrics():
            break
        time.sleep(0.05)
    assert engine_is_free in metrics()


@pytest.mark.parametrize("cache_type", ["auto", "int8"])
def test_requests_share_the_memory_for_kv_caches(device_folder, model, cache_type):
    room = 48
    token = model.graph.token_bytes // (4 if cache_type == "int8" else 1)
    settings = ServerSettings("tiny", slots=4, hosts=("*",), cache_budget=room * token, cache_type=cache_type)
    with TestClient(create_app(device_folder / "export", None, settings, "cpu")) as client:

        def answer(prompt):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 200, "temperature": 0}
            body["logit_bias"] = {"1": -100}
            return client.post("/v1/completions", json=body)

        prompts = [[5, 80, 33 + number] for number in range(6)]
        alone = [answer(prompt).json() for prompt in prompts]
        with ThreadPoolExecutor(6) as threads:
            together = [found.json() for found in threads.map(answer, prompts)]
        assert [found["choices"] for found in together] == [found["choices"] for found in alone]
        assert {found["usage"]["completion_tokens"] for found in together} == {room - 3}
        refused = answer([5] * room)
        assert refused.status_code == 400
        assert "the memory for KV caches holds 48" in refused.json()["error"]["message"]
        assert answer([5] * (room - 1)).status_code == 200


@pytest.mark.parametrize(("slots", "queue"), [(2, 0), (1, 1), (1, 0)])
def test_what_neither_runs_nor_may_wait_is_told_when_to_come_back(device_folder, slots, queue):
    settings = ServerSettings("tiny", slots=slots, queue_limit=queue, hosts=("*",))
    app = create_app(device_folder / "export", None, settings, "cpu")
    inside, go_on = threading.Semaphore(0), threading.Event()
    submit = app.state.served.engine.submit

    def wait(*arguments):
        inside.release()
        assert go_on.wait(30)
        return submit(*arguments)

    app.state.served.engine.submit = wait
    with TestClient(app) as client, ThreadPoolExecutor(4) as threads:
        accepted = [threads.submit(ask, client) for _ in range(slots + queue)]
        for _ in accepted:
            assert inside.acquire(timeout=30)
        answer = ask(client)
        assert client.get("/health").status_code == 200
        go_on.set()
        assert [one.result().status_code for one in accepted] == [200] * (slots + queue)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (
            "rate_limit_error",
            "queue_full",
        )
        assert ask(client).status_code == 200
        assert ask(client, model="tiny:first").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_choices_beyond_the_queue_follow_as_slots_free_up(device_folder, stream):
    settings = ServerSettings("tiny", slots=2, queue_limit=0, hosts=("*",))
    app = create_app(device_folder / "export", None, settings, "cpu")
    engine, most = app.state.served.engine, 0
    submit = engine.submit

    def watch(*arguments):
        nonlocal most
        most = max(most, engine.running + engine.waiting + 1)
        return submit(*arguments)

    engine.submit = watch
    with TestClient(app) as client:
        prompts = [f"ice {i}" for i in range(16)]
        answer = ask(client, "/v1/completions", prompt=prompts, n=16, max_tokens=1, seed=3, stream=stream)
        assert answer.status_code == 200
        if stream:
            ends = [
                c["index"] for event in events(answer.text) for c in event["choices"] if c["finish_reason"]
            ]
            assert sorted(ends) == list(range(256))
        else:
            assert [choice["index"] for choice in answer.json()["choices"]] == list(range(256))
            assert answer.json()["usage"]["completion_tokens"] <= 256
    assert most <= 4


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


HOSTS = {
    "localhost": True,
    "LocalHost.:8080": True,
    "127.0.0.1:80": True,
    "[::1]": True,
    "[::1]:8080": True,
    "[0:0::0001]:8080": True,
    "[::1": False,
    "::1": False,
    "[::2]": False,
    "localhost.evil.example": False,
    "evil.example:8080": False,
    "localhost@evil.example": False,
    "[localhost]": False,
    "": False,
    "é": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_that_are_answered(host):
    with (
        contextlib.nullcontext()
        if HOSTS[host]
        else pytest.raises(ApiError, match="does not answer for the host")
    ):
        check_host(host.encode("latin-1"), LOOPBACK)
    check_host(host.encode("latin-1"), ("*",))


def test_pages_of_an_allowed_origin_may_send_what_openais_client_sends(device_folder):
    settings = ServerSettings(
        "tiny", api_key="k", hosts=("testserver",), cors_origins=("http://localhost:5173",)
    )
    app = create_app(device_folder / "export", None, settings, "cpu")
    with TestClient(app) as client:
        asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
        ask_first = {"access-control-request-method": "POST", "access-control-request-headers": asked}
        answer = client.options(
            "/v1/chat/completions", headers={"origin": "http://localhost:5173", **ask_first}
        )
        assert answer.status_code == 200
        allowed = answer.headers["access-control-allow-headers"].replace(" ", "").split(",")
        assert set(asked.split(",")) <= set(allowed)
        other = client.options("/v1/chat/completions", headers={"origin": "http://evil.example", **ask_first})
        assert "access-control-allow-origin" not in other.headers
        refused = client.get("/v1/models", headers={"origin": "http://localhost:5173"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (
            401,
            "http://localhost:5173",
        )


def test_models_whose_names_have_slashes(device_folder):
    settings = ServerSettings("org/tiny", hosts=("*",))
    with TestClient(create_app(device_folder / "export", None, settings, "cpu")) as client:
        assert client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"
        assert client.get("/v1/models/org%2Ftiny").json()["id"] == "org/tiny"
        for name in ("org", "tiny", "org/tiny/", "org/tiny:first", "%00%ff", "../health"):
            missing = client.get(f"/v1/models/{name}")
            assert missing.status_code in (404, 200 if name == "../health" else 404)


def test_null_is_unset_everywhere(client):
    nulls = dict.fromkeys(
        ("stop", "n", "seed", "logprobs", "top_logprobs", "stream", "tools", "adapters", "metadata")
    )
    message = {
        "role": "user",
        "content": "Who are you?",
        "name": None,
        "tool_calls": None,
        "refusal": None,
        "audio": None,
    }
    found = ask(client, messages=[message], stream_options={"include_usage": None}, **nulls)
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == ask(client).json()["choices"]


def test_prompts_over_the_context_have_openais_code(client, model):
    for path, fields in (
        ("/v1/completions", {"prompt": "a " * 600}),
        ("/v1/completions", {"prompt": [5] * 256}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 600}]}),
    ):
        answer = ask(client, path, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["message"].startswith(
            "This model's maximum context length is 256 tokens. However, your "
        )


def test_long_texts_are_not_tokenised_to_their_end(client, model, monkeypatch):
    lengths = []

    class Watched:
        def __getattr__(self, name):
            return getattr(model.prompts.tokenizer, name)

        def encode_batch_fast(self, texts, **options):
            lengths.extend(map(len, texts))
            return model.prompts.tokenizer.encode_batch_fast(texts, **options)

    for text in ("a " * 100_000, " " * 100_000 + "a" * 100_000):
        with pytest.raises(ApiError, match="resulted in at least"):
            prompt_tokens.tokens_of(Watched(), text, True, 256, "prompt")
        assert max(lengths) < len(text)
    for text in ("a " * 2000, "ice" * 200, "é" * 700):
        expected = model.prompts.tokenizer.encode(text).ids
        assert prompt_tokens.tokens_of(Watched(), text, True, len(expected), "prompt") == expected


def test_a_model_without_a_template_names_the_other_route(device_folder, tmp_path):
    shutil.copytree(device_folder / "export", tmp_path / "export")
    (tmp_path / "export/chat_template.jinja").unlink(missing_ok=True)
    config = tmp_path / "export/tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields.pop("chat_template", None)
    config.write_text(json.dumps(fields))
    settings = ServerSettings("tiny", hosts=("*",))
    with TestClient(create_app(tmp_path / "export", None, settings, "cpu")) as client:
        refused = ask(client)
        assert (refused.status_code, "use /v1/completions" in refused.text) == (400, True)
        assert ask(client, "/v1/completions", prompt="ice").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_and_bytes_belong_to_the_text(client, stream):
    """The tiny model's answers are full of halves of characters."""
    seen = 0
    for seed in range(8):
        fields = {
            "prompt": "ice",
            "logprobs": 5,
            "max_tokens": 24,
            "temperature": 2,
            "seed": seed,
            "stream": stream,
        }
        answer = ask(client, "/v1/completions", **fields)
        choices = (
            [c for event in events(answer.text) for c in event["choices"]]
            if stream
            else answer.json()["choices"]
        )
        text = "".join(choice["text"] for choice in choices)
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        tokens = [token for part in parts for token in part["tokens"]]
        offsets = [offset for part in parts for offset in part["text_offset"]]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0
        assert max(offsets) <= len(text)
        assert all(len(top) == 5 for part in parts for top in part["top_logprobs"])
        for token, offset in zip(tokens, offsets, strict=True):
            if (
                not token.startswith("bytes:")
                and not token.startswith("<|")
                and "\ufffd" not in text[:offset]
            ):
                assert text[offset:].startswith(token) or offset == len(text)
        seen += sum(token.startswith("bytes:\\x") for token in tokens)
        if not stream:
            chat = ask(client, logprobs=True, top_logprobs=3, temperature=2, seed=seed, max_tokens=24).json()[
                "choices"
            ][0]
            content = chat["logprobs"]["content"]
            whole = bytes(
                byte for entry in content if not entry["token"].startswith("<|") for byte in entry["bytes"]
            )
            assert whole.decode(errors="replace").startswith(chat["message"]["content"].rstrip("\ufffd"))
    assert seen > 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields", [{"temperature": 0, "logprobs": 2}, {"temperature": 1}, {"temperature": 1e-46}]
)
def test_numbers_that_are_none_are_refused_in_valid_json(client, stream, fields):
    mix = {} if fields["temperature"] == 1e-46 else {"adapters": {"everywhere": 1e30}}
    answer = ask(client, "/v1/completions", prompt="ice", stream=stream, **mix, **fields)
    assert answer.status_code in ((200,) if stream else (400,) if mix else (200, 400)), answer.text
    lines = (
        [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        if stream
        else [answer.text]
    )

    def refuse(text):
        raise AssertionError(text)

    found = [json.loads(line, parse_constant=refuse) for line in lines if line != "[DONE]"]
    if mix:
        assert "finite" in found[-1]["error"]["message"]


def test_every_answer_is_counted(device_folder):
    settings = ServerSettings("tiny", api_key="k", hosts=("testserver",), max_body=1000)
    app = create_app(device_folder / "export", None, settings, "cpu")

    def counted(path, status):
        return app.state.metrics.registry.get_sample_value(
            "reft_edge_requests_total", {"path": path, "status": str(status)}
        )

    key = {"authorization": "Bearer k"}
    with TestClient(app, headers=key) as client:
        assert client.get("/nowhere").status_code == 404
        assert counted("other", 404) == 1
        assert client.post("/v1/completions", content=b"a" * 2000).status_code == 413
        assert counted("/v1/completions", 413) == 1
        assert client.get("/v1/models", headers={"authorization": "x"}).status_code == 401
        assert counted("/v1/models", 401) == 1
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        assert counted("/health", 400) == 1
        assert client.put("/health").status_code == 405
        assert counted("/health", 405) == 1
        assert client.post("/v1/completions", json={}).status_code == 400
        assert counted("/v1/completions", 400) == 1


def test_what_nobody_foresaw_is_one_line_in_the_log_without_the_clients_text(device_folder, caplog, capfd):
    settings = ServerSettings("tiny", hosts=("*",))
    app = create_app(device_folder / "export", None, settings, "cpu")

    def fail(text):
        raise RuntimeError(f"cannot handle {text}")

    app.state.served.adapter_of = fail
    with TestClient(app) as client:
        answer = ask(client, model="tiny:secret")
        assert answer.status_code == 500
        assert answer.json()["error"] == {
            "message": "the server failed; its log says where",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
        assert client.get("/health").status_code == 200
        assert 'path="/v1/chat/completions",status="500"} 1.0' in client.get("/metrics").text
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "RuntimeError at " in line
    assert "secret" not in line + "".join(capfd.readouterr())
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (NoMemoryError("no room for 50 MB of keys and values"), 503, "no_memory"),
        (ReftEdgeError("adapter 'memory' cannot allocate attention"), 400, "generation_failed"),
        (ReftEdgeError("cannot choose a token"), 400, "generation_failed"),
    ],
)
def test_a_row_that_ends_in_an_error_ends_its_own_request_only(device_folder, failure, status, code, stream):
    app = create_app(device_folder / "export", None, ServerSettings("tiny", hosts=("*",)), "cpu")
    submit = app.state.served.engine.submit

    def fail(request, deliver):
        ticket = submit(request, lambda _piece: None)
        deliver(Piece("a"))
        deliver(Piece("", finish_reason="error", error=failure))
        return ticket

    with TestClient(app) as client:
        app.state.served.engine.submit = fail
        answer = ask(client, stream=stream)
        if stream:
            error = json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))["error"]
        else:
            error = answer.json()["error"]
        assert answer.status_code == (200 if stream else status)
        assert (error["message"], error["code"]) == (str(failure), code)
        app.state.served.engine.submit = submit
        assert ask(client).status_code == 200


@pytest.mark.parametrize("failure", [MemoryError(), NoMemoryError("no room for these weights")])
def test_no_memory_left_is_told_as_such(device_folder, failure):
    app = create_app(device_folder / "export", None, ServerSettings("tiny", hosts=("*",)), "cpu")
    submit = app.state.served.engine.submit

    def fail(*_):
        raise failure

    with TestClient(app) as client:
        app.state.served.engine.submit = fail
        answer = ask(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_memory")
        app.state.served.engine.submit = submit
        assert ask(client).status_code == 200


BLOCKED = [
    ("reft_edge.runtime.serving.served.parse", "/v1/completions", {"prompt": "ice"}),
    ("reft_edge.runtime.serving.served.read_body", "/v1/completions", {"prompt": "ice"}),
    ("reft_edge.runtime.serving.completions.encoded", "/v1/completions", {"prompt": "ice"}),
    ("reft_edge.model.prompts.Prompts.render", "/v1/chat/completions", {"messages": CHAT}),
    ("reft_edge.runtime.model.load_verified", "/v1/completions", {"prompt": "ice", "model": "tiny:first"}),
    ("reft_edge.runtime.model.SteeredModel.prepare", "/v1/completions", {"prompt": "ice"}),
    ("reft_edge.runtime.serving.choices._written", "/v1/completions", {"prompt": "ice"}),
    ("reft_edge.model.prompts.token_limit", "/v1/completions", {"prompt": "ice", "logit_bias": {"5": 1}}),
    ("reft_edge.adapter.file._read_header", "/v1/completions", {"prompt": "ice", "model": "tiny:first"}),
    ("reft_edge.runtime.model.fold", "/v1/completions", {"prompt": "ice", "model": "tiny:first"}),
    ("reft_edge.runtime.tool_use.ToolUse.render", "/tokenize", {"messages": CHAT}),
    ("reft_edge.model.prompts.Prompts.decode", "/detokenize", {"tokens": [5]}),
    ("reft_edge.runtime.adapter_folder.AdapterFolder.names", "/v1/models", None),
    ("reft_edge.runtime.adapter_folder.AdapterFolder.has", "/v1/models/tiny:first", None),
]


@pytest.mark.parametrize(("place", "path", "fields"), BLOCKED, ids=[place for place, *_ in BLOCKED])
def test_others_are_answered_while_a_request_is_prepared(
    device_folder, adapters, monkeypatch, place, path, fields
):
    app = create_app(device_folder / "export", adapters, ServerSettings("tiny", hosts=("*",)), "cpu")
    begun, go_on = threading.Event(), threading.Event()
    real = pkgutil.resolve_name(place)

    def wait(*arguments, **options):
        begun.set()
        assert go_on.wait(30), "the event loop waits for this"
        return real(*arguments, **options)

    with TestClient(app) as client, ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(place, wait)
        if path.startswith("/v1/"):
            slow = threads.submit(ask, client, path, **fields) if fields else threads.submit(client.get, path)
        else:
            slow = threads.submit(client.post, path, json=fields)
        assert begun.wait(30)
        assert client.get("/health").status_code == 200
        assert not slow.done()
        go_on.set()
        assert slow.result().status_code == 200


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
        many = api.embeddings.create(model="bert", input=["A", "ice", "A", "b"])
        assert (len(many.data), [entry.index for entry in many.data]) == (4, [0, 1, 2, 3])
        refused = client.post("/v1/chat/completions", json={})
        assert (refused.status_code, "is an encoder" in refused.text) == (404, True)


@pytest.fixture(scope="module")
def encoder(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    (folder / "labels.safetensors").write_bytes((device_folder / "labels.safetensors").read_bytes())
    app = create_app(device_folder / "encoder", folder, ServerSettings("bert", hosts=("*",)), "cpu")
    with TestClient(app) as client:
        yield client


def embed(client, given, **fields):
    return client.post("/v1/embeddings", json={"model": "bert", "input": given, **fields})


def vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]])


def test_embeddings_of_tokens_are_those_of_their_text(device_folder, encoder):
    tokens = Tokenizer.from_file(str(device_folder / "encoder/tokenizer.json"))
    tokens.no_padding()
    tokens.no_truncation()
    ids = [tokens.encode(text).ids for text in CLASSIFIED]
    expected = vectors(embed(encoder, CLASSIFIED))
    np.testing.assert_allclose(vectors(embed(encoder, ids)), expected, atol=1e-5)
    np.testing.assert_allclose(vectors(embed(encoder, ids[1])), expected[1:2], atol=1e-5)
    assert embed(encoder, ids).json()["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected a text"),
        ([[]], "expected a text"),
        (["a", [5]], "expected a text"),
        ([{}], "expected a text"),
        ([1.5], "expected a text"),
        ([True], "expected a text"),
        ([[5, 10**400]], "a token id is not from 0 to"),
        ([-1], "a token id is not from 0 to"),
        ([5] * 257, "This model's maximum context length is 256 tokens. However, your input resulted in 257"),
        (["A"] * 2049, "2049 texts; at most 2048 are allowed"),
    ],
)
def test_embeddings_that_are_refused(encoder, given, message):
    answer = embed(encoder, given)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text


def test_embeddings_take_as_many_texts_as_openais_and_nulls(encoder):
    assert len(vectors(embed(encoder, ["A"] * 2048, encoding_format="float"))) == 2048
    assert embed(encoder, "A", dimensions=None, user=None, encoding_format=None).status_code == 200
    assert "vectors have 64" in embed(encoder, "A", dimensions=32).json()["error"]["message"]
    assert embed(encoder, "A", dimensions=64).status_code == 200


def test_others_come_between_the_batches_of_a_long_request(device_folder):
    app = create_app(device_folder / "encoder", None, ServerSettings("bert", hosts=("*",)), "cpu")
    model, order, first = app.state.served.model, [], threading.Event()
    go_on, run = threading.Event(), model.embed

    def watched(texts, adapter=None):
        order.append(len(texts))
        first.set()
        assert go_on.wait(30)
        return run(texts, adapter)

    model.embed = watched
    with TestClient(app) as client, ThreadPoolExecutor(2) as threads:
        long = threads.submit(embed, client, ["A"] * 320)
        assert first.wait(30)
        short = threads.submit(embed, client, ["B"])
        while not app.state.served.turn._waiters:
            time.sleep(0.01)
        assert client.get("/health").status_code == 200
        go_on.set()
        assert (len(vectors(long.result())), len(vectors(short.result()))) == (320, 1)
    assert order.index(1) <= 2


def test_encoders_have_a_bounded_queue(device_folder):
    settings = ServerSettings("bert", slots=1, queue_limit=1, hosts=("*",))
    app = create_app(device_folder / "encoder", None, settings, "cpu")
    inside, go_on = threading.Semaphore(0), threading.Event()
    read = app.state.served.read

    async def wait(*arguments):
        inside.release()
        await asyncio.to_thread(go_on.wait, 30)
        return await read(*arguments)

    app.state.served.read = wait
    with TestClient(app) as client, ThreadPoolExecutor(2) as threads:
        accepted = [threads.submit(embed, client, "A") for _ in range(2)]
        for _ in accepted:
            assert inside.acquire(timeout=30)
        assert embed(client, "A").status_code == 429
        go_on.set()
        assert [one.result().status_code for one in accepted] == [200, 200]
        assert embed(client, "A").status_code == 200


def test_adapters_that_break_an_encoder_are_refused(device_folder, tmp_path):
    adapter = load_adapter(device_folder / "labels.safetensors")
    tensors = {name: tensor * np.float32(1e30) for name, tensor in adapter.tensors.items()}
    save_adapter(Adapter(adapter.config, tensors), tmp_path / "huge.safetensors")
    app = create_app(device_folder / "encoder", tmp_path, ServerSettings("bert", hosts=("*",)), "cpu")
    with TestClient(app) as client:
        for path in ("/v1/embeddings", "/v1/classify"):
            answer = client.post(path, json={"model": "bert:huge", "input": "A"})
            assert (answer.status_code, "finite" in answer.text) == (400, True), answer.text


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
        (["--name", "a\udcff"], "cannot be shown"),
        (["--name", "a\nb"], "cannot be shown"),
        (["--max-inputs", "0"], "max-inputs"),
        (["--adapter-memory", "0"], "adapter-memory"),
        (["--cache-memory", "0"], "cache-memory"),
        (["--cache-type", "int2"], "unknown type of cache 'int2'; choose one of auto, int8"),
    ],
)
def test_the_command_refuses(device_folder, options, message):
    result = CliRunner().invoke(cli, ["serve", str(device_folder / "export"), *options])
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("key", ["\udcff", "a\nb", "é"])
def test_keys_that_no_client_can_send_are_refused(device_folder, monkeypatch, key):
    monkeypatch.setattr("os.environ", {**os.environ, "REFT_EDGE_API_KEY": key})
    result = CliRunner().invoke(cli, ["serve", str(device_folder / "export")])
    assert (result.exit_code, "REFT_EDGE_API_KEY holds no API key" in result.stderr) == (1, True)
