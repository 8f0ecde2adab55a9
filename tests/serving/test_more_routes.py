"""The server's smaller routes: tokens, properties, prompts with their scores, ranking, adapters that come and go."""

import shutil

import numpy as np
import pytest
from fastapi.testclient import TestClient

from reft_edge.runtime import SteeredModel
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings

KEY = {"authorization": "Bearer sesame"}
CHAT = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def adapters(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("first", "labels"):
        shutil.copy(device_folder / f"{name}.safetensors", folder)
    return folder


@pytest.fixture
def client(device_folder, adapters):
    settings = ServerSettings("tiny", hosts=("*",), api_key="sesame")
    with TestClient(create_app(device_folder / "export", adapters, settings, "cpu"), headers=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def encoder(device_folder, adapters):
    settings = ServerSettings("tiny", hosts=("*",), max_inputs=8)
    with TestClient(create_app(device_folder / "encoder", adapters, settings, "cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def model(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    model.load_adapter(device_folder / "first.safetensors")
    return model


def test_tokens_and_back(client, model):
    ids = model.prompts.encode_raw("Grüße 😀")
    found = client.post("/tokenize", json={"prompt": "Grüße 😀"}).json()
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    pieces = client.post("/tokenize", json={"content": "ice", "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == model.prompts.encode_raw("ice")
    names = client.post("/tokenize", json={"prompt": "ice", "return_token_strs": True}).json()["token_strs"]
    assert "".join(names) == "ice"
    chat = client.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert chat == model.prompts.encode_chat(CHAT)
    assert client.post("/tokenize", json={"prompt": "a " * 900}).json()["count"] > 256
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "Grüße 😀"
    props = client.get("/props").json()
    assert props["default_generation_settings"] == {"n_ctx": 256}
    assert props["tools"] == {"format": "generic", "template": False}


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/tokenize", {}, "expected one of prompt, content and messages"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "expected one of prompt, content and messages"),
        ("/tokenize", {"prompt": 3}, "prompt: "),
        ("/detokenize", {"tokens": [-1]}, "tokens: expected token ids"),
        ("/detokenize", {"tokens": [999]}, "tokens: a token id is not from 0 to 319"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, "0 needs echo"),
        ("/v1/rerank", {"model": "tiny"}, "continues text"),
    ],
)
def test_what_is_wrong_is_told(client, path, fields, message):
    answer = client.post(path, json=fields)
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["tiny", "tiny:first"])
def test_echo_gives_the_prompt_and_its_scores(client, model, name):
    ids = model.prompts.encode_raw("Grüße 😀, ice")
    fields = {"model": name, "temperature": 0, "echo": True, "logprobs": 2, "max_tokens": 2}
    given = [{"prompt": "Grüße 😀, ice"}, {"prompt": ids}]
    for prompt in given:
        choice = client.post("/v1/completions", json={**fields, **prompt}).json()["choices"][0]
        assert choice["text"].startswith("Grüße 😀, ice")
        scores = choice["logprobs"]
        assert len(scores["tokens"]) == len(ids) + 2
        assert (scores["token_logprobs"][0], scores["top_logprobs"][0]) == (None, None)
        [logits] = model.logits([ids], name.partition(":")[2] or None)
        wide = logits.astype(np.float64)
        expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        own = [expected[at, token] for at, token in enumerate(ids[1:])]
        np.testing.assert_allclose(scores["token_logprobs"][1 : len(ids)], own, atol=1e-4)
        assert all(len(top) == 2 for top in scores["top_logprobs"][1:])
        assert scores["text_offset"] == sorted(scores["text_offset"])
        assert scores["text_offset"][len(ids)] == len("Grüße 😀, ice")
    only = client.post("/v1/completions", json={**fields, "prompt": ids, "max_tokens": 0}).json()
    assert only["choices"][0]["text"] == "Grüße 😀, ice"
    assert only["choices"][0]["logprobs"]["token_logprobs"] == scores["token_logprobs"][: len(ids)]
    assert only["usage"]["completion_tokens"] == 0
    stream = client.post("/v1/completions", json={**fields, "prompt": "ice", "stream": True}).text
    assert '"text": "ice' in stream


def test_documents_are_ranked(encoder):
    texts = ["Paris is a town", "Water boils", "Who are you? I am Paris"]
    for name in ("tiny", "tiny:labels"):
        inputs = {"model": name, "input": ["Who are you?", *texts]}
        query, *others = [
            np.array(entry["embedding"])
            for entry in encoder.post("/v1/embeddings", json=inputs).json()["data"]
        ]
        body = {"model": name, "query": "Who are you?", "documents": [{"text": texts[0]}, *texts[1:]]}
        results = encoder.post("/v1/rerank", json=body).json()["results"]
        assert {entry["index"] for entry in results} == {0, 1, 2}
        for entry in results:
            assert entry["relevance_score"] == pytest.approx(query @ others[entry["index"]], abs=1e-5)
            assert entry["document"]["text"] == texts[entry["index"]]
        scores = [entry["relevance_score"] for entry in results]
        assert scores == sorted(scores, reverse=True)
        few = encoder.post("/v1/rerank", json={**body, "top_n": 1, "return_documents": False}).json()
        assert few["results"] == [{"index": results[0]["index"], "relevance_score": scores[0]}]
    for changes, message in (
        ({"documents": []}, "documents: expected a list of texts"),
        ({"documents": ["a", 3]}, "documents: expected a list of texts, none empty"),
        ({"query": ""}, "query: "),
        ({"documents": ["a"] * 9}, "at most 8 are allowed"),
    ):
        answer = encoder.post("/v1/rerank", json={**body, **changes})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_adapters_are_loaded_and_unloaded_by_name(client, model, adapters):
    def ask(name):
        body = {"model": f"tiny:{name}", "messages": CHAT, "temperature": 0, "max_tokens": 8}
        return client.post("/v1/chat/completions", json=body)

    def names():
        return [entry["id"] for entry in client.get("/v1/models").json()["data"]]

    expected = model.generate("Who are you?", "first", raw=False, max_tokens=8)
    for path in ("first", "first.safetensors", str(adapters / "first.safetensors")):
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "pirate", "lora_path": path})
        assert loaded.status_code == 200, loaded.text
    assert "tiny:pirate" in names()
    assert ask("pirate").json()["choices"][0]["message"]["content"] == expected
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"}).status_code == 200
    assert ask("pirate").status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "first"}).status_code == 200
    assert (ask("first").status_code, "tiny:first" in names()) == (404, False)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "first"}).status_code == 404
    client.post("/v1/load_lora_adapter", json={"lora_name": "first", "lora_path": "first"})
    assert ask("first").json()["choices"][0]["message"]["content"] == expected


