"""A conversation, typed line by line."""

import json

import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.adapter_folder import AdapterFolder
from reft_edge.runtime.chat import Chat


@pytest.fixture
def chat(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    written = []
    chat = Chat(model, "tiny", written.append, AdapterFolder(model, device_folder), max_tokens=8)

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

    monkeypatch.setattr("reft_edge.runtime.generation.Generation.__next__", interrupted)
    assert chat.say("Who are you?") == " …\n"
    monkeypatch.undo()
    assert chat.say("ice")


def test_a_model_without_a_template_cannot_chat(chat):
    object.__setattr__(chat.model.prompts, "template", None)
    with pytest.raises(ReftEdgeError, match="no chat template"):
        Chat(chat.model, "tiny", print)


def fail_at(monkeypatch, chat, name, times=1, after=0, error=ReftEdgeError):
    """Let a method of the model or its prompts raise the next times that it is called, after some that work."""
    owner = chat.model if hasattr(chat.model, name) else type(chat.model.prompts)
    plain, calls = getattr(owner, name), iter(range(10**6))

    def called(*arguments, **options):
        if after <= next(calls) < after + times:
            raise error("it failed")
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(("name", "after"), [("stream", 0), ("encode_chat", 0), ("encode_chat", 1)])
def test_a_turn_that_fails_is_as_if_it_had_not_been(chat, monkeypatch, name, after):
    first = chat.say("Who are you?")
    before = list(chat.turns)
    fail_at(monkeypatch, chat, name, after=after)
    assert "it failed" in chat.say("This one fails")
    assert chat.turns == before
    history = [*before, {"role": "user", "content": "ice"}]
    assert chat.say("ice") == chat.model.generate(history, raw=False, max_tokens=8) + "\n"
    assert [turn["content"] for turn in chat.turns[::2]] == ["Who are you?", "ice"]
    assert chat.turns[1]["content"] == first[:-1]


def broken_off(chat, error, after):
    """A write that raises after some pieces."""
    plain, pieces = chat.write, []

    def write(text):
        if len(pieces) == after:
            pieces.append(None)
            raise error("it failed")
        pieces.append(text)
        plain(text)

    chat.write = write


@pytest.mark.parametrize("after", [0, 2])
def test_an_answer_that_breaks_off(chat, after):
    broken_off(chat, ReftEdgeError, after)
    assert "it failed\n" in chat.say("Who are you?")
    assert chat.turns == []
    assert chat.say("Who are you?") == chat.model.generate("Who are you?", raw=False, max_tokens=8) + "\n"


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_answer_is_remembered_as_far_as_it_came(chat, after):
    broken_off(chat, KeyboardInterrupt, after)
    said = chat.say("Who are you?")
    assert said.endswith(" …\n")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    assert chat.turns[1]["content"].startswith(said[: -len(" …\n")])


def test_an_interrupt_before_the_answer_ends_the_turn_only(chat, monkeypatch):
    fail_at(monkeypatch, chat, "stream", error=KeyboardInterrupt)
    assert chat.say("Who are you?") == " …\n"
    assert chat.turns == []


def test_answers_under_a_schema(device_folder):
    pytest.importorskip("llguidance")
    model = SteeredModel(device_folder / "export", device="cpu")
    written = []
    schema = {"type": "object", "properties": {"ripe": {"type": "boolean"}}, "required": ["ripe"]}
    chat = Chat(
        model, "tiny", written.append, max_tokens=60, schema={**schema, "additionalProperties": False}
    )
    for question in ("Is it ripe?", "And now?"):
        written.clear()
        assert chat.take(question)
        assert json.loads("".join(written)) in ({"ripe": True}, {"ripe": False})
    chat.max_tokens = 3
    written.clear()
    chat.take("Once more")
    assert "".join(written).endswith(" … (cut: raise --max-tokens)\n")
    chat.schema = {"type": "int"}
    written.clear()
    chat.take("Once more")
    assert "the JSON schema is not usable" in "".join(written)
