"""A merged adapter does what its sources do at once; compression is the best there is and says what it lost."""

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reft_edge.adapter.algebra import Edit, apply, concat, scale, subspace
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import INTERVENTIONS, OF_RANK_1, Adapter
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.adapter.linear import canonical, fold, grouped, unfold
from reft_edge.adapter.merging import Source, compress, merge, parse_columns, parse_source, select
from reft_edge.adapter.positions import Span, describe_spans, parse_positions
from reft_edge.cli import app
from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.model.places import Place
from tests.adapter.test_algebra import LAYERS, D, formula, hidden, make_adapter

SPECS = ["f2+l2", "l3", "all", "gen", "all+gen", "f3+l3+gen", "f7|all", "f2+l2|f3|gen"]
LAYER_SETS = [(0, 2), (1, 2), (2,), (0, 1, 3)]

LOW_RANK = [kind for kind in INTERVENTIONS if kind != "red"]

adapters = st.builds(
    make_adapter,
    intervention=st.sampled_from(LOW_RANK),
    seed=st.integers(0, 999),
    rank=st.integers(1, 4),
    positions=st.sampled_from([spec for spec in SPECS if "|" not in spec]),
    tied=st.booleans(),
    layers=st.sampled_from(LAYER_SETS),
) | st.builds(
    make_adapter,
    intervention=st.sampled_from(LOW_RANK),
    seed=st.integers(0, 999),
    rank=st.integers(1, 4),
    positions=st.sampled_from([spec for spec in SPECS if "|" in spec]),
    layers=st.sampled_from(LAYER_SETS),
)


def same_edit(left: Edit, right: Edit, seed: int, n: int, atol: float = 1e-3) -> None:
    h, t = hidden(seed, 20), np.arange(20)
    for layer in range(LAYERS):
        place = Place(layer)
        np.testing.assert_allclose(
            apply(left, place, h, t, n), apply(right, place, h, t, n), atol=atol, rtol=1e-4
        )


def write(folder: Path, *sources: Adapter) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(sources))]
    for path, adapter in zip(paths, sources, strict=True):
        save_adapter(adapter, path)
    return paths


