"""Prompts that a server takes over from the one before."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings

SYSTEM = (
    "The quick brown fox jumps over the lazy dog. Water boils when it is hot; ice melts when it is warm. " * 5
)


def test_a_server_takes_its_prompts_over_and_an_encoder_has_none(device_folder, tmp_path):
    fields = {"model": "tiny", "prompt": SYSTEM, "max_tokens": 6, "temperature": 0}
    answers, hits = [], []
    for _ in range(2):
        settings = ServerSettings("tiny", hosts=("*",), prompt_cache=tmp_path / "prompts")
        app = create_app(device_folder / "export", None, settings, "cpu")
        with TestClient(app) as client:
            answers.append(client.post("/v1/completions", json=fields).json()["choices"])
            hits.append(app.state.served.engine.batch.prefixes.hits)
    assert answers[0] == answers[1]
    assert hits[0] == 0 < 190 < hits[1]
    with pytest.raises(ReftEdgeError, match="a prompt cache is for decoders"):
        create_app(device_folder / "encoder", None, settings, "cpu")


def test_a_slow_disk_keeps_nobody_else_waiting(device_folder, tmp_path, monkeypatch):
    settings = ServerSettings("tiny", hosts=("*",), prompt_cache=tmp_path / "prompts")
    app = create_app(device_folder / "export", None, settings, "cpu")
    begun, go_on = threading.Event(), threading.Event()
    files = app.state.served.engine.batch.prefixes.files
    find, write = files.find, files._write

    def slow(ids, *rest):
        if len(ids) > 100:
            begun.set()
            assert go_on.wait(30), "the event loop or the engine waits for this"
        return find(ids, *rest)

    def slow_write(*given):
        assert go_on.wait(30), "the engine waits for this"
        write(*given)

    monkeypatch.setattr(files, "find", slow)
    monkeypatch.setattr(files, "_write", slow_write)
    fields = {"model": "tiny", "prompt": SYSTEM, "max_tokens": 4, "temperature": 0}
    with TestClient(app) as client, ThreadPoolExecutor(1) as threads:
        long = threads.submit(client.post, "/v1/completions", json=fields)
        assert begun.wait(30)
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={**fields, "prompt": "ice"}).status_code == 200
        assert not long.done()
        go_on.set()
        assert long.result().status_code == 200
