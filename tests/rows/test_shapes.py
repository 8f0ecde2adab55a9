"""Shapes of rows: what each is read as, and what a file of none, or of several, is told."""

import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.rows.shapes import (
    ALPACA,
    COMPLETIONS,
    LABELLED,
    MESSAGES,
    PAIRS,
    PROMPTED,
    QUESTIONS,
    SHAREGPT,
    Recogniser,
    as_completion,
    as_pair,
    as_question,
)

ASK = {"role": "user", "content": "Who?"}
TELL = {"role": "assistant", "content": "Me."}


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "shape", "columns", "plain", "start"),
    [
        (
            {"prompt": "a", "completion": "b", "id": 1},
            PROMPTED,
            "prompts and completions (prompt, completion)",
            {"prompt": "a", "completion": "b"},
            0,
        ),
        (
            {"prompt": [ASK, TELL, ASK], "completion": [TELL]},
            PROMPTED,
            "prompts and completions (prompt, completion)",
            {"messages": [ASK, TELL, ASK, TELL]},
            3,
        ),
        (
            {"messages": [ASK, TELL], "tools": [{"name": "f"}], "prompt": "x", "completion": "y"},
            MESSAGES,
            "conversations (messages, tools)",
            {"messages": [ASK, TELL], "tools": [{"name": "f"}]},
            0,
        ),
        (
            {"messages": '[{"role": "user", "content": "Who?"}]'},
            MESSAGES,
            "conversations (messages)",
            {"messages": [ASK]},
            0,
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            ALPACA,
            "Alpaca (instruction, input, output)",
            {"prompt": "Add.\n\n1 2", "completion": "3"},
            0,
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3", "text": "x"},
            ALPACA,
            "Alpaca (instruction, output)",
            {"prompt": "Add.", "completion": "3"},
            0,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "Me.", "weight": 0},
                ],
                "system": "Be brief.",
            },
            SHAREGPT,
            "ShareGPT (conversations, system)",
            {"messages": [{"role": "system", "content": "Be brief."}, ASK, {**TELL, "weight": 0}]},
            0,
        ),
        (
            {"conversations": [ASK, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
            SHAREGPT,
            "ShareGPT (conversations)",
            {
                "messages": [
                    ASK,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
                    },
                ]
            },
            0,
        ),
    ],
)
def test_shapes_of_completions(row, shape, columns, plain, start):
    recogniser = Recogniser(COMPLETIONS)
    assert recogniser(row) is shape
    assert as_completion(shape, row) == (plain, start)
    assert str(recogniser.recognised("x.csv")) == f"read 1 row of x.csv as {columns}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "reply": "b"},
            r"has the columns 'question', 'reply'; expected those of one of these: messages;",
        ),
        ({}, "it has no columns"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "are preferences .*train them with --task preference",
        ),
        ({"text": "a", "label": 1}, "are labelled texts .*--task classification"),
        ({"prompt": "a", "answer": "b"}, "are questions .*they are for `reft-edge eval`"),
        ({"prompt": "a", "completion": None}, "has the columns 'completion', 'prompt'"),
        ([1], "expected an object with named fields, found list"),
    ],
)
def test_other_shapes_are_refused(row, message):
    with pytest.raises(ReftEdgeError, match=message):
        Recogniser(COMPLETIONS)(row)


def test_rows_of_several_shapes_are_refused():
    recogniser = Recogniser(COMPLETIONS)
    assert recogniser.recognised("x") is None
    recogniser({"instruction": "a", "output": "b"})
    recogniser({"instruction": "a", "input": "c", "output": "b"})
    with pytest.raises(
        ReftEdgeError, match=r"before are Alpaca .*this one is conversations \(messages\); give rows of one"
    ):
        recogniser({"messages": []})
    with pytest.raises(ReftEdgeError, match="this one has the columns 'instruction'; give rows of one shape"):
        recogniser({"instruction": "a"})
    assert str(recogniser.recognised("x")) == "read 2 rows of x as Alpaca (instruction, input, output)"


@pytest.mark.parametrize(
    ("shape", "row", "message"),
    [
        (PROMPTED, {"prompt": "a", "completion": [TELL]}, "expected two texts, or two lists"),
        (ALPACA, {"instruction": 1, "output": "b"}, "expected text under `instruction`, found int"),
        (
            ALPACA,
            {"instruction": "a", "input": [1], "output": "b"},
            "expected text under `input`, found list",
        ),
        (MESSAGES, {"messages": "[{'role': 'user'}]"}, "the text under `messages` is not valid JSON"),
        (SHAREGPT, {"conversations": "x"}, "expected a list under `conversations`, found str"),
        (
            SHAREGPT,
            {"conversations": [{"from": "robot", "value": "x"}]},
            "a turn is from 'robot'; expected one of human",
        ),
        (SHAREGPT, {"conversations": [{"from": ["a"], "value": "x"}]}, "a turn is from"),
        (
            SHAREGPT,
            {"conversations": [{"from": "function_call", "value": "f("}]},
            "function_call is not valid JSON",
        ),
    ],
)
def test_columns_that_hold_something_else_are_named(shape, row, message):
    with pytest.raises(ReftEdgeError, match=message):
        as_completion(shape, row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?", "chosen": [TELL], "rejected": [{**TELL, "content": "You."}]},
        {"prompt": [ASK], "chosen": [TELL], "rejected": [{**TELL, "content": "You."}]},
        {"chosen": [ASK, TELL], "rejected": [ASK, {**TELL, "content": "You."}]},
        {"prompt": "Who?", "chosen": [ASK, TELL], "rejected": [ASK, {**TELL, "content": "You."}]},
    ],
)
def test_preferences_of_conversations(row):
    assert Recogniser((PAIRS,))(row) is PAIRS
    chosen, rejected = as_pair(row)
    assert chosen == {"messages": [ASK, TELL]}
    assert rejected == {"messages": [ASK, {**TELL, "content": "You."}]}


def test_preferences_of_different_prompts_are_refused():
    with pytest.raises(ReftEdgeError, match="differ before their last message"):
        as_pair({"chosen": talk("a", "b"), "rejected": talk("c", "b")})
    with pytest.raises(ReftEdgeError, match="expected text under"):
        as_pair({"prompt": "a", "chosen": "b", "rejected": [TELL]})
    text, _ = as_pair({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert text == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("shape", "row", "question"),
    [
        (LABELLED, {"text": "a", "label": 1}, {"text": "a", "label": 1}),
        (
            QUESTIONS,
            {"prompt": "a", "choices": '["x", "y"]', "answer": "x"},
            {"prompt": "a", "choices": ["x", "y"], "answer": "x"},
        ),
        (
            PAIRS,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "choices": ["b", "c"], "answer": "b"},
        ),
        (PROMPTED, {"prompt": "a", "completion": "7"}, {"prompt": "a", "answer": "7"}),
        (MESSAGES, {"messages": talk("a", "b")}, {"prompt": "a", "answer": "b"}),
        (
            ALPACA,
            {"instruction": "a", "input": "", "output": "the correct answer is true", "answer": "true"},
            {"prompt": "a", "answer": "true"},
        ),
    ],
)
def test_questions_from_every_shape(shape, row, question):
    assert as_question(shape, row) == question


def test_long_conversations_are_no_questions():
    for messages in (
        talk("a", "b", "c", "d"),
        talk("a"),
        [{"role": "system", "content": "x"}, *talk("a", "b")],
    ):
        with pytest.raises(ReftEdgeError, match="only conversations of one question and one answer"):
            as_question(MESSAGES, {"messages": messages})