@given(
    sources=st.lists(st.tuples(adapters, st.floats(-2, 2)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    n=st.integers(0, 18),
)
def test_a_merged_file_is_its_sources_at_once(tmp_path_factory, sources, seed, n):
    paths = write(tmp_path_factory.mktemp("merge"), *(adapter for adapter, _ in sources))
    together = concat([scale(fold(adapter), factor) for adapter, factor in sources])
    if all(factor == 0 for _, factor in sources):
        with pytest.raises(ReftEdgeError, match="empty"):
            merge([Source(path, 0.0) for path in paths])
        return
    scaled = [Source(path, factor) for path, (_, factor) in zip(paths, sources, strict=True)]
    columns = Counter(
        (place, group) for place, part in grouped(together).places.items() for group in part.gates.tolist()
    )
    if len(sources) > 1 and max(columns.values()) > D:
        with pytest.raises(
            ReftEdgeError, match="more than the hidden size 12; merge to a smaller one with --rank"
        ):
            merge(scaled)
        merged = merge(scaled, rank=D)
    else:
        merged = merge(scaled)
    output = paths[0].parent / "merged.safetensors"
    save_adapter(merged.adapter, output)
    same_edit(fold(load_adapter(output)), together, seed, n)
    assert merged.error < 1e-6


@given(adapter=adapters, seed=st.integers(0, 99), n=st.integers(0, 18))
def test_unfolding_undoes_folding(adapter, seed, n):
    edit = fold(adapter)
    again = unfold(edit, Base.of(adapter.config), "chat", {})
    assert again.config.intervention == "nodireft"
    assert len(again.config.spans) == len(adapter.config.spans)
    same_edit(fold(again), edit, seed, n)
    same_edit(grouped(edit), edit, seed, n)


@given(
    spans=st.lists(
        st.builds(
            Span,
            first=st.integers(0, 9),
            last=st.sampled_from([0, 1, 5, 2**31 - 1]),
            after=st.sampled_from([0, 1, 7, 2**31 - 1]),
            skip_first=st.sampled_from([0, 0, 1, 12]),
            skip_last=st.sampled_from([0, 0, 2]),
        ),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_spans_are_described_as_they_are_read(spans):
    spans = [canonical(span) for span in spans]
    spans = list(dict.fromkeys(span for span in spans if span.on_prompt or span.on_generated))
    if any(0 < span.first <= span.skip_first or 0 < span.last <= span.skip_last for span in spans):
        with pytest.raises(ReftEdgeError, match="no position spec"):
            describe_spans(spans)
        return
    if not spans:
        with pytest.raises(ReftEdgeError, match="no position spec"):
            describe_spans([Span()])
        return
    assert list(parse_positions(*describe_spans(spans))) == spans


@pytest.mark.parametrize("span", [Span(after=10**8), Span(first=10**8), Span(last=10**8)])
def test_spans_that_no_spec_says(span):
    with pytest.raises(ReftEdgeError, match="no position spec says"):
        describe_spans([span])


@pytest.mark.parametrize(
    ("spec", "tied", "message"),
    [("f1|f1", False, "given twice"), ("f1|l1", True, "drop tied"), ("f1|", False, "cannot read ''")],
)
def test_bad_groups_are_named(spec, tied, message):
    with pytest.raises(ReftEdgeError, match=message):
        parse_positions(spec, tied)


@given(
    kind=st.sampled_from([kind for kind in INTERVENTIONS if kind not in OF_RANK_1]),
    seed=st.integers(0, 999),
    columns=st.sets(st.integers(0, 3), min_size=1),
    tied=st.booleans(),
)
def test_a_subspace_is_pyrefts_choice_of_columns(kind, seed, columns, tied):
    """pyreft's composition takes `diff[..., columns] @ R[:, columns].T` of each intervention's own rank axis."""
    adapter = make_adapter(kind, seed, rank=4, tied=tied)
    chosen = select(adapter, sorted(columns))
    rest = sorted(set(range(4)) - columns)
    h = hidden(seed, 10).astype(np.float64)
    for i, g in itertools.product(range(2), range(len(adapter.config.spans))):
        parts = formula(chosen, i, g, h) + (formula(select(adapter, rest), i, g, h) if rest else 0)
        np.testing.assert_allclose(parts, formula(adapter, i, g, h), atol=1e-6)
    if tied:
        same_edit(fold(chosen), subspace(fold(adapter), sorted(columns)), seed, 10)


@given(
    act=st.sampled_from(["silu", "gelu"]),
    seed=st.integers(0, 999),
    factors=st.lists(st.floats(-2, 2), min_size=2, max_size=3),
    positions=st.sampled_from(["f2+l2", "all+gen", "l3"]),
)
def test_adapters_of_one_activation_merge(act, seed, factors, positions):
    sources = [
        make_adapter("nodireft", seed + i, rank=i + 1, positions=positions, act_fn=act, layers=LAYER_SETS[i])
        for i in range(len(factors))
    ]
    edit = concat([scale(fold(part), factor) for part, factor in zip(sources, factors, strict=True)])
    if any(factors):
        merged = unfold(edit, Base("base", "0" * 16, D, LAYERS), "raw", {})
        assert (merged.config.intervention, merged.config.act_fn) == ("nodireft", act)
        same_edit(fold(merged), edit, seed, 12)


@given(seed=st.integers(0, 999), tied=st.booleans(), factor=st.floats(0.1, 2))
def test_red_merges_with_red_and_with_vectors(seed, tied, factor):
    sources = [make_adapter(kind, seed, tied=tied) for kind in ("red", "steering", "red")]
    edit = concat([scale(fold(part), factor) for part in sources])
    merged = unfold(edit, Base("base", "0" * 16, D, LAYERS), "raw", {})
    assert merged.config.intervention == "red"
    same_edit(fold(merged), edit, seed, 12)


def test_edits_of_different_kinds_do_not_go_into_one_file(tmp_path):
    red, silu, linear = write(
        tmp_path, make_adapter("red"), make_adapter("nodireft", act_fn="silu"), make_adapter("loreft")
    )
    with pytest.raises(ReftEdgeError, match="elementwise and edits them by low-rank matrices"):
        merge([Source(red), Source(linear)])
    with pytest.raises(ReftEdgeError, match="different activations, linear and silu"):
        merge([Source(silu), Source(linear)])
    for path in (red, silu):
        with pytest.raises(ReftEdgeError, match="only linear edits can be compressed"):
            merge([Source(path)], rank=1)


def test_one_source_keeps_its_intervention(tmp_path):
    (path,) = write(tmp_path, make_adapter("loreft", rank=4, act_fn="relu"))
    sliced = merge([Source(path, columns="1:3")]).adapter
    assert (sliced.config.intervention, sliced.config.rank, sliced.config.act_fn) == ("loreft", 2, "relu")
    assert np.array_equal(sliced.tensors["R"], load_adapter(path).tensors["R"][:, :, 1:3])
    with pytest.raises(
        ReftEdgeError, match="different activations, linear and relu; an adapter file holds one act_fn"
    ):
        merge([Source(path, 0.5)])


@settings(max_examples=40)
@given(seed=st.integers(0, 999), rank=st.integers(1, 9), n=st.integers(4, 18))
def test_compression_is_the_best_of_its_rank_and_says_what_it_lost(seed, rank, n):
    edit = grouped(concat([fold(make_adapter(kind, seed)) for kind in ("loreft", "nodireft", "consreft")]))
    small, losses, error = compress(edit, rank)
    lost = whole = 0.0
    for place, part in edit.places.items():
        for group in range(len(edit.gates)):
            maps = []
            for candidate in (part, small.places[place]):
                chosen = candidate.gates == group
                assert candidate is part or chosen.sum() <= rank
                left = np.concatenate([candidate.A[:, chosen], candidate.b[None, chosen]]).astype(np.float64)
                maps.append(left @ candidate.B[chosen].astype(np.float64))
            values = np.linalg.svd(maps[0], compute_uv=False)
            difference = np.linalg.norm(maps[0] - maps[1])
            best = np.sqrt((values[rank:] ** 2).sum())
            np.testing.assert_allclose(difference, best, atol=1e-4 * np.linalg.norm(maps[0]))
            (loss,) = (found for found in losses if (found.place, found.group) == (place, group))
            np.testing.assert_allclose(loss.error, best / np.linalg.norm(maps[0]), atol=1e-6)
            lost, whole = lost + best**2, whole + np.linalg.norm(maps[0]) ** 2
    np.testing.assert_allclose(error, np.sqrt(lost / whole), atol=1e-6)
    if rank >= 9:
        same_edit(small, edit, seed, n)


def test_a_source_whose_name_is_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    try:
        save_adapter(make_adapter("loreft"), path)
    except ReftEdgeError:
        pytest.skip("this file system has no such names")
    save_adapter(merge([Source(path, 0.5)]).adapter, tmp_path / "merged.safetensors")
    merged = load_adapter(tmp_path / "merged.safetensors").config.training["merged"]
    assert merged[0]["name"] == "caf?.safetensors"


def test_an_adapter_merged_with_itself_compresses_without_loss(tmp_path):
    paths = write(tmp_path, make_adapter("direft", positions="f2+l2"))
    merged = merge([Source(paths[0], 0.25), Source(paths[0], 0.75)], rank=3)
    assert merged.adapter.config.rank == 3
    assert merged.error < 1e-6
    same_edit(fold(merged.adapter), fold(load_adapter(paths[0])), 0, 10)


def test_more_columns_than_the_hidden_size_compress_to_any_rank(tmp_path):
    """The map [h, 1] to the edit has at most `hidden_size` singular values, however many columns and whatever --rank."""
    paths = write(tmp_path, *(make_adapter("nodireft", seed, rank=4) for seed in range(5)))
    merged = merge([Source(path) for path in paths], rank=15)
    assert merged.adapter.config.rank == D
    assert merged.error < 1e-6
    same_edit(fold(merged.adapter), concat([fold(load_adapter(path)) for path in paths]), 0, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", Source(Path("a.safetensors"))),
        ("a.safetensors:0.7", Source(Path("a.safetensors"), 0.7)),
        ("a.safetensors[0:2]", Source(Path("a.safetensors"), 1.0, "0:2")),
        ("x/a.safetensors[1,3]:-2e-1", Source(Path("x/a.safetensors"), -0.2, "1,3")),
        (r"C:\a.safetensors:0.5", Source(Path(r"C:\a.safetensors"), 0.5)),
    ],
)
def test_sources_are_read(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize("text", ["a:b", "a:nan", "a:inf", ""])
def test_bad_sources_are_named(text):
    with pytest.raises(ReftEdgeError, match=r"scale|cannot read"):
        parse_source(text)


def test_a_file_whose_name_looks_like_columns(tmp_path):
    path = tmp_path / "a[0:2]"
    path.touch()
    assert parse_source(str(path)) == Source(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:2", (0, 1)),
        ("2:", (2, 3)),
        (":1", (0,)),
        ("3,0", (0, 3)),
        ("0:2,1:3", (0, 1, 2)),
        (":", (0, 1, 2, 3)),
    ],
)
def test_columns(text, expected):
    assert parse_columns(text, 4) == expected


@pytest.mark.parametrize("text", ["", "4", "0:5", "2:2", "3:1", "-1", "a", "0:1:2", "0,,1"])
def test_bad_columns_are_named(text):
    with pytest.raises(ReftEdgeError, match="columns"):
        parse_columns(text, 4)


def test_what_one_file_cannot_hold_is_refused(tmp_path):
    one = make_adapter("loreft", positions="f1+l1")
    labelled = make_adapter("loreft", positions="f1+l1", labels=("a", "b"), pooling="cls")
    raw = make_adapter("loreft", prompt_format="raw")
    attention = make_adapter("loreft", component="attention")
    other = make_adapter("loreft")
    other = Adapter(type(other.config)(**{**vars(other.config), "base_fingerprint": "1" * 16}), other.tensors)
    base, head, unlike, part, foreign = write(tmp_path, one, labelled, raw, attention, other)
    with pytest.raises(ReftEdgeError, match="nothing to merge"):
        merge([])
    with pytest.raises(BaseMismatchError, match="only adapters of one base"):
        merge([Source(base), Source(foreign)])
    with pytest.raises(ReftEdgeError, match="different prompts"):
        merge([Source(base), Source(unlike)])
    assert merge([Source(base), Source(unlike)], raw=True).adapter.config.prompt_format == "raw"
    with pytest.raises(ReftEdgeError, match="attention and the block"):
        merge([Source(base), Source(part)])
    with pytest.raises(ReftEdgeError, match="a classification head each"):
        merge([Source(head), Source(head)])
    kept = merge([Source(head, 0.5), Source(base)]).adapter
    assert kept.config.labels == ("a", "b")
    assert np.array_equal(kept.tensors["head.weight"], labelled.tensors["head.weight"])
    with pytest.raises(ReftEdgeError, match="at least 1"):
        merge([Source(base)], rank=0)


def test_the_command(tmp_path):
    a, b = write(
        tmp_path, make_adapter("loreft", 1, positions="l3"), make_adapter("steering", 2, positions="all")
    )
    out = tmp_path / "ab.safetensors"
    done = CliRunner().invoke(app, ["merge", f"{a}:0.7", f"{b}:0.3", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "nodireft of rank 3 at 2 layers, positions l3|all" in done.output
    expected = concat([scale(fold(load_adapter(a)), 0.7), scale(fold(load_adapter(b)), 0.3)])
    same_edit(fold(load_adapter(out)), expected, 0, 10)
    done = CliRunner().invoke(app, ["merge", f"{a}[0:2]", str(b), "-o", str(out), "--rank", "1"])
    assert "relative error of the edit: 0." in done.output
    before = out.read_bytes()
    done = CliRunner().invoke(app, ["merge", f"{a}[7]", str(b), "-o", str(out)])
    assert done.exit_code == 1
    assert "the adapter's rank is 3" in done.output
    assert out.read_bytes() == before


def test_the_same_merge_gives_the_same_bytes(tmp_path):
    save_adapter(make_adapter("loreft"), tmp_path / "a.safetensors")
    save_adapter(make_adapter("direft", 1), tmp_path / "b.safetensors")
    contents = set()
    for number in range(6):
        output = tmp_path / f"merged-{number}.safetensors"
        sources = [f"{tmp_path}/a.safetensors:0.5", f"{tmp_path}/b.safetensors"]
        assert CliRunner().invoke(app, ["merge", *sources, "-o", str(output)]).exit_code == 0
        contents.add(output.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("factor", [1e38, -1e38, 3e38, 1e300])
@pytest.mark.parametrize("rank", [None, 1])
def test_scales_that_leave_float32_are_refused(tmp_path, factor, rank):
    save_adapter(make_adapter("loreft"), tmp_path / "a.safetensors")
    adapter = make_adapter("direft", 1)
    adapter.tensors["R"][:] = 40
    save_adapter(adapter, tmp_path / "b.safetensors")
    with pytest.raises(ReftEdgeError, match="not finite in float32"):
        merge([Source(tmp_path / "a.safetensors"), Source(tmp_path / "b.safetensors", factor)], rank)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [3e38, 1e-44, 1e-20, 0.0])
def test_weights_of_any_size_compress_or_are_refused(tmp_path, size):
    adapter = make_adapter("nodireft")
    for tensor in adapter.tensors.values():
        tensor[:] = np.sign(tensor) * np.float32(size)
    save_adapter(adapter, tmp_path / "a.safetensors")
    if size == 3e38:
        with pytest.raises(ReftEdgeError, match="not finite in float32"):
            merge([Source(tmp_path / "a.safetensors")], 1)
        return
    merged = merge([Source(tmp_path / "a.safetensors")], 1).adapter
    assert all(np.isfinite(tensor).all() for tensor in merged.tensors.values())
