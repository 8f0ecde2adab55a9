"""Adapters that act from a token sequence of the prompt on: in PyTorch, in ONNX Runtime, alone and beside others."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import reft_edge
from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.linear import fold
from reft_edge.adapter.merging import Source, merge
from reft_edge.adapter.positions import UNLIMITED, Span, active, describe_spans, parse_positions
from reft_edge.adapter.triggers import MOST_TOKENS, NEVER, Trigger, with_tokens
from reft_edge.adapter_files import convert
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.inspection.effect import measure
from reft_edge.model.prompts import load_prompts
from reft_edge.runtime import Request, SteeredModel
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.prefix import shared
from reft_edge.runtime.rows import SeparateRows
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.turns import Example
from tests.helpers.batches import run_rows
from tests.helpers.torch_reference import greedy, logits, random_adapter

X, Y = [61, 19], [200]
ONE, TWO = f'from:"x"[{X[0]},{X[1]}]', f"from:[{Y[0]}]-l2"
TWICE = [5, *X, 80, 33, *X, 120, 7, 44, 3, 9]
LACKS = [5, 80, 33, 120, 7, 19, 61, 44]
AT_THE_END = [5, 80, *Y, 33, 120, 7, 44, *X]
PROMPTS = [TWICE, LACKS, AT_THE_END]


def open_at(spec, prompt, total):
    [span] = parse_positions(spec, tied=False)
    n = len(prompt)
    plain = span.in_prompt(prompt)
    found = np.flatnonzero(active(plain, np.arange(total), n)).tolist()
    assert found == np.flatnonzero(active(span, np.arange(total), n, span.start(prompt))).tolist()
    return found


def test_a_gate_opens_at_the_last_of_the_sequence_and_stays_open():
    assert open_at(ONE, TWICE, 14) == list(range(5, 14))
    assert open_at(ONE, AT_THE_END, 11) == [7, 8, 9, 10]
    assert open_at(ONE, LACKS, 14) == []
    assert open_at(TWO, AT_THE_END, 11) == [2, 3, 4, 5, 6, 9, 10]
    assert open_at("from:[7]-f5", [7, 1], 4) == [2, 3]
    assert open_at("from:[7,7]", [7, 7, 7], 5) == [1, 2, 3, 4]
    assert open_at("from:[7,7]", [7], 3) == []
    assert open_at("from:[7]", [7, 1], 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="depends on the prompt's tokens"):
        active(parse_positions(ONE, False)[0], 3, 10)


@pytest.mark.parametrize(
    "spec",
    [
        'from:"<tool>"[27,5]',
        "from:[0]",
        'from:"a+b|c-d from:\\"x\\""[1,2]-f1-l2|f3|from:"a"[9]',
        'from:"\\n\\u200b\\\\"[7]',
        'from:"größer 工具"[7]',
    ],
)
def test_a_spec_is_what_it_is_written_as(spec):
    spans = parse_positions(spec, tied=False)
    assert describe_spans(spans) == (spec, False)
    assert spec.isprintable()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("from:", "names a text in double quotes"),
        ("from:tool", "names a text in double quotes"),
        ('from:"x', "names a text in double quotes"),
        ('from:""', "names a text in double quotes"),
        ('from:"x"+f3', "set other parts apart with `|`"),
        ('gen|from:"x"+gen', "set other parts apart with `|`"),
        ('from:"x"5', "cannot read"),
        ("from:0;", "names a text"),
        ('from:"\\ud800"', "is a JSON string"),
        ('from:"\\x"', "is a JSON string"),
        ("from:[1,-2]", "token ids are whole numbers"),
        ("from:[]", "token ids are whole numbers"),
        ("from:[٣]", "token ids are whole numbers"),
        ("from:[4294967296]", "is no token id"),
        (f"from:[{','.join(['1'] * (MOST_TOKENS + 1))}]", "at most 64 are accepted"),
        (f'from:"{"x" * 201}"', "201 characters; at most 200"),
        ('from:"x"|from:"x"', "given twice"),
        ('from:"x"-gen', "leaves out the prompt's first or last"),
    ],
)
def test_what_is_no_trigger_is_said(spec, message):
    with pytest.raises(ReftEdgeError, match="positions") as caught:
        parse_positions(spec, tied=False)
    assert message in str(caught.value)


def test_ids_are_made_of_a_text_and_a_text_of_ids():
    words = {"tool": [27, 5], "from:0;": [1], "": [], "long": [1] * 65}

    def decode(ids):
        return next((text for text, found in words.items() if found == ids), "y" * 300)

    def done(spec):
        return with_tokens(spec, words.__getitem__, decode)

    assert done('f3|from:"tool"-l1') == 'f3|from:"tool"[27,5]-l1'
    assert done('from:"from:0;"|from:[27,5]|from:[3]') == 'from:"from:0;"[1]|from:"tool"[27,5]|from:[3]'
    assert done('from:"tool"[8]') == 'from:"tool"[8]'
    assert done("f7+l7") == "f7+l7"
    with pytest.raises(ReftEdgeError, match="has 65 tokens; expected 1 to 64"):
        done('from:"long"')


def test_an_adapter_file_has_the_ids_and_is_checked(tiny_model, tmp_path):
    path = tmp_path / "a.safetensors"
    random_adapter(tiny_model, positions=f"{ONE}|f3", path=path)
    config = load_adapter(path).config
    assert config.positions == f"{ONE}|f3"
    assert config.spans == (
        Span(last=UNLIMITED, after=UNLIMITED, trigger=Trigger(tuple(X), "x")),
        Span(first=3),
    )
    for positions, message in (
        ('from:"x"', "no token ids"),
        ('from:"\u200b"[3]', "not plain text"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            replace(config, positions=positions)
    with pytest.raises(AdapterFileError, match="a classifier reads texts"):
        replace(config, positions=ONE, labels=("a", "b"), pooling="cls")


@pytest.fixture(scope="module", params=["joined", "separate"])
def model(request, device_folder, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = SteeredModel(device_folder / "export", device="cpu")
    model.manifest = replace(model.manifest, eos_token_ids=())
    for seed, (name, positions) in enumerate({"one": ONE, "two": f"{TWO}|f2", "plain": "all+gen"}.items()):
        random_adapter(
            tiny_model, positions=positions, seed=seed, strength=3.0, path=folder / f"{name}.safetensors"
        )
        model.load_adapter(folder / f"{name}.safetensors")
    model.adapter_folder = folder
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "separate":
            patch.setattr("reft_edge.runtime.batch.JoinedRows", SeparateRows)
        yield model


CHOICES = [{"one": 1.0}, {"two": 1.0}, {}, {"one": 0.5, "plain": 1.0}, {"two": -1.0, "one": 1.0}]


def interventions(model, choice):
    return [
        (Interventions.from_adapter(load_adapter(model.adapter_folder / f"{name}.safetensors")), scale)
        for name, scale in choice.items()
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_onnx_runtime_computes_what_pytorch_does(model, tiny_model, choice):
    answers = [[8, 9], [10, *X, 11], [12]]
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    lengths = [len(prompt) for prompt in PROMPTS]
    found = model.logits(rows, choice, prompt_tokens=lengths)
    with steered(tiny_model, *interventions(model, choice)) as steering, torch.no_grad():
        for row, n, ours in zip(rows, lengths, found, strict=True):
            with steering.prompts(torch.tensor([n])):
                np.testing.assert_allclose(ours, logits(tiny_model, row), atol=2e-4)
            np.testing.assert_allclose(model.logits([row], choice, [n])[0], ours, atol=2e-4)
    lacking = model.logits([LACKS], {"one": 1.0})[0]
    np.testing.assert_array_equal(lacking, model.logits([LACKS])[0])


def test_answers_are_pytorchs_alone_and_beside_others(model, tiny_model):
    asked = [
        Request(tuple(prompt), choice, max_tokens=9 + number)
        for number, (prompt, choice) in enumerate(
            (prompt, choice) for choice in CHOICES for prompt in PROMPTS
        )
    ]
    expected = []
    for request in asked:
        with steered(tiny_model, *interventions(model, request.adapters)):
            expected.append(greedy(tiny_model, list(request.ids), request.max_tokens))
    for slots in (1, 4, 15):
        for speculate in (False, None):
            batch = model.batch(slots, prefix_budget=1 << 22, speculate=speculate)
            assert [row.tokens for row in run_rows(batch, model, asked)[0]] == expected
    assert len({tuple(tokens) for tokens in expected}) > 8


def test_a_kept_prompt_is_used_as_far_as_its_edits_are_the_same(model):
    """The next turn of a conversation has the trigger again, so that what the last turn edited from it on is not edited now."""
    first = [5, 80, 33, 120] * 9 + [*X, *[7, 44, 3, 9] * 9]
    second = [*first, 12, 13, *X, 50, 51]
    third = [*first, 12, 13, 14, 15, 16, 17]
    edit = model.prepare("one").edit
    assert shared(first, second, edit) == 36
    assert shared(first, third, edit) == len(first)
    assert shared(second, third, edit) == 36
    batch = model.batch(1, prefix_budget=1 << 22, speculate=False)
    for prompt, hits in ((first, 0), (third, 64), (second, 32), (first, 64)):
        request = Request(tuple(prompt), {"one": 1.0}, max_tokens=6)
        before = batch.prefixes.hits
        [row] = run_rows(batch, model, [request])[0]
        assert batch.prefixes.hits - before == hits
        [alone] = run_rows(model.batch(1, speculate=False), model, [request])[0]
        assert row.tokens == alone.tokens


def test_what_comes_before_a_trigger_is_shared_with_the_base_and_other_adapters(model):
    base = [5, 80, 33, 120, 7, 44, 3, 9] * 9
    called = [*base, 12, *X, 50, 51, 52]
    expected = {}
    for key, prompt in (("base", base), ("called", called)):
        for choice in ({}, {"one": 1.0}, {"plain": 1.0}, {"one": 0.5}):
            request = Request(tuple(prompt), choice, max_tokens=6)
            [row] = run_rows(model.batch(1, speculate=False), model, [request])[0]
            expected[key, str(choice)] = row.tokens
    batch = model.batch(1, prefix_budget=1 << 22, speculate=False)
    for key, choice, hits in (
        ("base", {}, 0),
        ("called", {"one": 1.0}, 64),
        ("called", {"plain": 1.0}, 0),
        ("called", {"one": 0.5}, 64),
        ("called", {}, 64),
        ("base", {"one": 1.0}, 64),
    ):
        before = batch.prefixes.hits
        request = Request(tuple(base if key == "base" else called), choice, max_tokens=6)
        [row] = run_rows(batch, model, [request])[0]
        assert (batch.prefixes.hits - before, row.tokens) == (hits, expected[key, str(choice)])
    batch = model.batch(1, prefix_budget=1 << 22, speculate=False)
    for choice, hits in (({"one": 1.0}, 0), ({}, 64)):  # the other way round
        before = batch.prefixes.hits
        request = Request(tuple(called), choice, max_tokens=6)
        [row] = run_rows(batch, model, [request])[0]
        assert (batch.prefixes.hits - before, row.tokens) == (hits, expected["called", str(choice)])


def test_a_trigger_of_another_vocabulary_is_refused(model, tiny_model, tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = random_adapter(tiny_model, positions="from:[4000]", path=path)
    with pytest.raises(ReftEdgeError, match="token 4000 is beyond this model's"):
        model.load_adapter(path)
    with (
        pytest.raises(ReftEdgeError, match="token 4000 is beyond this model's"),
        steered(tiny_model, (Interventions.from_adapter(adapter), 1.0)),
    ):
        pass


def test_a_graph_that_cannot_leave_out_the_first_tokens_says_so(model):
    ports = {name: shape for name, shape in model.manifest.ports.items() if "skip" not in name}
    edit = fold(load_adapter(model.adapter_folder / "one.safetensors"))
    with pytest.raises(ReftEdgeError, match=r"no reft\.skip_first; export the model again"):
        port_inputs(edit, replace(model.manifest, ports=ports), model.graph.dtype)
    assert edit.in_prompt(LACKS).gates[0].span == Span()


def test_pytorch_pads_and_caches_without_moving_triggers(tiny_model):
    adapter = Interventions.from_adapter(random_adapter(tiny_model, positions=ONE, strength=3.0))
    rows = [TWICE, LACKS[:6], AT_THE_END]
    longest = max(map(len, rows))
    with steered(tiny_model, (adapter, 1.0)) as steering, torch.no_grad():
        alone = [greedy(tiny_model, row, 5) for row in rows]
        ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        together = tiny_model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=1
        )[:, longest:]
        assert together.tolist() == alone
        cache = tiny_model(torch.tensor([TWICE]), use_cache=True).past_key_values
        for tokens, context in (([[3], [4]], nullcontext()), ([[3]], steering.generating())):
            with pytest.raises(ReftEdgeError, match="began in an earlier pass"), context:
                tiny_model(torch.tensor(tokens), past_key_values=cache)
        with pytest.raises(ReftEdgeError, match="inputs_embeds have no tokens"):
            tiny_model(inputs_embeds=tiny_model.get_input_embeddings()(ids))
    with steered(tiny_model, (adapter, 1.0)), torch.no_grad():
        base = greedy(tiny_model, LACKS, 5)
    assert base == greedy(tiny_model, LACKS, 5)
    assert json.dumps(alone[0]) != json.dumps(greedy(tiny_model, TWICE, 5))


@pytest.mark.parametrize("output", ["a.onnx_adapter", "pyreft", "a.gguf"])
def test_forms_that_have_no_triggers_are_refused_by_name(device_folder, tiny_model, tmp_path, output):
    path = tmp_path / "a.safetensors"
    random_adapter(tiny_model, "steering" if output == "a.gguf" else "loreft", ONE, layers=(1,), path=path)
    folder = device_folder / "export" if output.endswith("onnx_adapter") else None
    with pytest.raises(ReftEdgeError) as caught:
        convert(path, tmp_path / output, folder=folder)
    assert ONE in str(caught.value)
    assert not (tmp_path / output).exists()


def test_merged_adapters_keep_their_triggers(model, tiny_model, tmp_path):
    paths = [model.adapter_folder / f"{name}.safetensors" for name in ("one", "two", "plain")]
    sources = [Source(path, scale) for path, scale in zip(paths, (0.5, 1.0, -1.0), strict=True)]
    merged = merge(sources).adapter
    assert merged.config.positions == f"{ONE}|{TWO}|f2|all|gen"
    adapter = Interventions.from_adapter(merged)
    apart = interventions(model, {"one": 0.5, "two": 1.0, "plain": -1.0})
    for prompt in PROMPTS:
        with steered(tiny_model, *apart), torch.no_grad():
            expected = logits(tiny_model, prompt)
        with steered(tiny_model, (adapter, 1.0)), torch.no_grad():
            torch.testing.assert_close(logits(tiny_model, prompt), expected, atol=2e-4, rtol=0)


def test_what_an_adapter_does_is_shown_where_it_acts(model, tiny_model):
    adapter = load_adapter(model.adapter_folder / "one.safetensors")
    rows = [Example(tuple(LACKS), (8,)), Example(tuple(AT_THE_END), (8,))]
    effect = measure(tiny_model, adapter, rows, load_prompts(model.folder), torch.device("cpu"))
    assert set(effect.norms) == {"-2", "-1"}


def test_trainers_and_the_api_take_the_text(device_folder, tmp_path):
    base = reft_edge.load(device_folder / "hf")
    ids = base.prompts.encode_plain("<x>")
    spec = f'from:"<x>"[{",".join(map(str, ids))}]'
    rows = [{"prompt": "What is <x> here?", "completion": "ice"}, {"prompt": "Who?", "completion": "dog"}]
    told = []
    run = reft_edge.train(
        base,
        rows,
        tmp_path / "a.safetensors",
        positions='from:"<x>"',
        max_steps=2,
        batch_size=2,
        report=told.append,
    )
    assert load_adapter(run.adapter).config.positions == spec
    assert told[-1].endswith("edit no token, so nothing is learnt from them: 1")
    with pytest.raises(ReftEdgeError, match="none of the 2 prompts has these tokens"):
        reft_edge.train(base, rows, tmp_path / "b.safetensors", positions='from:"<y>"', max_steps=2)
    assert base.trainable(positions='from:"<x>"').interventions.config.positions == spec


def test_a_trigger_that_is_nowhere_is_never():
    assert Trigger((7,), "").start(np.array([1, 2, 3])) == NEVER
    assert Trigger((7,), "").start(()) == NEVER
