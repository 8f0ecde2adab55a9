"""Conversations of several turns: which answers are trained, on what prompts, and which of their tokens."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoTokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import load_prompts
from reft_edge.training.data import load_dataset
from reft_edge.training.objectives import Completions
from reft_edge.training.turns import IGNORED, Example, view_row, view_turns

ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
) + ASK
CONTENT_ALONE = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
STRIPS_THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
) + ASK


@pytest.fixture(scope="module")
def prompts(device_folder):
    return load_prompts(device_folder / "hf")


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def texts(prompts, row, template=None, **options):
    """Of every trained answer its prompt, its completion and what is trained of it, as text; and the notes."""
    prompts = dataclasses.replace(prompts, template=template or prompts.template)
    views, notes = view_turns(row, prompts, "chat", **options)
    decode = prompts.tokenizer.decode
    found = []
    for view in views:
        trained = [token for token in view.example.targets if token != IGNORED]
        sides = (view.example.prompt, view.example.completion, trained)
        found.append(tuple(decode(list(side), skip_special_tokens=False) for side in sides))
    return found, [*notes, *(note for view in views for note in view.notes)]


def test_every_answer_is_trained_behind_what_the_model_sees_then(prompts):
    messages = turns("a", "b", "c", "d", "e", "f")
    found, notes = texts(prompts, {"messages": messages})
    assert notes == []
    assert [prompt for prompt, _, _ in found] == [prompts.render(messages[:n]) for n in (1, 3, 5)]
    assert [completion for _, completion, _ in found] == ["b<|end|>", "d<|end|>", "f<|end|>"]
    found, notes = texts(prompts, {"messages": messages}, last_turn=True)
    assert [completion for _, completion, _ in found] == ["f<|end|>"]
    assert (
        notes
        == [
            "earlier answers that are context only, since a row's last answer is what is trained",
        ]
        * 2
    )


def test_an_earlier_answer_is_a_prompt_as_the_template_writes_it_then(prompts):
    row = {"messages": turns("a", "<think>x</think>b", "c", "<think>y</think>d")}
    (first, second), notes = texts(prompts, row, STRIPS_THINKING)
    assert first[1] == "<think>x</think>b<|end|>"
    assert second[0].endswith("assistant\nb<|end|>\n<|start|>user\nc<|end|>\n<|start|>assistant\n")
    assert second[1] == "<think>y</think>d<|end|>"
    assert notes == []


def test_a_turn_that_cannot_be_told_from_its_prompt_is_named(tmp_path, prompts):
    source = (
        "{% if messages | length == 2 %}{{ messages[1].content }}{% else %}" + STRIPS_THINKING + "{% endif %}"
    )
    row = {"messages": turns("a", "b", "c", "d")}
    with pytest.raises(ReftEdgeError, match=r"message 2: the chat template writes .*--last-turn trains only"):
        texts(prompts, row, source)
    assert len(texts(prompts, row, source, last_turn=True)[0]) == 1


@pytest.mark.parametrize("field", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": 0}])
def test_a_message_can_be_taken_out(tmp_path, prompts, field):
    messages = turns("a", "b", "c", "d")
    messages[1] |= field
    messages[3] |= {"weight": 1, "train": True}
    found, notes = texts(prompts, {"messages": messages})
    assert [completion for _, completion, _ in found] == ["d<|end|>"]
    assert "b<|end|>" in found[0][0]
    assert notes == ["answers that the rows take out of the training (weight 0, or train false)"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages[:2]}))
    with pytest.raises(ReftEdgeError, match="has no row to train on; answers that the rows take out"):
        load_dataset(path, prompts, "chat", 999)
    with pytest.raises(ReftEdgeError, match="the row trains nothing: it has answers that the rows take out"):
        view_row({"messages": messages[:2]}, prompts, "chat")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.5}, "has the weight 0.5; expected 0 or 1"),
        ({"weight": "1"}, "has the weight '1'"),
        ({"train": [1]}, r"has the train \[1\]"),
        ({"train_detail": [{"begin_offset": 0}]}, "has `train_detail`; only whole messages"),
    ],
)
def test_weights_that_are_not_known_are_refused(prompts, fields, message):
    messages = turns("a", "b", "c", "d")
    messages[1] |= fields
    with pytest.raises(ReftEdgeError, match=message):
        texts(prompts, {"messages": messages})


def test_messages_without_anything_to_train_are_told(prompts):
    messages = [{"role": "assistant", "content": "Hello!"}, *turns("a", "b", "c", "", "d", "e", "f")]
    found, notes = texts(prompts, {"messages": messages})
    assert [completion for _, completion, _ in found] == ["b<|end|>", "e<|end|>"]
    assert notes == [
        "messages behind a row's last answer, which are not read",
        "answers that nothing comes before, which are context only",
        "earlier answers that are empty, so they are not trained",
    ]
    with pytest.raises(ReftEdgeError, match="found 'user', 'system'"):
        texts(prompts, {"messages": [*turns("a"), {"role": "system", "content": "b"}]})


def test_messages_before_the_start_are_context(prompts):
    row = {"messages": turns("a", "b", "c", "d", "e", "f")}
    found, notes = texts(prompts, row, start=3)
    assert ([completion for _, completion, _ in found], notes) == (["d<|end|>", "f<|end|>"], [])
    with pytest.raises(ReftEdgeError, match="no message is an answer"):
        texts(prompts, row, start=6)


@pytest.mark.parametrize("source", [MARKED, CONTENT_ALONE, MARKED.replace("generation %}", "generation -%}")])
@pytest.mark.parametrize(
    "contents", [("a", "b"), ("Who are you?", "I am well.", "é 漢字?", " twice  Hi\n", "x", "y")]
)
def test_marks_train_what_transformers_says(device_folder, prompts, source, contents):
    tokenizer = AutoTokenizer.from_pretrained(device_folder / "hf")
    messages = turns(*contents)
    whole = tokenizer.apply_chat_template(
        messages, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    views, _ = view_turns({"messages": messages}, dataclasses.replace(prompts, template=source), "chat")
    mask = [0] * len(whole["input_ids"])
    for view in views:
        example, start = view.example, len(view.example.prompt)
        assert (
            list(example.prompt + example.completion) == whole["input_ids"][: start + len(example.completion)]
        )
        for at, token in enumerate(example.targets, start):
            mask[at] = int(token != IGNORED)
    assert mask == whole["assistant_masks"]
    assert sum(view.example.count for view in views) == sum(mask) > 0


def test_what_marks_leave_out_is_told(prompts):
    row = {"messages": turns("a", "b", "c", "d")}
    found, notes = texts(prompts, row, CONTENT_ALONE)
    assert [(completion, trained) for _, completion, trained in found] == [
        ("b<|end|>", "b"),
        ("d<|end|>", "d"),
    ]
    assert notes == ["answers of which only the part that the chat template marks is trained"] * 2
    assert texts(prompts, row, MARKED)[1] == []
    last = MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.content == 'd' %}")
    found, notes = texts(prompts, row, last)
    assert [completion for _, completion, _ in found] == ["d<|end|>"]
    assert "answers in which the chat template marks nothing to train, so they are left out" in notes


def test_marks_that_cannot_be_followed_are_told(prompts):
    source = "{% set whole %}x" + MARKED + "{% endset %}y{{ whole }}"
    found, notes = texts(prompts, {"messages": turns("a", "b")}, source)
    assert [trained for _, _, trained in found] == ["b<|end|>"]
    assert notes == ["answers that are trained wholly, since the chat template's marks cannot be followed"]


def test_tokens_that_are_not_trained_add_nothing_to_the_loss(tiny_model):
    from reft_edge.steering.hooks import steered

    whole = Example((5, 6, 7), (8, 9, 10, 11))
    part = dataclasses.replace(whole, trained=(True, False, False, True))
    rows = [whole, part]
    with steered(tiny_model) as steering, torch.no_grad():
        total, alone = (
            float(Completions().loss(tiny_model, steering, given, torch.device("cpu"), False))
            for given in (rows, [whole])
        )
        ids = torch.tensor([[*whole.prompt, *whole.completion]])
        known = tiny_model(input_ids=ids).logits[0].log_softmax(dim=-1)
    assert total - alone == pytest.approx(-float(known[2, 8] + known[5, 11]), rel=1e-4)
    assert Completions().count(rows) == 6


def test_long_answers_are_left_out_one_by_one(tmp_path, prompts):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns("a", "b", "c " * 300, "d")}))
    data = load_dataset(path, prompts, "chat", 100)
    assert (len(data.examples), data.left_out) == (1, 1)
