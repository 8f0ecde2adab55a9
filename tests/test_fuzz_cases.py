"""What fuzzing found, and the seeds that it begins with, through the same readers and under the same limits."""

import random
import sys
import time
from pathlib import Path

import pytest

from reft_edge.errors import LONGEST, ReftEdgeError

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))
from harness import SECONDS, attempt
from mutate import FRAMES
from targets import TARGETS, make_target

CASES = Path(__file__).parent / "fuzz_cases"


@pytest.mark.parametrize(
    "case", sorted(CASES.glob("*/*")), ids=lambda case: f"{case.parent.name}-{case.name}"
)
def test_found_cases_are_refused_in_plain_words(case: Path) -> None:
    target = make_target(case.parent.name)
    started = time.monotonic()
    assert not attempt(target.read, case.read_bytes())
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_reach_the_end(name: str) -> None:
    target = make_target(name)
    assert [attempt(target.read, seed) for seed in target.seeds] == [
        number < target.accepted for number in range(len(target.seeds))
    ]


@pytest.mark.parametrize("name", FRAMES)
def test_a_few_mutations(name: str) -> None:
    """The mutator makes other inputs, some well-formed, and none is a finding."""
    target, source = make_target(name), random.Random(0)
    changed = accepted = 0
    for _ in range(300):
        seed = source.choice(target.seeds[: target.accepted])
        try:
            content = FRAMES[name](seed, source)
        except ValueError:
            continue
        changed += content != seed
        accepted += attempt(target.read, content)
    assert changed > 200
    if name != "signature":
        assert accepted > 0


def test_the_harness_notices() -> None:
    """What is no refusal, says too much or takes too much memory is a finding."""

    class EndlessError(ReftEdgeError):
        def __str__(self) -> str:
            return str(self.args[0])

    def crash(content: bytes) -> None:
        raise KeyError("x")

    def tell(content: bytes) -> None:
        raise ReftEdgeError(content.decode())

    def talk(content: bytes) -> None:
        raise EndlessError(content.decode())

    def swell(content: bytes) -> None:
        bytearray(1 << 30)[:: 1 << 12] = b"x" * (1 << 18)

    with pytest.raises(KeyError):
        attempt(crash, b"")
    with pytest.raises(AssertionError, match="an error of 5000 characters"):
        attempt(talk, b"x" * 5000)
    assert not attempt(tell, b"x" * 5000)
    assert not attempt(tell, b"\x1b[2J")
    with pytest.raises(AssertionError, match="bytes of memory"):
        attempt(swell, b"")


def test_errors_are_what_a_terminal_can_show() -> None:
    assert str(ReftEdgeError("\x1b[2J é\n\ud800")) == "\\x1b[2J é\n\\ud800"
    told = str(ReftEdgeError("begins " + "\x07" * 10**6 + " ends"))
    assert len(told) < LONGEST + 10
    assert told.startswith("begins \\x07")
    assert told.endswith("\\x07 ends")
