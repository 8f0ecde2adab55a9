"""Which bytes a token stands for, by the tokenizer's own decoder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from reft_edge.runtime.logprobs import TokenScore
from reft_edge.runtime.serving.logprobs import ChatScores, CompletionScores
from reft_edge.runtime.token_bytes import TokenBytes

TEXTS = ["Hello, wörld", " two  spaces", "emoji 😀🎉 and Ω", "line\nend\t", "漢字", "x"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS[:2],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_tokens([AddedToken("[a b]", special=False)])
    return tokenizer


def byte_fallback(decoder):
    pieces = [
        ("<unk>", 0.0),
        *((f"<0x{i:02X}>", -9.0) for i in range(256)),
        *((c, -3.0) for c in "▁Helowrdtspacn,"),
        ("▁two", -2.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    return tokenizer


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
TOKENIZERS = {"byte level": byte_level(), "llama": byte_fallback(LLAMA), "gemma": byte_fallback(GEMMA)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_texts_tokens_joined_are_the_decoded_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    names, ids = TokenBytes(tokenizer), tokenizer.encode(text).ids
    joined = names.first(ids[0]) + b"".join(names.of(token) for token in ids[1:])
    assert joined.decode() == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 290), min_size=1, max_size=12))
def test_any_tokens_of_a_byte_level_tokenizer(ids):
    tokenizer = TOKENIZERS["byte level"]
    names = TokenBytes(tokenizer)
    joined = b"".join(names.of(token) for token in ids if token not in names.special)
    assert joined.decode(errors="replace") == tokenizer.decode(ids)


def test_other_decoders():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    names = TokenBytes(words)
    assert (names.first(1), names.of(2), names.of(1), names.of(99)) == (b"play", b"ing", b" play", b"")
    words.decoder = decoders.Metaspace()
    words.add_tokens(["▁no"])
    assert TokenBytes(words).of(3) == b" no"
    assert TokenBytes(words).first(3) == b"no"
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert (TokenBytes(bare).first(0), TokenBytes(bare).of(0)) == (b"a", b" a")


def scores(ids, top=()):
    return [TokenScore(token, -1.0, tuple((other, -2.0) for other in top)) for token in ids]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_offsets_are_the_same_whole_and_in_parts(kind, parts):
    tokenizer = TOKENIZERS[kind]
    names = TokenBytes(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        shown = tokenizer.decode(ids)
        whole = CompletionScores(names).take(scores(ids), shown, True)
        taken, told = CompletionScores(names), []
        for number in range(parts):
            piece = ids[len(ids) * number // parts : len(ids) * (number + 1) // parts]
            gained = shown[len(shown) * number // parts : len(shown) * (number + 1) // parts]
            told.append(taken.take(scores(piece), gained, number == parts - 1))
        for name in whole:
            assert [value for part in told if part for value in part[name]] == whole[name]
        assert whole["text_offset"] == sorted(whole["text_offset"])
        assert max(whole["text_offset"]) < len(shown)


def test_candidates_that_are_no_text_alone_stay_apart():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("😀").ids
    assert len(ids) > 2
    found = CompletionScores(TokenBytes(tokenizer)).take(scores(ids, ids), "😀", True)
    assert found["tokens"][0].startswith("bytes:\\xf0")
    assert all(len(top) == len(set(ids)) for top in found["top_logprobs"])
    assert found["text_offset"] == [0] * len(ids)
    content = ChatScores(TokenBytes(tokenizer)).take(scores(ids, ids), "😀", True)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "😀"
    assert len({entry["token"] for entry in content}) == len(set(ids))


def test_no_offset_lies_beyond_a_text_that_a_stop_string_cut():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("Hello, wörld").ids
    found = CompletionScores(TokenBytes(tokenizer)).take(scores(ids), "Hel", True)
    assert max(found["text_offset"]) <= 3
    assert len(found["tokens"]) == len(ids)


def test_tokens_that_show_in_no_answer_take_no_room():
    tokenizer = TOKENIZERS["byte level"]
    end = tokenizer.token_to_id("<|end|>")
    ids = tokenizer.encode("Hel").ids
    found = CompletionScores(TokenBytes(tokenizer)).take(scores([end, *ids]), "Hel", True)
    assert found["tokens"][0] == "<|end|>"
    assert found["text_offset"][:2] == [0, 0]
