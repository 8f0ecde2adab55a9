"""Position specs: at which tokens of a row an intervention acts.

A spec joins parts with `+`:

    f7      the first 7 tokens of the prompt
    l7      its last 7 tokens
    all     every prompt token
    gen     every generated token
    gen5    the first 5 generated tokens

`fN` and `lN` are each limited to half the prompt's length, as pyreft limits them, so that they never meet. What `-` sets apart
is never edited, by no part: `all-f1` is every prompt token but the first, `all+gen-f1-l2` every token but the prompt's first and
last two. Such counts are not limited.
Untied, every part has weights of its own; tied, one set of weights serves all parts. A merged adapter can have groups
that no such spec says: `|` sets them apart, each with one set of weights for its parts, as in `f7+l7|all+gen`. Groups
may overlap; where they do, both edits are computed from the same hidden state and add up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from reft_edge.errors import ReftEdgeError

UNLIMITED = 2**31 - 1
_COUNTED = {"f": "first", "l": "last", "gen": "after"}
_SKIPPED = {"f": "skip_first", "l": "skip_last"}
_MAX_COUNT = 9_999_999
MAX_GROUPS = 64
"""Position groups of one adapter: every step of a model opens and shuts each group's gate at every token."""
_MAX_SPEC = 4000
"""Characters of a spec; the longest that says MAX_GROUPS groups is shorter."""


@dataclass(frozen=True)
class Span:
    """One gate: the first `first` and last `last` prompt tokens, and `after` generated tokens.

    `last = UNLIMITED` means every prompt token, `after = UNLIMITED` every generated one. The prompt's first `skip_first` and
    last `skip_last` tokens are left out.
    """

    first: int = 0
    last: int = 0
    after: int = 0
    skip_first: int = 0
    skip_last: int = 0

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
    kept = (t >= span.skip_first) & (t < n - span.skip_last)
    return ((prefix | suffix) & kept) | generated


def parse_positions(spec: str, tied: bool) -> tuple[Span, ...]:
    """The gates of a spec: one a part if untied, one for all parts if tied, one a group where groups are set
    apart by `|`.

    Raises ReftEdgeError for an unknown, repeated or overlapping part, for a repeated group, and for more than MAX_GROUPS
    groups.
    """
    count = spec.count("|") + 1
    if count > MAX_GROUPS or len(spec) > _MAX_SPEC:
        raise ReftEdgeError(
            f"positions {spec[:40]!r}... have {count:,} groups in {len(spec):,} characters; "
            f"at most {MAX_GROUPS} groups in {_MAX_SPEC:,} characters are accepted"
        )
    return _parse(spec, tied)


@lru_cache(maxsize=256)
def _parse(spec: str, tied: bool) -> tuple[Span, ...]:
    if "|" in spec:
        if tied:
            raise ReftEdgeError(f"positions {spec!r}: `|` already says which parts share weights; drop tied")
        groups = tuple(span for group in spec.split("|") for span in _parse(group, tied=True))
        if len(set(groups)) < len(groups):
            raise ReftEdgeError(f"positions {spec!r}: a group is given twice; name each group once")
        return groups
    parts, skipped = _read_parts(spec)
    if "all" in parts and ("f" in parts or "l" in parts):
        raise ReftEdgeError(
            f"positions {spec!r}: `all` already covers every prompt token; drop the f and l parts"
        )
    if skipped and not any(span.on_prompt for span in parts.values()):
        raise ReftEdgeError(
            f"positions {spec!r}: `-` leaves out tokens of the prompt, and no part edits the prompt; drop it"
        )
    spans = tuple(replace(span, **skipped) if span.on_prompt else span for span in parts.values())
    for name, span in zip(parts, spans, strict=True):
        if _is_empty(span):
            raise ReftEdgeError(
                f"positions {spec!r}: `-` leaves nothing of the part {name}; drop one of them"
            )
    if not tied:
        return spans
    return (
        Span(
            first=max(span.first for span in spans),
            last=max(span.last for span in spans),
            after=max(span.after for span in spans),
            **skipped,
        ),
    )


