"""Rows to tokens: what is trained on, and what a bad row is told."""

import dataclasses
import hashlib
import json
import os
import threading

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Prompts, load_prompts
from reft_edge.training.data import check_positions, load_dataset
from reft_edge.training.preference import load_preferences
from reft_edge.training.triggers import check_triggers, tokenised
from reft_edge.training.turns import Example, view_row


@pytest.fixture(scope="module")
def prompts(device_folder):
    return load_prompts(device_folder / "hf")


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def good(row):
    """A row of the same shape that can be trained."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return (
        {"messages": talk}
        if isinstance(row, dict) and "messages" in row
        else {"prompt": "a", "completion": "b"}
    )


def test_prompt_and_completion_go_through_the_template(tmp_path, prompts):
    row = {"prompt": "Who are you?", "completion": "I am well.", "id": 7}
    messages = {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "I am well."},
        ]
    }
    data, talk = (load_dataset(write(tmp_path, "", one), prompts, "chat", 999) for one in (row, messages))
    assert data.examples == talk.examples
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
        (
            {"text": "x"},
            "line 2: the rows before are prompts and completions .prompt, completion., and this one has the columns 'text'; "
            "give rows of one shape",
        ),
        ({"prompt": 3, "completion": "x"}, "line 2: expected text"),
        ({"prompt": "x", "completion": ""}, "line 2: the completion is empty"),
        ({"messages": []}, "line 2: expected at least two messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "no message is an answer of the assistant's, so there is nothing to train; found 'user'",
        ),
        (
            {"messages": [{"role": "user", "content": [1]}, {"role": "assistant", "content": "b"}]},
            "every message needs text",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, prompts, row, message):
    with pytest.raises(ReftEdgeError, match=message):
        load_dataset(write(tmp_path, good(row), row), prompts, "chat", 999)


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


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CHATML = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}THINK{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\nOPEN{% endif %}"
)

FIRST_CALL = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    "{{ c.name }}({{ c.arguments | tojson }}){% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
) + ASK
"""Writes the first of a message's calls, as gpt-oss's does."""


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def called(**more):
    return [{"role": "user", "content": "Weather?"}, {"role": "assistant", "tool_calls": [CALL], **more}]


def view(prompts, row, template=None, **fields):
    """A row's prompt and completion as text, and its notes."""
    prompts = dataclasses.replace(prompts, **{"template": template or prompts.template, **fields})
    found = view_row(row, prompts, "chat" if prompts.template else "raw")
    sides = (found.example.prompt, found.example.completion)
    prompt, completion = (prompts.tokenizer.decode(list(side), skip_special_tokens=False) for side in sides)
    return prompt, completion, found.notes


def test_the_prompt_is_what_inference_sees_and_both_are_the_templates_text(prompts):
    row = {"messages": turns("a", "b", "c", "d")}
    prompt, completion, notes = view(prompts, row)
    assert prompt == prompts.render(row["messages"][:-1])
    assert prompt + completion + "\n" == prompts.render(row["messages"], add_generation_prompt=False)
    assert notes == ("earlier answers that are context only, since a row's last answer is what is trained",)


def test_files_tell_what_is_not_trained(tmp_path, prompts):
    talks = [{"messages": turns("a", "b", "c", "d", "e", "f")}] * 3
    rows = [{"prompt": "a", "completion": "b"}]
    data = load_dataset(write(tmp_path, *talks), prompts, "chat", 999, last_turn=True)
    assert len(data.examples) == 3
    assert data.notices == (
        "earlier answers that are context only, since a row's last answer is what is trained: 6",
    )
    assert load_dataset(write(tmp_path, rows[-1]), prompts, "chat", 999).notices == ()
    bare = dataclasses.replace(prompts, template=None)
    (notice,) = load_dataset(write(tmp_path, rows[-1]), bare, "raw", 999).notices
    assert "no chat template: prompts are trained as they stand" in notice


