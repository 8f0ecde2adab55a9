"""The shapes of rows that are known, told by their columns, and what each is read as."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError


@dataclass(frozen=True)
class Shape:
    """A kind of rows."""

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Those of them that a row may lack."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Those that every row has."""
        return tuple(name for name in self.columns if name not in self.optional)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has what every row of this shape has."""
        return all(row.get(name) is not None for name in self.needed)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.needed)})"


MESSAGES = Shape("conversations", ("messages", "tools"), ("tools",))
SHAREGPT = Shape("ShareGPT", ("conversations", "system", "tools"), ("system", "tools"))
PAIRS = Shape("preferences", ("prompt", "chosen", "rejected", "tools"), ("prompt", "tools"))
PROMPTED = Shape("prompts and completions", ("prompt", "completion", "tools"), ("tools",))
ALPACA = Shape("Alpaca", ("instruction", "input", "output"), ("input",))
LABELLED = Shape("labelled texts", ("text", "text2", "label"), ("text2",))
QUESTIONS = Shape("questions", ("prompt", "choices", "answer"), ("choices",))

COMPLETIONS = (MESSAGES, SHAREGPT, PROMPTED, ALPACA)
"""Those that say what a model answers."""
_MEANT = {
    PAIRS: "train them with --task preference",
    LABELLED: "train an encoder on them with --task classification",
    QUESTIONS: "they are for `reft-edge eval`",
}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "function_call",
}
"""ShareGPT's names of who speaks."""


@dataclass(frozen=True)
class Recognised:
    """What was read, for people and programs."""

    source: str
    rows: int
    shape: str

    def __str__(self) -> str:
        return f"read {self.rows:,} row{'' if self.rows == 1 else 's'} of {self.source} as {self.shape}"


class Recogniser:
    """Tells the one shape that all rows of a source have."""

    def __init__(self, known: Sequence[Shape]) -> None:
        """`known`: the shapes that the task takes, those to be preferred first."""
        self.known = known
        self.shape: Shape | None = None
        self._columns: tuple[str, ...] = ()
        self._rows = 0

    def __call__(self, row: Any) -> Shape:
        """The row's shape. Raises ReftEdgeError if it is not known, or not that of the rows before."""
        if not isinstance(row, dict):
            raise ReftEdgeError(f"expected an object with named fields, found {type(row).__name__}")
        shape = next((shape for shape in self.known if shape.fits(row)), None)
        if self.shape is None or shape is self.shape:
            if shape is None:
                raise ReftEdgeError(_unknown(row, self.known))
            self.shape = shape
            self._rows += 1
            self._columns = tuple(
                name for name in shape.columns if name in (*shape.needed, *self._columns) or row.get(name)
            )
            return shape
        found = f"this one is {shape}" if shape is not None else f"this one has {_columns(row)}"
        raise ReftEdgeError(
            f"the rows before are {self.shape}, and {found}; give rows of one shape, or a file for each"
        )

    def recognised(self, source: object) -> Recognised | None:
        """What was read; None if there were no rows."""
        if self.shape is None:
            return None
        return Recognised(str(source), self._rows, f"{self.shape.name} ({', '.join(self._columns)})")


def _columns(row: Mapping[str, Any]) -> str:
    names = [repr(str(name)) for name in sorted(row)]
    return f"the columns {', '.join(names)}" if names else "no columns"


def _unknown(row: Mapping[str, Any], known: Sequence[Shape]) -> str:
    for shape, advice in _MEANT.items():
        if shape not in known and shape.fits(row):
            return f"the rows are {shape}: {advice}"
    shapes = "; ".join(", ".join(shape.needed) for shape in known)
    return (
        f"its shape is not known: it has {_columns(row)}; expected those of one of these: {shapes}. "
        "--columns says which column is which, as in --columns prompt=question,completion=answer"
    )