def _read_parts(spec: str) -> tuple[dict[str, Span], dict[str, int]]:
    """The parts by their names, and what is left out by the names of Span."""
    parts: dict[str, Span] = {}
    skipped: dict[str, int] = {}
    for part in spec.strip().split("+"):
        edited, *left_out = (text.strip() for text in part.split("-"))
        name, span = _parse_part(spec, edited)
        if name in parts:
            raise ReftEdgeError(f"positions {spec!r}: `{name}` is given twice; name each part once")
        parts[name] = span
        for text in left_out:
            match = re.fullmatch(r"(f|l)([1-9][0-9]{0,6})", text)
            if match is None:
                raise ReftEdgeError(
                    f"positions {spec!r}: cannot read {'-' + text!r}; `-` leaves out the prompt's first or last tokens, as in all-f1"
                )
            if _SKIPPED[match[1]] in skipped:
                raise ReftEdgeError(f"positions {spec!r}: `-{match[1]}` is given twice; name each once")
            skipped[_SKIPPED[match[1]]] = int(match[2])
    return parts, skipped


def _is_empty(span: Span) -> bool:
    """Whether what is left out of the prompt is all that a part edits, or no part edits the prompt."""
    if not span.on_prompt:
        return max(span.skip_first, span.skip_last) > 0
    return 0 < span.first <= span.skip_first or 0 < span.last <= span.skip_last


def group_names(spec: str, tied: bool) -> list[str]:
    """What the position groups of a spec are called: its parts, or groups of parts that share their weights."""
    return [_name(span) for span in parse_positions(spec, tied)]


def describe_spans(spans: Sequence[Span]) -> tuple[str, bool]:
    """The spec, and whether it is tied, that `parse_positions` reads as these gates.

    Raises ReftEdgeError for a gate that no spec says.
    """
    groups = [_parts(span) for span in spans]
    if len(groups) == 1:
        return _name(spans[0]), len(groups[0]) > 1
    if any(span.skip_first or span.skip_last for span in spans):
        return "|".join(_name(span) for span in spans), False
    kinds = "".join("fl" if part == "all" else part[0] for group in groups for part in group)
    plain = all(len(group) == 1 for group in groups) and len(set(kinds)) == len(kinds)
    return ("+" if plain else "|").join("+".join(group) for group in groups), False


def _name(span: Span) -> str:
    left_out = [f"-{kind}{getattr(span, name)}" for kind, name in _SKIPPED.items() if getattr(span, name)]
    return "+".join(_parts(span)) + "".join(left_out)


def _parts(span: Span) -> list[str]:
    parts = []
    if span.first and span.last != UNLIMITED:
        parts.append(f"f{span.first}")
    if span.last:
        parts.append("all" if span.last == UNLIMITED else f"l{span.last}")
    if span.after:
        parts.append("gen" if span.after == UNLIMITED else f"gen{span.after}")
    counts = (span.first, span.last % UNLIMITED, span.after % UNLIMITED, span.skip_first, span.skip_last)
    if not parts or max(counts) > _MAX_COUNT or _is_empty(span):
        raise ReftEdgeError(
            f"no position spec says: the first {span.first} and last {span.last} prompt tokens, without the first "
            f"{span.skip_first} and last {span.skip_last}, and {span.after} generated ones"
        )
    return parts


def _parse_part(spec: str, part: str) -> tuple[str, Span]:
    if part == "all":
        return part, Span(last=UNLIMITED)
    if part == "gen":
        return part, Span(after=UNLIMITED)
    match = re.fullmatch(r"(f|l|gen)([1-9][0-9]{0,6})", part)
    if match is None:
        raise ReftEdgeError(
            f"positions {spec!r}: cannot read {part!r}; join parts like f7, l7, all, gen, gen5 with `+`"
        )
    return match[1], Span(**{_COUNTED[match[1]]: int(match[2])})