@pytest.mark.parametrize("completion", ["<|end|>", " <|end|>", "\n<|end|>"])
def test_a_raw_answer_of_an_end_alone_is_empty(prompts, completion):
    with pytest.raises(ReftEdgeError, match="the completion is empty but for"):
        view_row({"prompt": "Who are you?", "completion": completion}, prompts, "raw")


def test_rows_may_come_by_a_pipe(tmp_path, prompts):
    content = (json.dumps({"prompt": "Hi", "completion": "Yes."}) + "\n").encode()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    data = load_dataset(tmp_path / "pipe", prompts, "chat", 999)
    writer.join()
    assert (len(data.examples), data.digest) == (1, hashlib.sha256(content).hexdigest())


def test_an_end_that_the_tokenizer_has_no_token_for_is_none(prompts):
    named = dataclasses.replace(prompts, special_tokens={"eos_token": "</s>"}, template=None, end_ids=())
    _, completion, notes = view(named, {"prompt": "Hi", "completion": "Yes."})
    assert (completion, notes) == (
        "Yes.",
        ("answers without an end, since the model names no token that ends one",),
    )
    known = dataclasses.replace(named, end_ids=(1,))
    assert view(known, {"prompt": "Hi", "completion": "Yes."})[1:] == ("Yes.<|end|>", ())
    assert known.stop_ids == (1,)


def test_arguments_that_a_template_leaves_out_are_told(prompts):
    source = FIRST_CALL.replace("c.arguments | tojson", "c.arguments.city")
    given = {"city": "Oslo", "days": ["to\nmorrow", {"at": "noon"}]}
    calls = [{"function": {"name": "weather", "arguments": given}}]
    row = {"messages": called(content="", tool_calls=calls)}
    _, completion, notes = view(prompts, row, source)
    assert completion == "weather(Oslo)<|end|>"
    assert "tool calls of whose arguments the chat template writes only a part, or another form" in notes
    assert view(prompts, row, FIRST_CALL)[2] == ()


@pytest.mark.parametrize("content", ["\ufeff{}\n\ufeff{}\n", "\ufeff\ufeff{}\n\ufeff\n{}\n\ufeff"])
def test_files_with_marks_that_were_joined(tmp_path, prompts, content):
    row = json.dumps({"prompt": "Hi", "completion": "Yes."})
    path = tmp_path / "joined.jsonl"
    path.write_text(content.replace("{}", row), encoding="utf-8")
    assert len(load_dataset(path, prompts, "chat", 999).examples) == 2


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_without_ends_gets_the_models(prompts, marked):
    source = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + ASK
    if marked:
        source = source.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}\n")
    row = {"messages": turns("Who?", "I am well.")}
    prompt, completion, notes = view(prompts, row, source)
    assert (prompt[-10:], completion) == ("assistant\n", "I am well.<|end|>")
    assert notes == ("answers to which the end <|end|> was added, since the chat template writes none",)
    _, completion, notes = view(prompts, row, source, special_tokens={}, end_ids=())
    assert completion.strip() == "I am well."
    assert notes == ("answers without an end, since the model names no token that ends one",)


def test_an_end_of_turn_that_is_not_the_models_end_is_kept_and_told(tmp_path, prompts):
    base = dataclasses.replace(prompts, special_tokens={"eos_token": "<|start|>"}, end_ids=(0,))
    _, completion, notes = view(base, {"prompt": "Hi", "completion": "I am well."})
    assert (completion, notes) == ("I am well.<|end|>", ())
    data = load_dataset(write(tmp_path, {"prompt": "Hi", "completion": "Yes."}), base, "chat", 999)
    (notice,) = data.notices
    assert "ends answers with <|end|>, at which the model's own configuration does not stop" in notice
    assert base.stop_ids == (0, 1)
    assert dataclasses.replace(base, template=None).stop_ids == (0,)
    assert base.stop_ids_with([7, 1]) == (7, 1, 0)


