"""Position specs: at which tokens of a row an intervention acts.

A spec joins parts with `+`:

    f7      the first 7 tokens of the prompt
    l7      its last 7 tokens
    all     every prompt token
    gen     every generated token
    gen5    the first 5 generated tokens
    from:"<tool>"   every token from the last <tool> of the prompt on, and every generated one; none where there is no <tool>

`fN` and `lN` are each limited to half the prompt's length, as pyreft limits them, so that they never meet. What `-` sets apart
is never edited, by no part: `all-f1` is every prompt token but the first, `all+gen-f1-l2` every token but the prompt's first and
last two. Such counts are not limited. `from:` names a trigger (`reft_edge.adapter.triggers`), and no other part stands in
its group.
Untied, every part has weights of its own; tied, one set of weights serves all parts. A merged adapter can have groups
that no such spec says: `|` sets them apart, each with one set of weights for its parts, as in `f7+l7|all+gen`. Groups
may overlap; where they do, both edits are computed from the same hidden state and add up.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from reft_edge.adapter.triggers import NEVER, Tokens, Trigger, put_back, take_triggers, taken_trigger
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
    last `skip_last` tokens are left out. With a `trigger`, what comes before its last occurrence in the prompt is left out,
    too, and everything is where the prompt lacks it: `in_prompt` says where that is.
    """

    first: int = 0
    last: int = 0
    after: int = 0
    skip_first: int = 0
    skip_last: int = 0
    trigger: Trigger | None = field(default=None, kw_only=True)

    @property
    def on_prompt(self) -> bool:
        return self.first > 0 or self.last > 0

    @property
    def on_generated(self) -> bool:
        return self.after > 0

    def start(self, prompt: Tokens) -> int:
        """Of a prompt's tokens, the first that its trigger lets it act on: 0 without a trigger, NEVER where the prompt lacks it."""
        return 0 if self.trigger is None else self.trigger.start(prompt)

    def in_prompt(self, prompt: Tokens) -> "Span":
        """The same gate for this prompt alone, without a trigger."""
        if self.trigger is None:
            return self
        start = self.trigger.start(prompt)
        if start == NEVER:
            return Span()
        return replace(self, trigger=None, skip_first=max(self.skip_first, start))


