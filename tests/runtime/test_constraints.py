"""Answers of a given form: whatever a random model would say, its answer has the form."""

import json
import re
import shutil
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import Constraint, Engine, QueueFullError, Request, Sampling, SteeredModel
from reft_edge.runtime.sampling import Sampler

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SOME = Sampling(1.0, seed=3)


@pytest.fixture(scope="module")
def model(device_folder):
    model = SteeredModel(device_folder / "export", device="cpu")
    for name in ("first", "everywhere"):
        model.load_adapter(device_folder / f"{name}.safetensors")
    return model


def small_schemas():
    leaves = st.one_of(
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
        st.builds(
            lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
            st.integers(-20, 20),
            st.integers(0, 40),
        ),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.lists(st.sampled_from(["x", "yy", 'q"', "é", 3, None]), min_size=1, unique=True).map(
            lambda values: {"enum": values}
        ),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
    )

    def wider(inner):
        objects = st.dictionaries(st.sampled_from(["a", "b b", "ü"]), inner, max_size=3).map(
            lambda parts: {
                "type": "object",
                "properties": parts,
                "required": list(parts)[:1],
                "additionalProperties": False,
            }
        )
        lists = inner.map(lambda part: {"type": "array", "items": part, "maxItems": 2})
        return objects | lists | st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts})

    return st.recursive(leaves, wider, max_leaves=4)


@settings(max_examples=40)
@given(schema=small_schemas(), temperature=st.sampled_from([0.0, 1.0, 3.0]), seed=st.integers(0, 99))
def test_every_whole_answer_is_valid_under_its_schema(model, schema, temperature, seed):
    sampling = Sampling(temperature, seed=seed)
    answer = model.stream("Who are you?", schema=schema, max_tokens=150, sampling=sampling)
    text = answer.text()
    assert answer.finish_reason in ("stop", "length")
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(text), schema)


def test_a_schema_with_bounds_is_answered_whole(model):
    for seed in range(5):
        answer = model.stream("Hi", schema=PERSON, max_tokens=200, sampling=Sampling(1.0, seed=seed))
        jsonschema.validate(json.loads(answer.text()), PERSON)
        assert answer.finish_reason == "stop"


def test_an_answer_that_is_cut_says_length(model):
    answer = model.stream("Hi", schema=PERSON, max_tokens=4, sampling=SOME)
    text = answer.text()
    assert text.startswith("{")
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 4)


def test_an_answer_that_is_complete_with_its_last_token_says_stop(model):
    answer = model.stream("Hi", constraint=Constraint.regex("[0-9]{3}"), max_tokens=3)
    assert re.fullmatch("[0-9]{3}", answer.text())
    assert answer.finish_reason == "stop"


def test_choices_and_grammars(model):
    words = ["red", 'a "b"\n', "grün 😀", "blue\\"]
    lark = 'start: pair ("," pair)~0..2\npair: "x" NUMBER\nNUMBER: /[0-9]{1,2}/'
    gbnf = 'root ::= "yes" | "no " [a-c]+ "."'
    for seed in range(6):
        sampling = Sampling(1.5, seed=seed)
        options = {"sampling": sampling, "max_tokens": 120}
        assert model.generate("Hi", constraint=Constraint.choices(words), **options) in words
        text = model.generate("Hi", constraint=Constraint.grammar(lark), **options)
        assert re.fullmatch(r"x\d{1,2}(,x\d{1,2}){0,2}", text)
        text = model.generate("Hi", constraint=Constraint.grammar(gbnf), **options)
        assert re.fullmatch(r"yes|no [abc]+\.?", text)


def test_rows_of_a_batch_have_constraints_of_their_own(model):
    constraints = [
        Constraint.json_schema(PERSON),
        None,
        Constraint.choices(["red", "green"]),
        Constraint.regex("[a-f]{4}"),
        None,
    ]
    prompts = ["Who are you?", "ice", "Hi", "fox", "dog"]
    choices = [None, "first", "everywhere", {"first": 0.5}, None]
    for sampling in (Sampling(), SOME):
        options = {"max_tokens": 40, "sampling": sampling}
        alone = [
            model.generate(prompt, choice, constraint=constraint, **options)
            for prompt, choice, constraint in zip(prompts, choices, constraints, strict=True)
        ]
        assert alone[1] == model.generate("ice", "first", **options)
        for size in (1, 2, 5):
            together = model.generate_batch(
                prompts, choices, constraints=constraints, batch_size=size, **options
            )
            assert together == alone
    with pytest.raises(ReftEdgeError, match="2 prompts and 1 constraints"):
        model.generate_batch(["a", "b"], constraints=[None])


def test_a_constraint_that_is_wrong_leaves_the_engine_as_it_was(model):
    engine = Engine(model, slots=2)
    ids = tuple(model.encode("Who are you?", {}))
    deep = Constraint.grammar('start: "a" start "a" | "b"')
    with pytest.raises(ReftEdgeError, match="the regular expression is not usable"):
        engine.submit(Request(ids, constraint=Constraint.regex("(")))
    good = engine.submit(Request(ids, max_tokens=20, constraint=deep))
    other = engine.submit(Request(ids, max_tokens=5))
    text = "".join(piece.text for piece in good)
    assert text.startswith(("a", "b"))
    assert list(other)[-1].finish_reason in ("stop", "length")
    engine.close()


