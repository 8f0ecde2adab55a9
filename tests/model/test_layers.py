import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import parse_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("3", (3,)),
        ("5;1;3", (1, 3, 5)),
        ("0-2,5", (0, 1, 2, 5)),
        (" 1 - 2 ; 2", (1, 2)),
    ],
)
def test_specs(spec: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(spec, 6) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("6", "no layer 6; the model has layers 0 to 5"),
        ("4-2", "write 2-4"),
        ("a", "cannot read 'a'"),
        ("", "cannot read"),
        ("1;;2", "cannot read"),
        ("-1", "cannot read"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ReftEdgeError, match=message):
        parse_layers(spec, 6)
