"""Bodies of every shape: bounded before anything is made of them, and never an error that is the server's."""

import json
import re
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reft_edge.runtime.serving import bodies, chat_api, model_routes, openai_api, prompt_tokens, responses_api
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.served import ServerSettings

JSON = {"content-type": "application/json"}
KINDS = {
    "/v1/chat/completions": chat_api.ChatRequest,
    "/v1/completions": openai_api.CompletionRequest,
    "/v1/embeddings": openai_api.EmbeddingRequest,
    "/v1/classify": openai_api.ClassifyRequest,
    "/v1/rerank": openai_api.RerankRequest,
    "/v1/responses": responses_api.ResponsesRequest,
    "/tokenize": model_routes.TokenizeRequest,
}
VALID = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "ice"}],
        "max_tokens": 1,
    },
    "/v1/completions": {"model": "tiny", "prompt": "ice", "max_tokens": 1},
    "/v1/embeddings": {"model": "tiny", "input": "ice"},
    "/v1/classify": {"model": "tiny:labels", "input": ["ice", ["a", "b"]]},
    "/v1/rerank": {"model": "tiny", "query": "ice", "documents": ["a", "b"]},
    "/v1/responses": {"model": "tiny", "input": "ice", "max_output_tokens": 1},
    "/tokenize": {"prompt": "ice"},
}
ENCODED = ("/v1/embeddings", "/v1/classify", "/v1/rerank")
FIELDS = [
    (path, name) for path, kind in KINDS.items() for name in [*kind.model_fields, "functions", "unknown"]
]


