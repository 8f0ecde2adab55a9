"""Streaming text: whole characters, and stop strings that arrive in pieces."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reft_edge.errors import ReftEdgeError
from reft_edge.prompts import Prompts, load_prompts
from reft_edge.runtime.text import TextStream


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


TOKENIZER = byte_tokenizer()


def stream(text: str, stop: list[str]) -> tuple[list[str], bool]:
    out = TextStream(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text).ids:
        pieces.append(out.push(token))
        if out.stopped:
            break
    if not out.stopped:
        pieces.append(out.flush())
    return pieces, out.stopped


@given(st.text(alphabet="aé🙂 b\n", max_size=30))
def test_pieces_join_to_the_text(text):
    pieces, stopped = stream(text, [])
    assert "".join(pieces) == text
    assert not stopped
    assert not any("\ufffd" in piece for piece in pieces)


@given(
    text=st.text(alphabet="abc", max_size=30),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_at_the_first_that_completes(text, stop):
    pieces, stopped = stream(text, stop)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    if not ends:
        assert "".join(pieces) == text
        assert not stopped
    else:
        first = min(end for end, _ in ends)
        assert "".join(pieces) == text[: min(start for end, start in ends if end == first)]
        assert stopped


def test_text_before_a_possible_stop_is_not_held_back():
    pieces, _ = stream("hello wor", ["world"])
    assert "".join(pieces[:6]) == "hello "
    assert pieces[6:] == ["", "", "", "wor"]


def template(text: str) -> Prompts:
    return Prompts(TOKENIZER, text, {"eos_token": "<end>"})


def test_templates_run_in_a_sandbox():
    messages = [{"role": "user", "content": "hi"}]
    assert (
        template("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}").render(messages)
        == "hi<end>"
    )
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ raise_exception('no system role') }}",
        "{% broken",
    ):
        with pytest.raises(ReftEdgeError, match="chat template failed"):
            template(attack).render(messages)
    assert messages == [{"role": "user", "content": "hi"}]
    with pytest.raises(ReftEdgeError, match="no chat template"):
        Prompts(TOKENIZER, None, {}).render(messages)


def test_template_helpers():
    assert template("{{ {'a': 'é'} | tojson }}").render([]) == '{"a": "é"}'
    assert len(template("{{ strftime_now('%Y') }}").render([])) == 4


def test_tokenizer_files(tmp_path: Path):
    with pytest.raises(ReftEdgeError, match=r"no tokenizer\.json"):
        load_prompts(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ReftEdgeError, match="cannot read"):
        load_prompts(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<end>"}, "chat_template": [{"name": "default", "template": "T{{ eos_token }}"}]}'
    )
    assert load_prompts(tmp_path).render([]) == "T<end>"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_prompts(tmp_path).render([]) == "J"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ReftEdgeError, match="cannot read"):
        load_prompts(tmp_path)
