"""Tokenizers that fail, panic or leave gaps: a request is refused, and the next one is answered."""

import json
import shutil

import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import token_limit
from reft_edge.model.texts import TextTokens
from reft_edge.runtime import SteeredEncoder, SteeredModel, batch
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings

_GAP = 3


def words(unknown=None, listed=True):
    known = {f"w{number}": _GAP * number for number in range(100)}
    if unknown and listed:
        known[unknown] = 1
    made = Tokenizer(models.WordLevel(known, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def panicking():
    """The library's own Strip reads before the start of a token that is shorter than what it is to strip."""
    made = words("[UNK]")
    made.decoder = decoders.Strip("w", 0, 9)
    made.add_tokens(["w"])
    return made


def serve(device_folder, folder, tokenizer):
    shutil.copytree(device_folder / "export", folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return create_app(folder, None, ServerSettings("tiny", hosts=("*",)), "cpu")


def ask(client, prompt, **fields):
    return client.post(
        "/v1/completions", json={"model": "tiny", "prompt": prompt, "temperature": 0, **fields}
    )


@pytest.mark.parametrize("tokenizer", [words(), words("[UNK]", listed=False)], ids=["none", "not there"])
def test_words_without_a_token(device_folder, tmp_path, tokenizer):
    with TestClient(serve(device_folder, tmp_path / "m", tokenizer)) as client:
        refused = ask(client, "w1 what")
        assert refused.status_code == 400
        assert "tokenizer cannot take this text" in refused.json()["error"]["message"]
        assert ask(client, "w1 w2").status_code == 200


def test_a_panic_in_decoding_ends_one_request(device_folder, tmp_path, monkeypatch):
    tokenizer = panicking()
    with pytest.raises(BaseException, match="index out of bounds"):
        tokenizer.decode([tokenizer.token_to_id("w")])
    app = serve(device_folder, tmp_path / "m", tokenizer)
    with TestClient(app) as client:
        single, answers = tokenizer.token_to_id("w"), {}
        for stream in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(batch, "next_piece", lambda row, logits, eos: row.text.push(single))
                answers[stream] = ask(client, "w1", stream=stream)
        assert answers[False].status_code == 400
        for answer in answers.values():
            assert "tokenizer cannot decode these tokens" in answer.text
        assert ask(client, "w1 w2", max_tokens=1).status_code == 200
    model = SteeredModel(tmp_path / "m", device="cpu")
    with pytest.raises(ReftEdgeError, match="cannot decode"):
        model.prompts.decode([single])


def test_whatever_ends_a_step_nobody_waits_for_ever(device_folder):
    class Panic(BaseException):
        pass

    def panic():
        raise Panic("it panicked")

    app = create_app(device_folder / "export", None, ServerSettings("tiny", hosts=("*",)), "cpu")
    with TestClient(app) as client:
        batch = app.state.served.engine.batch
        step = batch.step
        batch.step = panic
        assert "it panicked" in ask(client, "ice").json()["error"]["message"]
        batch.step = step
        assert ask(client, "ice").status_code == 200


def test_ids_with_gaps_are_known_up_to_the_largest(device_folder, tmp_path):
    tokenizer = words("[UNK]")
    assert tokenizer.get_vocab_size() == 101
    assert token_limit(tokenizer) == 99 * _GAP + 1
    with TestClient(serve(device_folder, tmp_path / "m", tokenizer)) as client:
        assert ask(client, "w98 w99").status_code == 200
        text, tokens = (ask(client, prompt).json() for prompt in ("w98 w99", [98 * _GAP, 99 * _GAP]))
        assert text["choices"] == tokens["choices"]
        refused = ask(client, [5, 99 * _GAP + 1])
        assert refused.status_code == 400
        assert f"not from 0 to {99 * _GAP}" in refused.json()["error"]["message"]


def test_log_probabilities_under_regular_expressions_that_python_lacks(device_folder, tmp_path):
    path = device_folder / "export/tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = {"type": "Replace", "pattern": {"Regex": r"\p{L}|\h"}, "content": "!"}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    with TestClient(serve(device_folder, tmp_path / "m", tokenizer)) as client:
        answer = ask(client, "hi", logprobs=3, max_tokens=20)
        assert answer.status_code == 200
        choice = answer.json()["choices"][0]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert "!" in choice["text"]


@pytest.mark.parametrize("text", ["caf\udce9", ("ice", "\ud83d")])
def test_encoders_refuse_half_characters(device_folder, text):
    encoder = SteeredEncoder(device_folder / "encoder", device="cpu")
    encoder.load_adapter(device_folder / "labels.safetensors", "labels")
    with pytest.raises(ReftEdgeError, match="half of one"):
        encoder.classify([text], "labels")
    with pytest.raises(ReftEdgeError, match="half of one"):
        encoder.embed([text])
    assert encoder.classify(["ice"], "labels")


def test_encoders_refuse_what_their_tokenizer_fails_at():
    tokens = TextTokens.of(words(), 16)
    with pytest.raises(ReftEdgeError, match="tokenizer cannot take this text"):
        tokens.batch(["w1", "what"])
    assert tokens.batch(["w1 w2"])[0].ids == (_GAP, 2 * _GAP)


def test_half_characters_are_counted_in_the_users_own_text(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    with pytest.raises(ReftEdgeError, match=r"^character 4 of the text"):
        model.generate("caf\udce9", raw=False)