@pytest.fixture(scope="module")
def clients(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("first", "labels"):
        (folder / f"{name}.safetensors").write_bytes((device_folder / f"{name}.safetensors").read_bytes())
    limits = ServerSettings("tiny", hosts=("*",))
    apps = [create_app(device_folder / kind, folder, limits, "cpu") for kind in ("export", "encoder")]
    with TestClient(apps[0]) as decoder, TestClient(apps[1]) as encoder:
        yield {path: encoder if path in ENCODED else decoder for path in KINDS}


def refuse(text):
    raise AssertionError(f"{text} is no JSON")


def check(client, path, content, headers=JSON):
    """Send a body; the answer must be in one of OpenAI's two forms, and counted."""

    def counted():
        lines = re.findall(r"^reft_edge_requests_total.* (\S+)$", client.get("/metrics").text, re.M)
        return sum(map(float, lines))

    before = counted()
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code < 500, answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        found = [
            json.loads(line[6:], parse_constant=refuse)
            for line in answer.text.split("\n\n")[:-1]
            if "[DONE]" not in line
        ]
    else:
        found = [json.loads(answer.text, parse_constant=refuse)]
    for part in found:
        if part.get("error"):
            assert set(part["error"]) == {"message", "type", "param", "code"}
            assert 0 < len(part["error"]["message"]) < 5000
    assert ("error" in found[0]) == (answer.status_code >= 400 or "error" in found[-1])
    assert counted() == before + 2
    return answer


MANY = {
    "objects": "[" + ",".join(["{}"] * 300_000) + "]",
    "lists": "[" + ",".join(["[]"] * 300_000) + "]",
    "lists of lists": "[" + ",".join(["[[1]]"] * 150_000) + "]",
    "names": "{" + ",".join(f'"{i}":1' for i in range(90_000)) + "}",
    "deep": "[" * 300_000,
    "deep and closed": "[" * 70 + "]" * 70,
    "deep objects": '{"a":' * 100_000,
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("path", KINDS)
def test_too_many_values_are_refused_before_they_are_made(clients, monkeypatch, path, kind):
    monkeypatch.setattr(bodies, "json", SimpleNamespace(loads=lambda *_, **__: pytest.fail("it was parsed")))
    for name in list(KINDS[path].model_fields)[:3]:
        content = json.dumps(VALID[path])[:-1] + f', "{name}": {MANY[kind]}}}'
        answer = clients[path].post(path, content=content, headers=JSON)
        assert answer.status_code == 400
        assert re.search(
            r"at most 16,384 are allowed|nested deeper than 64", answer.json()["error"]["message"]
        )


def test_marks_inside_of_texts_are_no_values():
    text = '{"[' * 10_000 + '\\"' + "]}:" * 10_000 + "\\\\"
    assert bodies.parse(json.dumps({"a": text, text: "b"}).encode()) == {"a": text, text: "b"}
    with pytest.raises(ApiError, match="not valid JSON"):
        bodies.parse(b'{"a": "' + b'\\"' * 400_000)


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.text(max_size=9) | st.integers() | st.booleans(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    )
)
def test_what_is_within_the_bounds_is_parsed_as_by_json(value):
    for ascii_only in (True, False):
        content = json.dumps({"a": value}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        try:
            expected = json.loads(content.decode())
            json.dumps(expected, ensure_ascii=False).encode()
        except UnicodeError:
            with pytest.raises(ApiError):
                bodies.parse(content)
        else:
            assert bodies.parse(content) == expected


ITEMS = [{}, [], "a", 1, -1.5, None, [[]], [None], {"role": 1}, {"type": "text"}, ["a", "b"], [10**9]]


def errors_of(kind, fields):
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_errors_are_few_whatever_a_field_holds(path, name):
    for item in ITEMS:
        for value in (
            [item] * 8000,
            [[item] * 8000],
            {str(i): item for i in range(8000)},
            [{str(i): item for i in range(8000)}],
        ):
            assert errors_of(KINDS[path], {**VALID[path], name: value}) <= 2


def test_prompts_are_counted_before_they_are_tokenised(clients, monkeypatch):
    monkeypatch.setattr(prompt_tokens, "tokens_of", lambda *_: pytest.fail("it was tokenised"))
    content = json.dumps({"model": "tiny", "prompt": ["a"] * 200_000})
    answer = clients["/v1/completions"].post("/v1/completions", content=content, headers=JSON)
    assert (answer.status_code, "at most 2048 are allowed" in answer.text) == (400, True)


ODD = {
    "nan": b'{"model": "tiny", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "top_p": -Infinity}',
    "too large": b'{"model": "tiny", "temperature": 1e999}',
    "many digits": b'{"seed": ' + b"9" * 100_000 + b"}",
    "half a pair": b'{"model": "\\ud800", "input": "a"}',
    "half a pair in a name": b'{"model": "tiny", "adapters": {"\\udfff": 1}}',
    "half a pair in a role": b'{"model": "tiny", "messages": [{"role": "\\uD83D", "content": "a"}]}',
    "half a pair in a stop": b'{"model": "tiny", "prompt": "a", "stop": ["\\udcff"]}',
    "half a pair as bytes": b'{"model": "\xed\xa0\x80"}',
    "no UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "not an object": b"[]",
    "a number": b"3",
    "nothing": b"",
    "cut": b'{"model": ',
    "two": b"{}{}",
    "zero byte": b"\x00",
    "name that is no field": b'{"model": "tiny", "a\\u0000\\u001b[2J": 1}',
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("path", KINDS)
def test_odd_bodies_are_refused_in_openais_form(clients, path, kind):
    assert check(clients[path], path, ODD[kind]).status_code == 400


@pytest.mark.parametrize("path", KINDS)
def test_whole_pairs_byte_order_marks_and_json_types_are_taken(clients, path):
    body = {**VALID[path], "user": "😀"}
    content = b"\xef\xbb\xbf" + json.dumps(body).encode()
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        assert check(clients[path], path, content, {"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
        "é".encode(),
    ],
)
def test_what_web_pages_may_send_without_asking_is_refused(clients, kind):
    path = "/v1/completions"
    answer = check(clients[path], path, json.dumps(VALID[path]), {"content-type": kind} if kind else {})
    assert "send Content-Type: application/json" in answer.json()["error"]["message"]


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        [
            1e-46,
            1e-320,
            0.5,
            1.0,
            "tiny",
            "tiny:first",
            "tiny:labels",
            "float",
            "base64",
            "user",
            "\0",
            "text",
        ]
    )
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "first", "include_usage", "é"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("path", KINDS)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_is_an_error_of_the_server(clients, path, data):
    names = st.sampled_from([*KINDS[path].model_fields, "functions", "logit_bias", "unknown"])
    changes = data.draw(st.dictionaries(names, junk, max_size=3))
    limit = {} if "max_tokens" not in VALID[path] else {"max_tokens": 1}
    check(clients[path], path, json.dumps({**VALID[path], **changes, **limit}))


@pytest.mark.parametrize("path", KINDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40), at=st.integers(0, 60), cut=st.integers(0, 5))
def test_no_bytes_are_an_error_of_the_server(clients, path, content, at, cut):
    whole = json.dumps(VALID[path]).encode()
    check(clients[path], path, whole[:at] + content + whole[at + cut :])