def active(span: Span, t: Any, n: Any, start: Any = None) -> Any:
    """Where the gate is open: bool, of the broadcast shape of `t` (positions), `n` (prompt lengths) and `start`, which a gate
    with a trigger needs (`Span.start` of each prompt).

    Works on ints, numpy arrays and torch tensors. This is the gate formula of the exported graph.
    """
    prefix = (t < span.first) & (t < n // 2)
    suffix = (t >= n - span.last) & (t < n)
    if span.last != UNLIMITED:
        suffix = suffix & (t >= n - n // 2)
    generated = (t >= n) & (t < n + span.after)
    kept = (t >= span.skip_first) & (t < n - span.skip_last)
    opened = ((prefix | suffix) & kept) | generated
    if span.trigger is None:
        return opened
    if start is None:
        raise ValueError("a gate with a trigger depends on the prompt's tokens")
    return opened & (t >= start)


def triggers_of(spans: Iterable[Span]) -> tuple[Trigger, ...]:
    """Those of gates that have one."""
    return tuple(span.trigger for span in spans if span.trigger is not None)


def meet(one: Span, other: Span) -> bool:
    """Whether both gates are open at some token of some prompt."""
    reached = [UNLIMITED if span.last == UNLIMITED else span.first for span in (one, other)]
    prefixes = max(one.skip_first, other.skip_first) < min(reached)
    suffixes = max(one.skip_last, other.skip_last) < min(one.last, other.last)
    return prefixes or suffixes or min(one.after, other.after) > 0


def parse_positions(spec: str, tied: bool) -> tuple[Span, ...]:
    """The gates of a spec: one a part if untied, one for all parts if tied, one a group where groups are set
    apart by `|`.

    Raises ReftEdgeError for an unknown, repeated or overlapping part, for a repeated group, and for more than MAX_GROUPS
    groups.
    """
    if len(spec) > _MAX_SPEC:
        raise _without_end(spec, spec.count("|") + 1)
    return _parse(spec, tied)


def _without_end(spec: str, groups: int) -> ReftEdgeError:
    return ReftEdgeError(
        f"positions {spec[:40]!r}... have {groups:,} groups in {len(spec):,} characters; "
        f"at most {MAX_GROUPS} groups in {_MAX_SPEC:,} characters are accepted"
    )


@lru_cache(maxsize=256)
def _parse(spec: str, tied: bool) -> tuple[Span, ...]:
    plain, triggers = take_triggers(spec)
    groups = plain.split("|")
    if len(groups) > MAX_GROUPS:
        raise _without_end(spec, len(groups))
    if len(groups) == 1:
        return _parse_group(spec, plain, triggers, tied)
    if tied:
        raise ReftEdgeError(f"positions {spec!r}: `|` already says which parts share weights; drop tied")
    spans = tuple(span for group in groups for span in _parse_group(spec, group, triggers, tied=True))
    if len(set(spans)) < len(spans):
        raise ReftEdgeError(f"positions {spec!r}: a group is given twice; name each group once")
    return spans


def _parse_group(spec: str, group: str, triggers: Sequence[Trigger], tied: bool) -> tuple[Span, ...]:
    """The gates of one group, in which numbers stand for the triggers."""
    parts, skipped = _read_parts(spec, group, triggers)
    if "all" in parts and ("f" in parts or "l" in parts):
        raise ReftEdgeError(
            f"positions {spec!r}: `all` already covers every prompt token; drop the f and l parts"
        )
    if "from" in parts and len(parts) > 1:
        raise ReftEdgeError(
            f"positions {spec!r}: `from:` already covers every token from the trigger on, the generated ones, too; set other "
            "parts apart with `|`, which gives them weights of their own"
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
    if not tied or len(spans) == 1:
        return spans
    return (
        Span(
            first=max(span.first for span in spans),
            last=max(span.last for span in spans),
            after=max(span.after for span in spans),
            **skipped,
        ),
    )


def _read_parts(spec: str, group: str, triggers: Sequence[Trigger]) -> tuple[dict[str, Span], dict[str, Any]]:
    """The parts by their names, and what is left out by the names of Span."""
    parts: dict[str, Span] = {}
    skipped: dict[str, Any] = {}
    for part in group.strip().split("+"):
        edited, *left_out = (text.strip() for text in part.split("-"))
        name, span = _parse_part(spec, edited, triggers)
        if name in parts:
            raise ReftEdgeError(f"positions {spec!r}: `{name}` is given twice; name each part once")
        parts[name] = span
        for text in left_out:
            match = re.fullmatch(r"(f|l)([1-9][0-9]{0,6})", text)
            if match is None:
                raise ReftEdgeError(
                    f"positions {spec!r}: cannot read {'-' + put_back(text, triggers)!r}; `-` leaves out the prompt's first or "
                    "last tokens, as in all-f1"
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
    if any(span.skip_first or span.skip_last or span.trigger for span in spans):
        return "|".join(_name(span) for span in spans), False
    kinds = "".join("fl" if part == "all" else part[0] for group in groups for part in group)
    plain = all(len(group) == 1 for group in groups) and len(set(kinds)) == len(kinds)
    return ("+" if plain else "|").join("+".join(group) for group in groups), False


def _name(span: Span) -> str:
    left_out = [f"-{kind}{getattr(span, name)}" for kind, name in _SKIPPED.items() if getattr(span, name)]
    return "+".join(_parts(span)) + "".join(left_out)


def _parts(span: Span) -> list[str]:
    parts = []
    if span.trigger is not None:
        if (span.first, span.last, span.after) != (0, UNLIMITED, UNLIMITED):
            raise ReftEdgeError(
                f"no position spec says that a gate opens {span.trigger} on for some tokens only"
            )
        return [str(span.trigger)]
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


def _parse_part(spec: str, part: str, triggers: Sequence[Trigger]) -> tuple[str, Span]:
    if part == "all":
        return part, Span(last=UNLIMITED)
    if part == "gen":
        return part, Span(after=UNLIMITED)
    if (trigger := taken_trigger(part, triggers)) is not None:
        return "from", Span(last=UNLIMITED, after=UNLIMITED, trigger=trigger)
    match = re.fullmatch(r"(f|l|gen)([1-9][0-9]{0,6})", part)
    if match is None:
        raise ReftEdgeError(
            f"positions {spec!r}: cannot read {put_back(part, triggers)!r}; join parts like f7, l7, all, gen, gen5 with `+`, or "
            'name a trigger, as in from:"<tool>"'
        )
    counted: dict[str, Any] = {_COUNTED[match[1]]: int(match[2])}
    return match[1], Span(**counted)
