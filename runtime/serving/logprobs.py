"""Log-probabilities of answers in OpenAI's forms."""

import codecs
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.logprobs import TokenScore
from reft_edge.runtime.token_bytes import TokenBytes

_LEAST = -9999.0
"""OpenAI's number for what cannot come."""


class Scores(ABC):
    """The tokens of one choice, as they come."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._begun = False

    nothing: ClassVar[dict[str, Any]]
    """The object for no tokens."""

    @abstractmethod
    def take(self, scores: Sequence[TokenScore], text: str, last: bool) -> dict[str, Any] | None:
        """The object for what a choice gained, None where there is nothing to say yet. Raises ReftEdgeError for numbers
        that are none."""

    def _bytes(self, token: int) -> bytes:
        return self._tokens.of(token) if self._begun else self._tokens.first(token)


class ChatScores(Scores):
    """`logprobs` of a chat choice."""

    nothing: ClassVar[dict[str, Any]] = {"content": [], "refusal": None}

    def take(self, scores: Sequence[TokenScore], text: str, last: bool) -> dict[str, Any] | None:
        content = []
        for score in scores:
            top = [self._entry(token, logprob) for token, logprob in score.top]
            content.append({**self._entry(score.token, score.logprob), "top_logprobs": top})
            self._begun = True
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        found = self._bytes(token)
        return {"token": _shown(found, ""), "logprob": _finite(logprob), "bytes": list(found)}


class CompletionScores(Scores):
    """`logprobs` of a text completion. Tokens are told when their text is, so that no offset lies beyond the text."""

    nothing: ClassVar[dict[str, Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }

    def __init__(self, tokens: TokenBytes) -> None:
        super().__init__(tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = self._told = 0
        self._held: list[tuple[int, str, float | None, dict[str, float] | None]] = []

    def begin(self, first: int, scores: Sequence[TokenScore]) -> None:
        """Of a prompt that is part of the text: its first token, which nothing comes before, and the others."""
        self._hold(first, None, None)
        for score in scores:
            self._hold_score(score)

    def take(self, scores: Sequence[TokenScore], text: str, last: bool) -> dict[str, Any] | None:
        for score in scores:
            self._hold_score(score)
        self._told += len(text)
        count = sum(last or offset < self._told for offset, *_ in self._held)
        ready, self._held = self._held[:count], self._held[count:]
        if not ready:
            return None
        return {
            "tokens": [name for _, name, _, _ in ready],
            "token_logprobs": [logprob for _, _, logprob, _ in ready],
            "top_logprobs": [top for *_, top in ready],
            "text_offset": [min(offset, self._told) for offset, *_ in ready],
        }

    def _hold_score(self, score: TokenScore) -> None:
        top: dict[str, float] = {}
        for token, logprob in score.top:
            top.setdefault(self._name(token), _finite(logprob))
        self._hold(score.token, _finite(score.logprob), top)

    def _hold(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        content = b"" if token in self._tokens.special else self._bytes(token)
        if content and not _continues(content):
            self._characters += len(self._decoder.decode(b"", final=True))
        self._held.append((self._characters, self._name(token), logprob, top))
        self._characters += len(self._decoder.decode(content))
        self._begun = True

    def _name(self, token: int) -> str:
        return _shown(self._bytes(token), "bytes:") or f"token:{token}"


def _continues(content: bytes) -> bool:
    """Whether it begins in the middle of a character."""
    return content[0] & 0xC0 == 0x80


def _shown(content: bytes, before: str) -> str:
    """Bytes as text, or as `\\xf0\\x9f` where they are none alone."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return before + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float) -> float:
    if math.isnan(logprob):
        raise ReftEdgeError(
            "the model's numbers are not finite with these adapters, so that tokens have no probabilities; "
            "choose smaller scales"
        )
    return max(logprob, _LEAST)