def as_completion(shape: Shape, row: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A row of COMPLETIONS as `{"prompt", "completion"}` or `{"messages"}`, with `tools`; and how many of its messages are
    only context, since the row has them as its prompt.

    Raises ReftEdgeError, saying what is wrong, where a column does not hold what its shape says.
    """
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    old = {name: row[name] for name in ("functions", "function_call") if row.get(name)}
    if shape is SHAREGPT:
        return {"messages": _turns(row), **tools, **old}, 0
    if shape is ALPACA:
        return {"prompt": alpaca_prompt(row), "completion": _text(row, "output")}, 0
    if shape is MESSAGES:
        return {"messages": parsed(row, "messages"), **tools, **old}, 0
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": [*prompt, *completion], **tools, **old}, len(prompt)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ReftEdgeError(
            "one of `prompt` and `completion` is a list of messages; expected two texts, or two lists"
        )
    return {"prompt": prompt, "completion": completion, **tools, **old}, 0


def as_pair(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A preference as two rows of one prompt, `{"prompt", "completion"}` or `{"messages"}`: chosen and rejected.

    Of conversations, `prompt` may be a text, a list of messages, or missing where both hold it. Raises ReftEdgeError for
    answers to different prompts, and for columns that hold something else.
    """
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if isinstance(chosen, list) and isinstance(rejected, list):
        one, other = (_whole(prompt, answer) for answer in (chosen, rejected))
        if one[:-1] != other[:-1]:
            raise ReftEdgeError(
                "the chosen and the rejected conversation differ before their last message; expected two answers to one prompt"
            )
        return {"messages": one, **tools}, {"messages": other, **tools}
    if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        raise ReftEdgeError(
            f'expected text under "prompt", "chosen" and "rejected", or lists of messages; found {sorted(row)}'
        )
    return (
        {"prompt": prompt, "completion": chosen, **tools},
        {"prompt": prompt, "completion": rejected, **tools},
    )


def _whole(prompt: Any, answer: list[Any]) -> list[Any]:
    """The conversation that an answer's messages end: some files repeat the prompt in them."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    asked = any(isinstance(message, dict) and message.get("role") == "user" for message in answer)
    return answer if asked else [*before, *answer]


def as_question(shape: Shape, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row to be answered as `{"prompt", "answer"}`, with `choices` where it has some, or `{"text", "label"}`.

    A preference is a choice between its two answers. Other shapes are questions if they have one prompt and one answer, as
    text; Alpaca rows may have the `answer` beside their output. Raises ReftEdgeError for others.
    """
    if shape is LABELLED:
        return dict(row)
    if shape is QUESTIONS:
        return {**row, "choices": parsed(row, "choices")} if row.get("choices") is not None else dict(row)
    if shape is PAIRS:
        one, other = (_asked(side) for side in as_pair(row))
        return {"prompt": one[0], "choices": [one[1], other[1]], "answer": one[1]}
    plain, _ = as_completion(shape, row)
    prompt, answer = _asked(plain)
    return {"prompt": prompt, "answer": row.get("answer", answer)}


def _asked(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and answer of a row that has one of each."""
    if "messages" not in row:
        return row["prompt"], row["completion"]
    messages = row["messages"] if isinstance(row["messages"], list) else []
    given = [
        (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        for message in messages
    ]
    if [role for role, _ in given] != ["user", "assistant"] or not all(
        isinstance(text, str) for _, text in given
    ):
        raise ReftEdgeError("only conversations of one question and one answer, both text, can be evaluated")
    return str(given[0][1]), str(given[1][1])


def alpaca_prompt(row: Mapping[str, Any]) -> str:
    """The instruction, and its input behind an empty line where there is one."""
    given = _text(row, "input") if row.get("input") is not None else ""
    return _text(row, "instruction") + (f"\n\n{given}" if given.strip() else "")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ReftEdgeError(f"expected text under `{name}`, found {type(value).__name__}")
    return value


def parsed(row: Mapping[str, Any], name: str) -> Any:
    """A column's list, which CSV and some datasets hold as JSON text. Raises ReftEdgeError for text that is not JSON."""
    value = row.get(name)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(f"the text under `{name}` is not valid JSON ({error})") from error


def _turns(row: Mapping[str, Any]) -> list[Any]:
    """ShareGPT's turns as messages; those that are messages already stay."""
    turns = parsed(row, "conversations")
    if not isinstance(turns, list):
        raise ReftEdgeError(f"expected a list under `conversations`, found {type(turns).__name__}")
    system = row.get("system")
    start = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [*start, *(_turn(turn) for turn in turns)]


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise ReftEdgeError(f"a turn is from {turn['from']!r}; expected one of {', '.join(_ROLES)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if role != "function_call":
        return {**rest, "role": role, "content": turn.get("value")}
    try:
        call = json.loads(turn.get("value"))  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError) as error:
        raise ReftEdgeError(f"the value of a function_call is not valid JSON ({error})") from error
    calls = call if isinstance(call, list) else [call]
    return {
        **rest,
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }
