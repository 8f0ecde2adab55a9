"""What clients of the OpenAI API send, checked, and the objects they get back.

What this server cannot do is refused where a request asks for it, rather than passed over.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from reft_edge.runtime.constraints import Constraint
from reft_edge.runtime.sampling import Sampling
from reft_edge.runtime.serving.answer_forms import constraint_of
from reft_edge.runtime.serving.errors import ApiError

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "suffix": ("",),
    "best_of": (1,),
    "reasoning_effort": (),
    "reasoning": ({},),
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "web_search_options": (),
}
"""Parameters that are known and not supported, with the values under which they ask for nothing."""
_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
)
"""Parameters that do not change an answer."""


_MOST_STOPS, _MOST_ADAPTERS, _MOST_BIASES = 16, 64, 1024
_DIGITS = 9
"""Of a token id."""
_HUGE = 1e38
"""Scales below it are finite in float32."""
Tokens = list[int]


class Body(BaseModel):
    """An object that a client sends. Fields that are null count as unset; the first that is unknown is named."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise ValueError("expected an object")
        kept = {name: value for name, value in fields.items() if value is not None and name not in _IGNORED}
        for name in [name for name in kept if name not in cls.model_fields]:
            if name not in _NEUTRAL:
                raise ValueError(f"{_quoted(name)}: there is no such field")
            if kept.pop(name) not in _NEUTRAL[name]:
                raise ValueError(f"{name} is not supported by this server")
        return kept


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Generate(Body):
    """What chat and text completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=16)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=0, lt=1 << 64)
    stop: list[str] = Field(default_factory=list)
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    """vLLM's."""
    grammar: str | None = None
    """llama.cpp's."""
    _constraint: Constraint | None = PrivateAttr(None)
    adapters: dict[str, float] | None = None
    """Not in OpenAI's API: adapters and their scales, in place of the one that `model` names."""

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not _is_list_of(str, stops) or len(stops) > _MOST_STOPS:
            raise ValueError(f"expected a text, or a list of at most {_MOST_STOPS} texts")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) > _MOST_BIASES:
            raise ValueError(f"expected an object of at most {_MOST_BIASES} token ids and what each gets")
        for token, added in value.items():
            if not (token.isdecimal() and token.isascii()) or len(token) > _DIGITS:
                raise ValueError(f"{token[:100]!r} is not a token id")
            if isinstance(added, bool) or not isinstance(added, int | float) or not -100 <= added <= 100:
                raise ValueError(f"what token {token} gets is not a number from -100 to 100")
        return value

    @field_validator("adapters", mode="before")
    @classmethod
    def _few_adapters(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) > _MOST_ADAPTERS:
            raise ValueError(
                f"expected an object of at most {_MOST_ADAPTERS} adapters' names and their scales"
            )
        for name, scale in value.items():
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < _HUGE:
                raise ValueError(f"the scale of {name[:100]!r} is not a finite number")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> "Generate":
        self._constraint = constraint_of(self.response_format, self.structured_outputs, self.grammar)
        return self

    @property
    def constraint(self) -> Constraint | None:
        """The form that answers must have."""
        return self._constraint

    def sampling(self, index: int) -> Sampling:
        """Of the answer's `index`-th choice: every choice has a seed of its own."""
        seed = None if self.seed is None else self.seed + index
        return Sampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            seed,
            self.frequency_penalty,
            self.presence_penalty,
            self.logit_bias,
        )


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: list[str | Tokens]
    """Texts, or tokens."""
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    """Whether the answer begins with the prompt, and `logprobs` with the prompt's."""

    @model_validator(mode="after")
    def _some_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected 1 or more; 0 needs echo")
        return self

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        return _texts_or_tokens(value)


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str
    input: list[str | Tokens]
    """Texts, or tokens."""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @field_validator("input", mode="plain")
    @classmethod
    def _inputs(cls, value: Any) -> Any:
        return _texts_or_tokens(value)


class ClassifyRequest(Body):
    """POST /v1/classify, which OpenAI's API does not have: texts, or pairs of texts, to labels."""

    model: str
    input: list[str | tuple[str, str]]

    @field_validator("input", mode="plain")
    @classmethod
    def _inputs(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(map(_is_text_or_pair, texts)):
            raise ValueError("expected a text, or a list of texts and pairs of texts, at least one")
        return [text if isinstance(text, str) else tuple(text) for text in texts]


class RerankRequest(Body):
    """POST /v1/rerank, as Jina's and Cohere's APIs have it: documents by how well they fit a query."""

    model: str
    query: str = Field(min_length=1)
    documents: list[str]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True

    @field_validator("documents", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Texts, or objects with a text."""
        if not isinstance(value, list) or not value:
            raise ValueError("expected a list of texts, at least one")
        texts = [item.get("text") if isinstance(item, dict) else item for item in value]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError("expected a list of texts, none empty")
        return texts


def _texts_or_tokens(value: Any) -> list[str | Tokens]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_list_of(str, value):
            return value
        if _is_list_of(int, value):
            return [value]
        if all(tokens and _is_list_of(int, tokens) for tokens in value):
            return value
    raise ValueError(
        "expected a text, a list of texts, a list of token ids, or a list of such lists, none empty"
    )


def _quoted(name: str) -> str:
    return name if name.isidentifier() and len(name) < 100 else repr(name[:100])


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_text_or_pair(value: Any) -> bool:
    return isinstance(value, str) or (_is_list_of(str, value) and len(value) == 2)


B = TypeVar("B", bound=Body)


def read_body(kind: type[B], fields: Mapping[str, Any]) -> B:
    """What a client sent, checked. Raises ApiError that names the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:100] for part in found["loc"])
    message = str(found["msg"]).removeprefix("Value error, ")
    if place and (named := re.match(r"([a-z_.0-9]+): ", message)):
        place, message = f"{place}.{named[1]}", message[named.end() :]
    raise ApiError(400, f"{place}: {message}" if place else message, param=place or None)