def test_nothing_is_compiled_for_a_request_that_no_queue_takes(model, monkeypatch):
    engine = Engine(model, slots=1, queue_limit=0)
    monkeypatch.setattr("reft_edge.runtime.constraints._compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(QueueFullError):
        engine.submit(Request((1, 2), constraint=Constraint.regex("a")))
    engine.close()


def test_stop_strings_and_log_probabilities_keep_their_meaning(model):
    found = []
    request = Request(
        tuple(model.encode("Hi", {})), max_tokens=9, logprobs=2, constraint=Constraint.choices(["red"])
    )
    batch = model.batch(1)
    batch.add(model.row(request, found.append))
    while not batch.idle:
        batch.step()
    assert "".join(piece.text for piece in found) == "red"
    scores = [score for piece in found for score in piece.tokens]
    assert any(score.logprob < score.top[0][1] for score in scores)  # the model's own, not the constraint's
    text = model.generate("Hi", constraint=Constraint.choices(["one, two"]), stop=[","])
    assert text == "one"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objec"}, "the JSON schema is not usable: Invalid type: objec"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "int"}}}},
            "not usable at properties.a.items: Invalid type: int",
        ),
        (
            {"anyOf": [{"type": "null"}, {"not": {"type": "string"}}]},
            r'not usable at anyOf.1: Unimplemented keys: \["not"\]; leave them out, or add "x-guidance"',
        ),
        (
            {"$defs": {"b": {"type": "string", "pattern": "(a"}}, "$ref": "#/$defs/b"},
            r"not usable at \$defs.b: regex parse error: \(a error: unclosed group",
        ),
        ({"$ref": "https://example.com/x"}, "not present"),
        ({"properties": 5}, "properties must be an object"),
        ({"enum": [float("nan")]}, "cannot be written as JSON"),
        ({"description": "a" * 70_000}, "has 70,019 characters; at most 65,536 are allowed"),
    ],
)
def test_a_schema_that_is_wrong_is_refused_with_the_place(model, schema, message):
    with pytest.raises(ReftEdgeError, match=message):
        model.generate("Hi", schema=schema)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraint.choices([]), "not a list of texts"),
        (lambda: Constraint.choices("red"), "not a list of texts"),
        (lambda: Constraint.regex(""), "the regular expression is empty"),
        (lambda: Constraint.regex("a(b"), "unclosed group"),
        (lambda: Constraint.regex("(?=a)a"), "look-around"),
        (lambda: Constraint.grammar("start: nobody"), r'at 1\(8\): unknown name: "nobody"'),
        (lambda: Constraint.grammar('root ::= "a'), "the grammar is not usable"),
    ],
)
def test_other_constraints_that_are_wrong_are_refused(model, make, message):
    with pytest.raises(ReftEdgeError, match=message):
        model.generate("Hi", constraint=make())


def test_a_schema_and_a_constraint_are_too_much(model):
    with pytest.raises(ReftEdgeError, match="both given"):
        model.generate("Hi", schema=PERSON, constraint=Constraint.regex("a"))


def test_an_answer_that_reaches_a_limit_does_not_end_those_that_follow(model):
    """Some answers bring the lexer of this pattern to its limit; with a lexer that they share, all others would fail too."""
    heavy = Constraint.regex("([a-z]{1,40} ?){1,20}")
    reasons = []
    for seed in range(30):
        answer = model.stream("Hi", constraint=heavy, max_tokens=40, sampling=Sampling(2.0, seed=seed))
        with suppress(ReftEdgeError):
            answer.text()
        reasons.append(answer.finish_reason)
    assert set(reasons[-10:]) & {"stop", "length"}


def test_a_token_that_is_not_allowed_is_never_chosen():
    logits = np.array([9.0, 1.0, -np.inf, 0.5], np.float32)
    assert Sampler(Sampling(), []).choose(logits, np.array([1, 3])) == 1
    sampler = Sampler(Sampling(5.0, seed=0), [])
    assert {sampler.choose(logits, np.array([1, 2, 3])) for _ in range(50)} == {1, 3}
    with pytest.raises(ReftEdgeError, match="gives no chance"):
        Sampler(Sampling(), []).choose(logits, np.array([2]))
    with pytest.raises(ReftEdgeError, match="not finite"):
        Sampler(Sampling(), []).choose(np.array([1.0, np.nan], np.float32), np.array([0]))


def sentencepiece_like():
    """Bytes, characters and a few pieces that begin with a space, as Llama 2's tokenizer has them."""
    pieces = [
        ("<unk>", 0.0),
        *((f"<0x{i:02X}>", -9.0) for i in range(256)),
        *((piece, -3.0) for piece in '▁0123456789{}":,abcdefghijk'),
        *((piece, -2.0) for piece in ("▁{", '▁"', '":', "▁two")),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def with_gaps():
    """Whole words with numbers that are far apart, and no decoder, so that spaces join them."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": 3 * number for number in range(100)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def with_tokenizer(device_folder, folder, tokenizer):
    shutil.copytree(device_folder / "export", folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return SteeredModel(folder, device="cpu")


def test_a_tokenizer_with_bytes_and_spaces_of_its_own(device_folder, tmp_path):
    model = with_tokenizer(device_folder, tmp_path / "m", sentencepiece_like())
    whole = 0
    for seed in range(6):
        options = {"sampling": Sampling(1.0, seed=seed), "max_tokens": 200, "raw": True}
        answer = model.stream("two", schema=PERSON, **options)
        text = answer.text()
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(text), PERSON)
            whole += 1
        assert model.generate("two", constraint=Constraint.choices(["é 😀", "two"]), **options) in (
            "é 😀",
            "two",
        )
    assert whole


def test_a_form_that_no_token_can_begin_is_an_error(device_folder, tmp_path):
    model = with_tokenizer(device_folder, tmp_path / "m", with_gaps())
    with pytest.raises(
        ReftEdgeError, match="no token of this model can continue the answer under the JSON schema"
    ):
        model.generate("w1", schema=PERSON, raw=True)
    free = model.stream("w1", raw=True, max_tokens=3)
    free.text()
    assert free.finish_reason in ("stop", "length")
