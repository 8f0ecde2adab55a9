"""Position specs: at which tokens of a row an intervention acts.

A spec joins parts with `+`:

    f7      the first 7 tokens of the prompt
    l7      its last 7 tokens
    all     every prompt token
    gen     every generated token

`fN` and `lN` are each limited to half the prompt's length, as pyreft limits them, so that they never meet.
Untied, every part has weights of its own; tied, one set of weights serves all parts.
"""

import re
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Span:
    """One gate: the first `first` and last `last` prompt tokens, and `after` generated tokens.

    `last = UNLIMITED` means every prompt token, `after = UNLIMITED` every generated one.
    """

    first: int = 0
    last: int = 0
    after: int = 0

    @property
    def on_prompt(self) -> bool:
        return self.first > 0 or self.last > 0

    @property
    def on_generated(self) -> bool:
        return self.after > 0


def active(span: Span, t: Any, n: Any) -> Any:
    """Where the gate is open: bool, of the broadcast shape of `t` (positions) and `n` (prompt lengths).

    Works on ints, numpy arrays and torch tensors. This is the gate formula of the exported graph.
    """
    prefix = (t < span.first) & (t < n // 2)
    suffix = (t >= n - span.last) & (t < n)
    if span.last != UNLIMITED:
        suffix = suffix & (t >= n - n // 2)
    generated = (t >= n) & (t < n + span.after)
    return prefix | suffix | generated


def parse_positions(spec: str, tied: bool) -> tuple[Span, ...]:
    """The gates of a spec: one a part if untied, one for all parts if tied.

    Raises ReftEdgeError for an unknown, repeated or overlapping part.
    """
    parts: dict[str, Span] = {}
    for part in spec.strip().split("+"):
        name, span = _parse_part(spec, part.strip())
        if name in parts:
            raise ReftEdgeError(f"positions {spec!r}: `{name}` is given twice; name each part once")
        parts[name] = span
    if "all" in parts and ("f" in parts or "l" in parts):
        raise ReftEdgeError(
            f"positions {spec!r}: `all` already covers every prompt token; drop the f and l parts"
        )
    if not tied:
        return tuple(parts.values())
    return (
        Span(
            first=max(span.first for span in parts.values()),
            last=max(span.last for span in parts.values()),
            after=max(span.after for span in parts.values()),
        ),
    )


def _parse_part(spec: str, part: str) -> tuple[str, Span]:
    if part == "all":
        return part, Span(last=UNLIMITED)
    if part == "gen":
        return part, Span(after=UNLIMITED)
    match = re.fullmatch(r"([fl])([1-9]\d{0,6})", part)
    if match is None:
        raise ReftEdgeError(
            f"positions {spec!r}: cannot read {part!r}; join parts like f7, l7, all, gen with `+`"
        )
    count = int(match[2])
    return match[1], Span(first=count) if match[1] == "f" else Span(last=count)
