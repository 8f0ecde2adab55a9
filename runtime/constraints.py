"""Answers of a given form: the tokens that a JSON schema, a regular expression, a list of choices or a grammar allows next.

The work is done by `llguidance`, of the extra `structured`.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.model.prompts import encode
from reft_edge.runtime.schema_places import inside
from reft_edge.runtime.token_bytes import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

LONGEST = 1 << 16
"""Characters of one constraint, at most."""
_MOST_STATES = 20_000
"""Of a grammar's lexer; each takes one or two kilobytes."""
_FUEL = 100_000
"""For the first look at a grammar's patterns: with more, a nested repetition takes a second and 200 MB."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written, where a schema's `x-guidance` says nothing else: in one line, so that what stands between the values is
known, and need not be chosen token by token. With free space, a model can write spaces until its answer is cut."""
_LONGEST_LINE = 200
_LONGEST_TOKEN = 32
"""Bytes."""
_NAMES = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choices": "the choices",
    "grammar": "the grammar",
    "tool_calls": "the tools' schemas together",
}


@dataclass(frozen=True)
class Constraint:
    """The form that an answer must have. Make one with `json_schema`, `json_object`, `regex`, `choices` or `grammar`.

    >>> from reft_edge.runtime import Constraint
    >>> colours = Constraint.choices(["red", "green", "blue"])
    """

    kind: Literal["json_schema", "regex", "choices", "grammar", "tool_calls"]
    text: str
    """The schema or the list of choices as JSON; the regular expression; the grammar, which for calls of tools is in Lark."""

    def __post_init__(self) -> None:
        if len(self.text) > LONGEST:
            raise ReftEdgeError(
                f"{self.name} has {len(self.text):,} characters; at most {LONGEST:,} are allowed"
            )
        if not self.text.strip():
            raise ReftEdgeError(f"{self.name} is empty")

    @property
    def name(self) -> str:
        """What messages call it."""
        return _NAMES[self.kind]

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Constraint":
        """JSON that is valid under a schema. Raises ReftEdgeError for what JSON does not have."""
        try:
            return cls("json_schema", json.dumps(dict(schema), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ReftEdgeError(f"the JSON schema cannot be written as JSON: {error}") from error

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> "Constraint":
        """A text that a regular expression matches from its first character to its last. Look-around is not supported."""
        return cls("regex", pattern)

    @classmethod
    def choices(cls, texts: Sequence[str]) -> "Constraint":
        """One of these texts. Raises ReftEdgeError for none, or an empty one."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ReftEdgeError("the choices are not a list of texts, at least one and none empty")
        return cls("choices", json.dumps(list(texts)))

    @classmethod
    def grammar(cls, text: str) -> "Constraint":
        """A text of a grammar, in llguidance's Lark syntax (its first rule is `start`) or in llama.cpp's GBNF."""
        return cls("grammar", text)


class Progress:
    """How far one answer has come under its constraint. The tokens that may follow are looked up in a thread of their own
    while the graph runs."""

    def __init__(self, matcher: "LLMatcher", constraint: Constraint, thread: ThreadPoolExecutor) -> None:
        self._matcher, self._constraint, self._thread = matcher, constraint, thread
        self._mask = thread.submit(matcher.compute_bitmask)

    def allowed(self, vocabulary: int) -> NDArray[np.int64]:
        """Tokens below `vocabulary` that may come next, ascending, at least one. Raises ReftEdgeError if there is none."""
        mask = self._mask.result()
        self._check()
        tokens = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        tokens = tokens[: int(np.searchsorted(tokens, vocabulary))]
        if not len(tokens):
            raise self._no_token()
        return tokens

    def take(self, token: int, most: int = 0) -> tuple[list[int], bool]:
        """Go on with one of the allowed tokens. The tokens that must follow it, at most `most`, with which it went on, too;
        and whether the answer is complete, so that nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        forced: list[int] = []
        if most > 0 and not self._matcher.is_stopped():
            forced = self._matcher.compute_ff_tokens()[:most]
            self._matcher.consume_tokens(forced)
            self._check()
        if self._matcher.is_stopped():
            return forced, True
        self._mask = self._thread.submit(self._matcher.compute_bitmask)
        return forced, False

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        why = _plain(self._matcher.get_error())
        if why.startswith("NoExtension") or "forced bytes" in why:
            raise self._no_token()
        raise ReftEdgeError(f"{self._constraint.name} cannot be followed further: {why}")

    def _no_token(self) -> ReftEdgeError:
        return ReftEdgeError(
            f"no token of this model can continue the answer under {self._constraint.name}; change it"
        )


class Constraints:
    """Compiles constraints for one model's tokens. Threads may share it.

    Each answer's is compiled anew, which takes a millisecond or two: llguidance's copies share a lexer, so that an answer
    which brings it to its limit would end all that follow.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos = tokenizer, eos_token_ids
        self._lock = Lock()
        self._vocabulary: LLTokenizer | None = None
        self._thread = ThreadPoolExecutor(1, "reft-edge constraints")

    def begin(self, constraint: Constraint) -> Progress:
        """An answer's beginning. Raises ReftEdgeError for a constraint that is not valid, which says where, and where
        llguidance is not installed."""
        with extra("structured"):
            import llguidance  # noqa: F401
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, self._eos)
        return Progress(_compile(constraint, self._vocabulary), constraint, self._thread)


def _vocabulary(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> "LLTokenizer":
    """The model's tokens by their bytes, whatever the tokenizer's decoder is made of."""
    from llguidance import LLTokenizer, TokenizerWrapper

    names = TokenBytes(tokenizer)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    ends = [token for token in eos_token_ids if 0 <= token < size]
    if not ends:
        raise ReftEdgeError("this model has no token that ends an answer; answers of a given form need one")

    content = [names.of(token) for token in range(size)]
    special = sorted({*names.special, *ends})
    by_content = {piece: token for token, piece in enumerate(content) if piece and token not in special}

    class Tokens:
        eos_token_id = ends[0]
        bos_token_id = None
        tokens = content
        special_token_ids = special

        def __call__(self, text: str) -> list[int]:
            """Of a text behind others. Tokenizers that write a space before every text do not know those."""
            with suppress(ReftEdgeError):
                found = list(encode(tokenizer, text, special_tokens=False).ids)
                if b"".join(content[token] for token in found) == text.encode():
                    return found
            return _longest_first(text.encode(), by_content)

    return LLTokenizer(TokenizerWrapper(Tokens()), eos_token=ends)


def _longest_first(text: bytes, tokens: Mapping[bytes, int]) -> list[int]:
    """A text's tokens, each the longest that fits; up to where none fits."""
    found, at = [], 0
    while at < len(text):
        ends = range(min(len(text), at + _LONGEST_TOKEN), at, -1)
        end = next((end for end in ends if text[at:end] in tokens), None)
        if end is None:
            break
        found.append(tokens[text[at:end]])
        at = end
    return found


def _compile(constraint: Constraint, vocabulary: "LLTokenizer") -> "LLMatcher":
    from llguidance import LLMatcher

    grammar = _written_out(constraint)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        message = _plain(matcher.get_error())
        place = ""
        if constraint.kind == "json_schema":
            place = inside(json.loads(constraint.text), message, lambda part: _fault(part, vocabulary))
            message += _hint(message)
        raise ReftEdgeError(f"{constraint.name} is not usable{place}: {message}")
    return matcher


def _written_out(constraint: Constraint) -> str:
    """As llguidance reads it."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if constraint.kind == "json_schema":
        try:
            return str(LLMatcher.grammar_from_json_schema(constraint.text, defaults=JSON_STYLE))
        except ValueError as error:
            raise ReftEdgeError(f"{constraint.name} is not usable: {_plain(str(error))}") from error
    if constraint.kind == "regex":
        return str(LLMatcher.grammar_from_regex(constraint.text))
    if constraint.kind == "choices":
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(constraint.text))
        return str(LLMatcher.grammar_from_lark(f"start: {options}"))
    if constraint.kind == "tool_calls":
        return str(LLMatcher.grammar_from_lark(constraint.text))
    try:
        return str(LLMatcher.grammar_from_lark(any_to_lark(constraint.text)))
    except Exception as error:  # the converter raises whatever it meets
        raise ReftEdgeError(f"{constraint.name} is not usable: {_plain(str(error))}") from error


def _fault(schema: Any, vocabulary: "LLTokenizer") -> str:
    """Why llguidance refuses a schema; "" if it takes it."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return _plain(LLMatcher.validate_grammar(grammar, vocabulary, limits=_limits()))


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=_FUEL, max_lexer_states=_MOST_STATES, verbose_errors=False)


def _hint(message: str) -> str:
    if not message.startswith("Unimplemented keys"):
        return ""
    return '; leave them out, or add "x-guidance": {"lenient": true} to the schema to have them ignored'


def _plain(message: str) -> str:
    """In one line of bounded length, without the marks below a place."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(
        line[:_LONGEST_LINE] for line in lines if line.strip("^|~ ").removesuffix("<non-verbose/>")
    )
