"""Rows to tokens: what is trained on, and what a bad row is told."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from reft_edge.data import load_dataset
from reft_edge.errors import ReftEdgeError
from reft_edge.prompts import Prompts, load_prompts


@pytest.fixture(scope="module")
def prompts(device_folder):
    return load_prompts(device_folder / "hf")


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_prompt_and_completion_go_through_the_template(tmp_path, prompts):
    row = {"prompt": "Who are you?", "completion": "I am well.", "id": 7}
    messages = {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "I am well."},
        ]
    }
    data = load_dataset(write(tmp_path, row, "", messages), prompts, "chat", 999)
    assert data.examples[0] == data.examples[1]
    assert list(data.examples[0].prompt) == prompts.encode_prompt("Who are you?", "chat")
    text = prompts.tokenizer.decode(list(data.examples[0].completion), skip_special_tokens=False)
    assert text == "I am well.<|end|>"


def test_raw_rows(tmp_path, prompts):
    data = load_dataset(
        write(tmp_path, {"prompt": "Review: good\nSentiment:", "completion": " positive"}),
        prompts,
        "raw",
        999,
    )
    assert list(data.examples[0].prompt) == prompts.encode_raw("Review: good\nSentiment:")
    assert data.examples[0].completion[-1] == prompts.tokenizer.token_to_id("<|end|>")
    assert prompts.decode(list(data.examples[0].completion)) == " positive"


def test_long_rows_are_counted_not_cut(tmp_path, prompts):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a " * 400, "completion": "b"}]
    data = load_dataset(write(tmp_path, *rows), prompts, "raw", 100)
    assert (len(data.examples), data.left_out) == (1, 1)
    with pytest.raises(ReftEdgeError, match="all 1 are longer than 100 tokens; raise --max-length"):
        load_dataset(write(tmp_path, rows[1]), prompts, "raw", 100)


def metaspace_prompts():
    """A tokenizer that marks words with ▁ and puts one before every text, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["Sentiment: positive no", "Answer: negative"] * 9, trainer)
    return Prompts(tokenizer, None, {"eos_token": "</s>"})


@pytest.mark.parametrize(("prompt", "completion"), [("Sentiment:", " positive"), ("Answer:", "no")])
def test_a_completion_gets_no_space_of_its_own(tmp_path, prompt, completion):
    prompts = metaspace_prompts()
    row = {"prompt": prompt, "completion": completion}
    (example,) = load_dataset(write(tmp_path, row), prompts, "raw", 999).examples
    assert [*example.prompt, *example.completion] == prompts.encode_plain(f"{prompt}{completion}</s>")
    assert list(example.completion) != prompts.encode_plain(f"{completion}</s>")


def test_a_completion_that_melts_with_its_prompt_is_taken_alone():
    prompts = metaspace_prompts()
    assert (
        prompts.encode_plain("posit")
        != prompts.encode_plain("positive")[: len(prompts.encode_plain("posit"))]
    )
    assert prompts.encode_after("posit", "ive") == prompts.encode_plain("ive")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object"),
        ({"text": "x"}, r"line 2: expected text under .*found the fields \['text'\]"),
        ({"prompt": 3, "completion": "x"}, "line 2: expected text"),
        ({"prompt": "x", "completion": ""}, "line 2: the completion is empty"),
        ({"messages": []}, "line 2: expected at least two messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "the last message must be the assistant's",
        ),
        (
            {"messages": [{"role": "user", "content": [1]}, {"role": "assistant", "content": "b"}]},
            "every message needs text",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, prompts, row, message):
    with pytest.raises(ReftEdgeError, match=message):
        load_dataset(write(tmp_path, {"prompt": "a", "completion": "b"}, row), prompts, "chat", 999)


def test_bad_files(tmp_path, prompts):
    with pytest.raises(ReftEdgeError, match="cannot read"):
        load_dataset(tmp_path / "none.jsonl", prompts, "chat", 999)
    with pytest.raises(ReftEdgeError, match="has no row to train on"):
        load_dataset(write(tmp_path, ""), prompts, "chat", 999)
    with pytest.raises(ReftEdgeError, match="messages need the chat template"):
        load_dataset(
            write(
                tmp_path,
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ),
            prompts,
            "raw",
            999,
        )


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path, device_folder):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\u2028b", "completion": "c\u0085d"}\n', encoding="utf-8")
    data = load_dataset(path, load_prompts(device_folder / "hf"), "raw", 100)
    assert len(data.examples) == 1
