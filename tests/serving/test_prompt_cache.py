"""Prompts that a server takes over from the one before."""

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
