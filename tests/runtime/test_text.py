"""Streaming text: whole characters, and stop strings that arrive in pieces."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Prompts, load_prompts
from reft_edge.runtime.text import TextStream, _Stop


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


def fallback_tokenizer(strip: bool = True) -> Tokenizer:
    """As Llama 2's and Gemma's: some words, and a token for each byte, with spaces as ▁."""
    words = [
        "<unk>",
        "<s>",
        "<turn>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "a",
        "b",
        "é",
        "▁wor",
        "ld",
        "\ufffd",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {word: place for place, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.add_special_tokens(["<s>", "<turn>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


FALLBACK = [fallback_tokenizer(), fallback_tokenizer(strip=False)]


def streamed(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    out = TextStream(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(out.push(token))
        if out.stopped:
            return pieces, True
    return [*pieces, out.flush()], out.stopped


def utf8_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


PARTS = st.one_of(
    st.sampled_from(["▁", "▁a", "a", "b", "é", "▁wor", "ld", "<s>", "\ufffd"]).map(lambda word: (word,)),
    st.text(alphabet="aé好🙂\0 ", min_size=1, max_size=3).map(
        lambda text: tuple(f"<0x{byte:02X}>" for byte in text.encode())
    ),
)


@pytest.mark.parametrize("tokenizer", FALLBACK)
@given(parts=st.lists(PARTS, max_size=30))
def test_bytes_that_are_utf8_stream_as_they_decode(tokenizer, parts):
    tokens = [tokenizer.token_to_id(word) for part in parts for word in part]
    pieces, _ = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@pytest.mark.parametrize("tokenizer", [*FALLBACK, TOKENIZER])
@given(tokens=st.lists(st.integers(0, 275), max_size=60))
def test_no_tokens_break_a_stream_and_no_word_is_lost(tokenizer, tokens):
    pieces, _ = streamed(tokenizer, tokens)
    text = "".join(pieces)
    if tokenizer is TOKENIZER:
        assert text == tokenizer.decode(tokens)
        return
    words = [tokenizer.id_to_token(token) or "" for token in tokens]
    plain = [word.replace("▁", "") for word in words if not word.startswith("<")]
    unknown = "".join("\ufffd" if word.startswith("<0x") else word for word in plain if word != "\ufffd")
    found = "".join(mark for mark in text if mark in "abéworld")
    left = iter(found)
    assert all(mark in left for mark in unknown)


@pytest.mark.parametrize("tokenizer", FALLBACK)
@pytest.mark.parametrize(
    "names", [["<0x61>", "<0xC3>", "b"], ["a", "<0xA9>", "▁wor", "ld"], ["<0xE4>", "<0xBD>"] * 200 + ["ld"]]
)
def test_bytes_that_are_no_utf8_end_in_unknown_characters(tokenizer, names):
    tokens = [tokenizer.token_to_id(name) for name in names]
    pieces, _ = streamed(tokenizer, tokens)
    text = "".join(pieces)
    assert "\ufffd" in text
    assert text.endswith(names[-1])
    assert max(map(len, pieces)) < 20


def test_endless_garbage_costs_the_same_for_every_token():
    class Counting:
        def __init__(self) -> None:
            self.tokenizer, self.decoded = FALLBACK[0], 0

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def decode(self, tokens, **options):
            self.decoded += len(tokens)
            return self.tokenizer.decode(tokens, **options)

    counting = Counting()
    tokens = [FALLBACK[0].token_to_id("<0x80>")] * 2000
    pieces, _ = streamed(counting, tokens)
    assert "".join(pieces) == "\ufffd" * 2000
    assert counting.decoded < 60 * len(tokens)


SPECIAL = FALLBACK[1]


@pytest.mark.parametrize(
    ("words", "stop", "expected"),
    [
        (["a", "<turn>", "b"], ["<turn>"], "a"),
        (["<turn>", "b"], ["x", "<turn>"], ""),
        (["a", "<turn>", "b"], ["<turn>b"], "a"),
        (["a", "b", "<turn>", "a", "<s>", "b"], ["b<turn>a<s>"], "a"),
        (["a", "b", "<turn>", "a"], ["b<turn>b"], None),
        (["a", "<turn>", "b", "é"], ["ab"], ""),
        (["a", "<s>", "<turn>", "b"], ["<turn>", "zz"], "a"),
        (["a", "<s>", "<s>", "<turn>", "b"], ["<s><turn>"], "a"),
        (["a", "<turn>", "b"], ["<tur"], None),
        (["a", "b", "<s>", "b", "b"], ["b<turn>"], None),
    ],
)
def test_special_tokens_stop_although_they_are_no_text(words, stop, expected):
    tokens = [SPECIAL.token_to_id(word) for word in words]
    pieces, stopped = streamed(SPECIAL, tokens, tuple(stop))
    assert stopped == (expected is not None)
    assert "".join(pieces) == (SPECIAL.decode(tokens) if expected is None else expected)


@given(
    words=st.lists(st.sampled_from(["a", "b", "<s>", "<turn>"]), max_size=12),
    stop=st.lists(st.sampled_from(["a", "b", "<s>", "<turn>"]), min_size=1, max_size=4).map("".join),
)
def test_stop_strings_of_text_and_special_tokens(words, stop):
    plain = "".join(word for word in words if len(word) == 1)
    text = "".join(word for word in words if len(word) == 1 or word in stop)
    pieces, stopped = streamed(SPECIAL, [SPECIAL.token_to_id(word) for word in words], (stop,))
    found = text.find(stop)
    assert stopped == (found >= 0)
    before = text[:found].replace("<s>", "").replace("<turn>", "")
    assert "".join(pieces) == (before if stopped else plain)


def test_a_stop_string_that_repeats_itself_costs_the_same_for_every_character():
    class Counted(str):
        looked = 0

        def __getitem__(self, at):
            Counted.looked += 1
            return super().__getitem__(at)

    size = 4000
    out = TextStream(TOKENIZER, ["b"])
    out._stops = [_Stop(Counted("a" * size + "b")), _Stop(Counted("ab" * size + "c"))]
    text = ("a" * (size - 1) + "bb") * 3 + "ab" * (size - 1)
    ids = {mark: TOKENIZER.encode(mark).ids[0] for mark in "ab"}
    pieces = [out.push(ids[mark]) for mark in text]
    assert "".join([*pieces, out.flush()]) == text
    assert not out.stopped
    assert Counted.looked < 12 * len(text)
    assert max(map(len, pieces)) <= 2 * size