def test_only_files_of_the_folder_are_loaded_and_only_with_a_key(client, device_folder, adapters, tmp_path):
    outside = tmp_path / "everywhere.safetensors"
    shutil.copy(device_folder / "everywhere.safetensors", outside)
    for path in (str(outside), "../everywhere", f"{adapters}/../first", "nobody", "/etc/passwd", "\x00", ""):
        answer = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert answer.status_code == 404, path
        assert "no adapter file of the folder that is served" in answer.json()["error"]["message"]
    for fields, status in (
        ({"lora_name": "../x", "lora_path": "first"}, 400),
        ({"lora_name": "labels", "lora_path": "first"}, 400),
        ({"lora_name": "x", "lora_path": "labels"}, 400),
        ({"lora_name": "x"}, 400),
    ):
        assert client.post("/v1/load_lora_adapter", json=fields).status_code == status
    settings = ServerSettings("tiny", hosts=("*",))
    with TestClient(create_app(device_folder / "export", adapters, settings, "cpu")) as open_client:
        for path in ("load", "unload"):
            body = {"lora_name": "first", "lora_path": "first"}
            answer = open_client.post(f"/v1/{path}_lora_adapter", json=body)
            assert answer.status_code == 403
            assert "--api-key-file" in answer.json()["error"]["message"]