@pytest.mark.parametrize(
    "text", ["The token <|start|> ends it, always.", "<|start|>", "a<|end|>b", "ends with <|start|>"]
)
def test_a_text_that_ends_texts_does_not_cut_an_answer(prompts, text):
    base = dataclasses.replace(prompts, special_tokens={"eos_token": "<|start|>"})
    for fields in ({}, {"template": CHATML + ASK}):
        _, completion, notes = view(base, {"prompt": "Hi", "completion": text}, **fields)
        assert completion == f"{text}<|end|>"
        assert notes == (
            "answers that hold a token at which the model stops, so that it will end them there",
        )


def test_raw_rows_end_as_the_models_configuration_says(tmp_path, device_folder):
    hf = device_folder / "hf"
    for configuration, end in (
        ({"config.json": {"eos_token_id": 1}}, "<|end|>"),
        (
            {"generation_config.json": {"eos_token_id": [0, 1]}, "config.json": {"eos_token_id": 1}},
            "<|start|>",
        ),
        ({"config.json": {"text_config": {"eos_token_id": 1}}}, "<|end|>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|end|>"}}}, "<|end|>"),
        ({"config.json": {"eos_token_id": None}}, ""),
        ({"config.json": {"eos_token_id": "x"}}, ""),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes((hf / "tokenizer.json").read_bytes())
        (folder / "tokenizer_config.json").write_text("{}")
        for name, content in configuration.items():
            (folder / name).write_text(json.dumps(content))
        _, completion, notes = view(load_prompts(folder), {"prompt": "Who?", "completion": " I am well."})
        assert completion == f" I am well.{end}"
        assert bool(notes) is (end == "")


@pytest.mark.parametrize(
    ("think", "opener", "row", "completion"),
    [
        ("", "", called(), "CALL<|end|>"),
        ("<think></think>", "<think>\n", called(content=""), "</think>CALL<|end|>"),
        ("<think>\n</think>", "<think>\n", called(content="Now."), "</think>Now.CALL<|end|>"),
        ("</think>", "<think>", called(content=""), "</think>CALL<|end|>"),
        ("<think></think>", "<think>\n", turns("Hi", "Yes."), "</think>Yes.<|end|>"),
        ("</think>", "<think>", turns("Hi", "Yes."), "</think>Yes.<|end|>"),
        ("", "<think>\n", turns("Hi", "<think>\nhm\n</think>\nYes."), "hm\n</think>\nYes.<|end|>"),
        ("", "<think>\n\n</think>\n\n", turns("Hi", "Yes."), "Yes.<|end|>"),
    ],
)
def test_a_reply_that_begins_with_more_than_an_answer_has(prompts, think, opener, row, completion):
    source = WITH_TOOLS.replace("THINK", think).replace("OPEN", opener)
    prompt, found, _ = view(prompts, {"messages": row, "tools": json.dumps(TOOLS)}, source)
    call = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    assert found == completion.replace("CALL", call)
    assert prompt.endswith(f"<|start|>assistant\n{opener}")
    assert prompt.startswith('{"type": "function"')


def test_an_answer_right_behind_what_a_reply_begins_with_is_told(prompts):
    source = WITH_TOOLS.replace("THINK", "").replace("OPEN", "<think>\n")
    _, completion, notes = view(prompts, {"messages": turns("Hi", "Yes.")}, source)
    assert completion == "Yes.<|end|>"
    assert notes == (
        "answers that are trained right behind '<think>\\n', with which the chat template begins a reply",
    )


