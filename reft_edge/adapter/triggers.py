"""Triggers: token sequences of a prompt from which on an adapter acts.

In a position spec a trigger is `from:`, then its text as a JSON string, then its token ids as a JSON list:

    from:"<tool>"[27,14506,29]

The ids are what counts. A user may leave them out, for the model's tokenizer to make them of the text, or leave out the text.
An adapter file has the ids.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError

Tokens = Sequence[int] | NDArray[np.int64]
NEVER = 2**31 - 1
"""Where a trigger starts in a prompt that lacks it."""
MOST_TOKENS = 64
"""Of one trigger."""
_LONGEST_TEXT = 200
_LARGEST_ID = 2**31 - 1
_FORM = re.compile(r'from:\s*("(?:[^"\\]|\\.)*")?\s*(\[[^\]]*\])?')
_IDS = re.compile(r"\[\s*[0-9]{1,10}(\s*,\s*[0-9]{1,10})*\s*\]", re.ASCII)


@dataclass(frozen=True)
class Trigger:
    """A sequence of tokens. A gate that has one is open from the start of the last such sequence in a prompt on."""

    ids: tuple[int, ...] = ()
    """Empty where a user gave the text only."""
    text: str = ""
    """What the tokens stand for, for people."""

    def __str__(self) -> str:
        """As a spec says it, all of it printable."""
        text = json.dumps(self.text, ensure_ascii=False) if self.text else ""
        shown = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
        ids = f"[{','.join(map(str, self.ids))}]" if self.ids else ""
        return f"from:{shown}{ids}"

    def start(self, prompt: Tokens) -> int:
        """Of a prompt's tokens, the number of the first one of the last such sequence; NEVER where there is none.

        Raises ReftEdgeError for a trigger without ids.
        """
        check_ids(self)
        row = np.asarray(prompt, np.int64)
        if len(row) < len(self.ids):
            return NEVER
        windows = np.lib.stride_tricks.sliding_window_view(row, len(self.ids))
        found = np.flatnonzero((windows == np.array(self.ids)).all(axis=1))
        return int(found[-1]) if found.size else NEVER


def take_triggers(spec: str) -> tuple[str, tuple[Trigger, ...]]:
    """The spec with `from:0;`, `from:1;` and so on in place of its triggers, and these.

    Raises ReftEdgeError for a trigger that is none.
    """
    found: list[Trigger] = []

    def taken(match: re.Match[str]) -> str:
        found.append(_read(spec, match[1], match[2]))
        return _place(len(found) - 1)

    return _FORM.sub(taken, spec), tuple(found)


def _place(number: int) -> str:
    return f"from:{number};"


def taken_trigger(part: str, triggers: Sequence[Trigger]) -> Trigger | None:
    """The trigger that a part of such a spec stands for; None for any other part."""
    return next((trigger for number, trigger in enumerate(triggers) if part == _place(number)), None)


def put_back(text: str, triggers: Sequence[Trigger]) -> str:
    """A piece of such a spec as it stood there, for messages."""
    for number, trigger in reversed(list(enumerate(triggers))):
        text = text.replace(_place(number), str(trigger), 1)
    return text


def _read(spec: str, quoted: str | None, ids: str | None) -> Trigger:
    text = _text(spec, quoted) if quoted is not None else ""
    if ids is not None and _IDS.fullmatch(ids) is None:
        raise ReftEdgeError(
            f"positions {spec!r}: cannot read {ids[:40]!r}; token ids are whole numbers, as in from:[27,14506,29]"
        )
    numbers = tuple(int(number) for number in ids[1:-1].split(",")) if ids is not None else ()
    if not (text or numbers):
        raise ReftEdgeError(
            f'positions {spec!r}: `from:` names a text in double quotes, token ids in brackets, or both, as in from:"<tool>" '
            'or from:"<tool>"[27,14506,29]'
        )
    if len(numbers) > MOST_TOKENS:
        raise ReftEdgeError(
            f"positions {spec[:40]!r}...: a trigger of {len(numbers):,} tokens; at most {MOST_TOKENS} are accepted"
        )
    if any(number > _LARGEST_ID for number in numbers):
        raise ReftEdgeError(f"positions {spec!r}: {max(numbers)} is no token id; they end at {_LARGEST_ID}")
    return Trigger(numbers, text)


def _text(spec: str, quoted: str) -> str:
    try:
        text = json.loads(quoted)
        text.encode()
    except (ValueError, UnicodeError) as error:
        raise ReftEdgeError(
            f"positions {spec!r}: cannot read {quoted[:40]}; the text behind `from:` is a JSON string, in which a line break is "
            r"\n, a quote \" and a backslash \\"
        ) from error
    if len(text) > _LONGEST_TEXT:
        raise ReftEdgeError(
            f"positions {spec[:40]!r}...: the text of a trigger has {len(text):,} characters; at most {_LONGEST_TEXT} are accepted"
        )
    return str(text)


def with_tokens(spec: str, encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str]) -> str:
    """The spec with token ids for each trigger that has a text only, and a text for each that has ids only.

    `encode`: a text's tokens, without those that a tokenizer adds by itself. Raises ReftEdgeError for a trigger that is none,
    and for a text of no tokens or too many.
    """
    plain, triggers = take_triggers(spec)
    for number, trigger in reversed(list(enumerate(triggers))):
        plain = plain.replace(_place(number), str(_completed(spec, trigger, encode, decode)), 1)
    return plain


def _completed(
    spec: str, trigger: Trigger, encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str]
) -> Trigger:
    if trigger.ids:
        text = trigger.text or decode(list(trigger.ids))
        return replace(trigger, text=text if len(text) <= _LONGEST_TEXT else "")
    ids = tuple(encode(trigger.text))
    if not 0 < len(ids) <= MOST_TOKENS:
        raise ReftEdgeError(
            f"positions {spec!r}: the text behind `from:` has {len(ids)} tokens; expected 1 to {MOST_TOKENS}"
        )
    return replace(trigger, ids=ids)


def check_ids(trigger: Trigger, count: int | None = None) -> None:
    """Raise ReftEdgeError for a trigger without token ids, or with one that a vocabulary of `count` tokens lacks."""
    if not trigger.ids:
        raise ReftEdgeError(
            f"{trigger} has no token ids, which a tokenizer makes when an adapter is trained; write them behind the text, as "
            'in from:"<tool>"[27,14506,29]'
        )
    if count is not None and max(trigger.ids) >= count:
        raise ReftEdgeError(
            f"the adapter acts {trigger} on, and token {max(trigger.ids)} is beyond this model's {count:,} tokens; the adapter "
            "is of another model, or its file is wrong"
        )
