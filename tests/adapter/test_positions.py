import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.adapter.positions import UNLIMITED, Span, active, group_names, parse_positions
from reft_edge.errors import ReftEdgeError


def open_at(spec: str, n: int, total: int, tied: bool = True) -> list[list[int]]:
    return [
        np.flatnonzero(active(span, np.arange(total), n)).tolist() for span in parse_positions(spec, tied)
    ]


@pytest.mark.parametrize(
    ("spec", "n", "expected"),
    [
        ("f3", 10, [[0, 1, 2]]),
        ("l2", 10, [[8, 9]]),
        ("f3+l2", 10, [[0, 1, 2, 8, 9]]),
        ("all", 4, [[0, 1, 2, 3]]),
        ("gen", 4, [[4, 5, 6, 7, 8, 9, 10, 11]]),
        ("all+gen", 4, [list(range(12))]),
        ("f7+l7", 5, [[0, 1, 3, 4]]),
        ("f7+l7", 1, [[]]),
        ("f1+gen", 8, [[0, 8, 9, 10, 11]]),
        ("gen2", 4, [[4, 5]]),
        ("all+gen1", 3, [[0, 1, 2, 3]]),
        ("gen9999999", 10, [[10, 11]]),
        ("all-f1", 4, [[1, 2, 3]]),
        ("all-l2", 4, [[0, 1]]),
        ("all-f1-l1", 2, [[]]),
        ("all+gen-f1-l2", 6, [[1, 2, 3, 6, 7, 8, 9, 10, 11]]),
        ("all+gen-f9", 6, [[6, 7, 8, 9, 10, 11]]),
        ("all+gen-l9", 6, [[6, 7, 8, 9, 10, 11]]),
        ("f4 - f1 + l3 - l1", 10, [[1, 2, 3, 7, 8]]),
        ("f7+l7-f1", 5, [[1, 3, 4]]),
        ("all-f1", 1, [[]]),
    ],
)
def test_tokens_of_a_tied_spec(spec: str, n: int, expected: list[list[int]]) -> None:
    assert open_at(spec, n, 12) == expected


def test_untied_parts_have_gates_of_their_own() -> None:
    assert open_at("f2+l3+gen", 10, 12, tied=False) == [[0, 1], [7, 8, 9], [10, 11]]
    assert parse_positions("all+gen", tied=True) == (Span(last=UNLIMITED, after=UNLIMITED),)


@given(first=st.integers(1, 20), last=st.integers(1, 20), n=st.integers(0, 60))
def test_prefix_and_suffix_are_pyrefts(first: int, last: int, n: int) -> None:
    """pyreft 0.1.0 takes min(first, n // 2) tokens from the front and min(last, n // 2) from the back."""
    front, back = min(first, n // 2), min(last, n // 2)
    prefix, suffix = open_at(f"f{first}+l{last}", n, n + 5, tied=False)
    assert prefix == list(range(front))
    assert suffix == list(range(n - back, n))
    assert not set(prefix) & set(suffix)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "f",
        "f0",
        "l-1",
        "x3",
        "f3,l3",
        "f3+f4",
        "all+l3",
        "gen+gen",
        "gen+gen3",
        "gen2+gen3",
        "gen0",
        "gen-1",
        "gen01",
        "gen12345678",
        "all2",
        "f99999999",
        "+",
        "f٣",
        "gen-f1",
        "all-f0",
        "all-gen",
        "all-f1-f2",
        "all-",
        "f3-f3",
        "l2-l3",
        "-f1",
        "all--f1",
        "f3+l9-f3",
    ],
)
def test_bad_specs_are_named(spec: str) -> None:
    with pytest.raises(ReftEdgeError, match="positions"):
        parse_positions(spec, tied=False)


def test_what_is_left_out_holds_for_all_parts_of_a_group() -> None:
    untied = [[1, 2], [8, 9], [10, 11]]
    for spec in ("f3+l2+gen-f1", "f3-f1+l2+gen", "f3-f1|l2-f1|gen"):
        assert open_at(spec, 10, 12, tied=False) == untied
    assert group_names("f3+l2 + gen-f1", False) == ["f3-f1", "l2-f1", "gen"]
    assert group_names("gen5+all-l1-f2", True) == ["all+gen5-f2-l1"]
    for spec, message in (
        ("gen-f1", "no part edits the prompt"),
        ("f3-f3", "nothing of the part f"),
        ("all-gen", "cannot read '-gen'"),
        ("all-l1+gen-l2", "`-l` is given twice"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            parse_positions(spec, tied=False)


@pytest.mark.parametrize(
    "spec",
    [
        "|".join(f"f{i}" for i in range(1, 100_001)),
        "|".join(["all"] * 65),
        "f1" + " " * 5000,
        "+".join(["f1"] * 1800),
    ],
)
def test_specs_without_end_are_refused_before_they_are_read(spec: str) -> None:
    with pytest.raises(ReftEdgeError, match="at most 64 groups in 4,000 characters") as caught:
        parse_positions(spec, tied=False)
    assert len(str(caught.value)) < 300


def test_as_many_groups_as_are_allowed() -> None:
    spec = "|".join(f"f{9_999_900 + i}+l9999999+gen9999999-f9999899-l9999998" for i in range(64))
    assert len(parse_positions(spec, tied=False)) == 64
