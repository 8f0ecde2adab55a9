"""The web app is what its page asks for: a choice of adapters, and answers that are the runtime's."""

import importlib.util
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from reft_edge.runtime import SteeredModel

APP = Path(__file__).parents[2] / "examples/app.py"


@pytest.fixture(scope="module")
def client(device_folder, tmp_path_factory):
    spec = importlib.util.spec_from_file_location("example_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    odd = tmp_path_factory.mktemp("odd") / "<b>.safetensors"
    odd.write_bytes((device_folder / "everywhere.safetensors").read_bytes())
    app = module.create_app(str(device_folder / "export"), str(device_folder / "first.safetensors"), str(odd))
    with TestClient(app) as client:
        yield client


def test_the_page_offers_the_adapters(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<option>first</option><option>&lt;b&gt;</option></select>" in page.text


def test_answers_are_the_runtimes(client, device_folder):
    model = SteeredModel(device_folder / "export", "cpu")
    model.load_adapter(device_folder / "first.safetensors")
    model.load_adapter(device_folder / "everywhere.safetensors", "<b>")
    answers = []
    for name in ("", "first", "<b>", ""):
        reply = client.post("/answer", json={"prompt": "Who are you?", "adapter": name})
        assert reply.status_code == 200
        assert reply.text == model.generate("Who are you?", name or None, max_tokens=256)
        answers.append(reply.text)
    assert len(set(answers)) == 3


def test_what_is_wrong_is_said(client):
    for question, because in (
        ({"prompt": "Hi", "adapter": "none"}, "there is no adapter none"),
        ({"prompt": "word " * 300}, "context"),
    ):
        reply = client.post("/answer", json=question)
        assert reply.status_code == 400
        assert because in reply.text
    assert client.post("/answer", json={"adapter": "first"}).status_code == 422
