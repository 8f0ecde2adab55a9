"""A conversation, typed line by line."""

import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.chat import Chat
from reft_edge.runtime.store import AdapterStore


@pytest.fixture
def chat(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    written = []
    chat = Chat(model, "tiny", written.append, AdapterStore(model, device_folder), max_tokens=8)

    def say(line):
        written.clear()
        assert chat.take(line)
        return "".join(written)

    chat.say = say
    return chat


def test_turns_are_remembered_and_answered_as_the_model_would(chat):
    first = chat.say("Who are you?")
    assert first == chat.model.generate("Who are you?", raw=False, max_tokens=8) + "\n"
    second = chat.say("ice")
    history = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": first[:-1]},
        {"role": "user", "content": "ice"},
    ]
    assert second == chat.model.generate(history, raw=False, max_tokens=8) + "\n"
    chat.say("/clear")
    assert chat.say("Who are you?") == first


def test_the_switch_of_adapters_shows_at_once(chat):
    assert chat.prompt == "tiny> "
    base = chat.say("Who are you?")
    chat.say("/clear")
    assert chat.say("/adapter everywhere:0.5 first") == ""
    assert chat.prompt == "tiny + everywhere:0.5 + first> "
    expected = chat.model.generate("Who are you?", {"everywhere": 0.5, "first": 1.0}, raw=False, max_tokens=8)
    assert chat.say("Who are you?") == expected + "\n" != base
    listed = chat.say("/adapters")
    assert "* everywhere\n* first\n" in listed
    assert "  labels\n" in listed
    chat.say("/clear")
    chat.say("/base")
    assert chat.prompt == "tiny> "
    assert chat.say("Who are you?") == base


def test_mistakes_are_named_and_change_nothing(chat):
    chat.say("/adapter first")
    assert "there is no adapter 'nobody'" in chat.say("/adapter nobody")
    assert "is no number" in chat.say("/adapter first:much")
    assert "/help lists them" in chat.say("/dance")
    assert "classifies texts" in chat.say("/adapter labels") or "another base" in chat.say("/adapter labels")
    assert chat.prompt == "tiny + first> "
    assert "there was no answer yet" in chat.say("/stats")
    assert "context is 256: shorten it" in chat.say("word " * 300)
    assert chat.turns == []
    assert chat.say("") == ""


def test_the_system_prompt_and_stats(chat):
    chat.say("/system Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ice"}]
    assert chat.say("ice") == chat.model.generate(messages, raw=False, max_tokens=8) + "\n"
    assert "of 256 tokens" in chat.say("/stats")
    assert "/adapter NAME" in chat.say("/help")
    assert not chat.take("/quit")


def test_the_oldest_turns_go_when_the_context_is_full(chat):
    texts = [chat.say(f"{i} Water boils when it is hot; ice melts") for i in range(8)]
    assert any("the oldest 1 of the turns went" in text for text in texts)
    assert chat.turns[0]["role"] == "user"
    assert not any("shorten" in text for text in texts)


def test_interrupting_an_answer_keeps_the_conversation(chat, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("reft_edge.runtime.model.Generation.__next__", interrupted)
    assert chat.say("Who are you?") == " …\n"
    monkeypatch.undo()
    assert chat.say("ice")


def test_a_model_without_a_template_cannot_chat(chat):
    object.__setattr__(chat.model.prompts, "template", None)
    with pytest.raises(ReftEdgeError, match="no chat template"):
        Chat(chat.model, "tiny", print)