@pytest.mark.parametrize(
    ("row", "source", "note"),
    [
        (
            {"messages": [*turns("a", "b")[:1], {**turns("a", "b")[1], "reasoning": "why"}]},
            CHATML + ASK,
            "reasoning",
        ),
        (
            {"messages": turns("a", "b"), "tools": TOOLS},
            CHATML + ASK,
            "tools that the chat template does not",
        ),
        (
            {"messages": turns("a", "<think>x</think>b")},
            CHATML.replace("m.content", "m.content.split('</think>')[-1]") + ASK,
            "writes only a part or another form",
        ),
        (
            {
                "messages": called(
                    content="", tool_calls=[{"function": {"name": "w", "arguments": '{"a": 1}'}}]
                )
            },
            WITH_TOOLS.replace("THINK", "").replace("OPEN", ""),
            "arguments are JSON text",
        ),
    ],
)
def test_what_a_template_leaves_out_or_changes_is_told(prompts, row, source, note):
    _, _, notes = view(prompts, row, source)
    assert [text for text in notes if note in text]


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ({"messages": called()}, "", "does not write the call of the tool 'weather'"),
        ({"messages": called(content="x", tool_calls=[{}])}, "", "does not write the call of the tool None"),
        ({"messages": called(tool_calls="x")}, "", "expected a list of objects under `tool_calls`"),
        ({"messages": turns("a", "")}, "", "the answer is empty"),
        ({"messages": turns("a", " \n")}, "", "the answer is empty"),
        ({"messages": called(tool_calls=[])}, "", "every message needs text"),
        ({"prompt": "a", "completion": " \n"}, "", "the completion is empty"),
        ({"messages": [*turns("a"), {**turns("a", "b")[1], "weight": 0.5}]}, "", "has the weight 0.5"),
        ({"messages": turns("a", "b"), "tools": "{"}, "", "`tools` is not valid JSON"),
        ({"messages": turns("a", "b"), "tools": [1]}, "", "a list of objects under `tools`"),
        ({"messages": turns("a", "b"), "tools": {"a": 1}}, "", "a list of objects under `tools`"),
        (
            {"messages": turns("a", "b")},
            "{{ messages | length }}" + ASK,
            "differently once the answer is in it",
        ),
        ({"messages": turns("a", "b")}, "x{{ '' if add_generation_prompt }}", "writes nothing of the answer"),
        (
            {"messages": turns("a", "b")},
            CHATML.replace("m.content", "''") + ASK,
            "nothing of the answer's text",
        ),
        # Short texts stand in whatever a template writes.
        (
            {"messages": turns("a", "t")},
            CHATML.replace("m.content", "'x'") + ASK,
            "nothing of the answer's text",
        ),
        (
            {"messages": called(tool_calls=[called()[-1]["tool_calls"][0]] * 2)},
            FIRST_CALL,
            "does not write all 2 calls of the tool 'weather'",
        ),
        (
            {
                "messages": [
                    *turns("a"),
                    {"role": "assistant", "content": "b", "function_call": {"name": "f"}},
                ]
            },
            "",
            "`function_call` is the old form of `tool_calls`",
        ),
        ({"prompt": "a", "completion": "b", "functions": [{"name": "f"}]}, "", "old form of `tools`"),
        ({"messages": [*turns("a"), {**turns("a", "b")[1], "train": "no"}]}, "", "has the train 'no'"),
        ({"messages": [*turns("a"), {**turns("a", "b")[1], "training": 2}]}, "", "has the training 2"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": "a"}]},
                    *turns("a", "b")[1:],
                ]
            },
            "",
            "its parts, too",
        ),
        ({"messages": turns("a", "b")}, "{{ 'a' + messages }}", "chat template failed: TypeError"),
        ({"messages": turns("a", "b")}, "{{ 1 / 0 }}", "chat template failed: ZeroDivisionError"),
        ({"messages": turns("a", "b")}, "{{ 'abc'.index('x') }}", "failed: ValueError: substring not found"),
        ({"prompt": "a \ud83d", "completion": "b"}, "", "`prompt`: character 3 of the text is half of one"),
        ({"prompt": "a", "completion": "\udc00"}, "", "`completion`: character 1 of the text is half"),
        ({"messages": turns("a", "b", "c\ud83d", "d")}, "", "`messages`: character 2 of the text is half"),
        ({"messages": turns("a", "b"), "tools": [{"name": "\ud83d"}]}, "", "`tools`: character 1"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(tmp_path, prompts, row, source, message):
    base = dataclasses.replace(prompts, template=source or prompts.template)
    with pytest.raises(ReftEdgeError, match=message) as caught:
        load_dataset(write(tmp_path, row if source else good(row), row), base, "chat", 999)
    assert f"line {1 if source else 2}: " in str(caught.value)
    assert "not valid JSON (substring" not in str(caught.value)


def test_rows_in_which_nothing_is_edited():
    one, two = Example((5,), (6,)), Example((5, 5), (6, 6))
    assert check_positions([two], "f7+l7", False) == ()
    for positions, rows in (("f7+l7", [one]), ("gen", [one]), ("f1|l3+gen", [one, one])):
        with pytest.raises(ReftEdgeError, match="nothing can be learnt"):
            check_positions(rows, positions, False)
    assert check_positions([one], "all", False) == ()
    for positions in ("all-f1", "all-l1", "l1-f2"):
        with pytest.raises(ReftEdgeError, match="nothing can be learnt"):
            check_positions([one], positions, False)
    three = Example((5, 5, 5, 5), (6, 6, 6))
    for positions in ("all-f1", "f2-f1", "l2-l1", "all-f3", "gen2", "all+gen1-l3"):
        assert check_positions([three], positions, False) == ()
    (idle,) = check_positions([one, two, one], "f7+l7", False)
    assert idle.endswith("nothing is learnt from them: 2")
    (never,) = check_positions([one], "all+gen", False)
    assert never.endswith("so they learn nothing: gen")
    assert check_positions([one], "all+gen", True) == ()


def test_rows_without_a_trigger_are_counted():
    has, lacks = Example((5, 5, 9), (6, 6)), Example((5, 5), (6, 6, 9))
    assert check_positions([has], "from:[5,9]", False) == ()
    (idle,) = check_positions([has, lacks, lacks], "from:[5,9]", False)
    assert idle.endswith("edit no token, so nothing is learnt from them: 2")
    (lacking,) = check_positions([has, lacks, lacks], "from:[9]|l1", False)
    assert lacking == "rows whose prompt lacks the tokens of from:[9], so it learns nothing from them: 2"
    (never,) = check_positions([has, lacks], "from:[8]|l1", False)
    assert never.endswith("so they learn nothing: from:[8]")
    with pytest.raises(ReftEdgeError, match="in none of the 2 rows does the prompt have the tokens"):
        check_positions([lacks, lacks], "from:[9]", False)


def test_a_trigger_that_no_prompt_has_is_refused_with_what_the_tokenizer_makes_of_it(prompts):
    texts = ["Say: how are you?", "So, how?", "hot ice"]
    rows = [Example(tuple(prompts.encode_plain(text)), (6,)) for text in texts]
    joined = prompts.encode_plain("how")
    spec = tokenised('from:"how"', prompts)
    assert spec == f'from:"how"[{",".join(map(str, joined))}]'
    with pytest.raises(ReftEdgeError, match="none of the 3 prompts has these tokens") as caught:
        check_triggers(rows, spec, False, prompts)
    there = prompts.encode_plain(" how")
    assert (
        f"2 have the text: there the tokenizer joins it with what stands beside it, and makes it {there}"
        in str(caught.value)
    )
    check_triggers(rows, f"from:{there}|f2", False, prompts)
    with pytest.raises(ReftEdgeError, match="write the text into the prompts"):
        check_triggers(rows, tokenised('from:"cat"', prompts), False, prompts)


def test_pairs_are_viewed_as_rows_are(tmp_path, prompts):
    row = {"prompt": "a", "chosen": "b", "rejected": "c<|start|>d", "tools": TOOLS}
    base = dataclasses.replace(prompts, special_tokens={"eos_token": "<|start|>"})
    data = load_preferences(write(tmp_path, row), base, "chat", 999)
    assert data.notices == (
        "rows with tools that the chat template does not write: 2",
        "answers that hold a token at which the model stops, so that it will end them there: 1",
    )
    with pytest.raises(ReftEdgeError, match="line 1: `chosen`: character 1"):
        load_preferences(write(tmp_path, {**row, "chosen": "\ud83d"}), base, "chat", 999)
