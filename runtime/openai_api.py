"""What clients of the OpenAI API send, checked, and the objects they get back.

What this server cannot do is refused where a request asks for it, rather than passed over.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from tokenizers import Tokenizer

from reft_edge.runtime.batch import TokenScore
from reft_edge.runtime.sampling import Sampling

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "reasoning_effort": (),
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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Generate(BaseModel):
    """What chat and text completions have in common."""

    model_config = ConfigDict(extra="forbid")
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=16)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = Field(None, ge=0)
    stop: list[str] = Field(default_factory=list, max_length=16)
    adapters: dict[str, float] | None = None
    """Not in OpenAI's API: adapters and their scales, in place of the one that `model` names."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if value is None or name in _IGNORED:
                continue
            if name in _NEUTRAL and name not in cls.model_fields:
                if value in _NEUTRAL[name]:
                    continue
                raise ValueError(f"{name} is not supported by this server")
            kept[name] = value
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def sampling(self, index: int) -> Sampling:
        """Of the answer's `index`-th choice: every choice has a seed of its own."""
        seed = None if self.seed is None else self.seed + index
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, seed)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> Sequence[str | list[int]]:
        """One text, or its tokens, a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid")
    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class ClassifyRequest(BaseModel):
    """POST /v1/classify, which OpenAI's API does not have: texts, or pairs of texts, to labels."""

    model_config = ConfigDict(extra="forbid")
    model: str
    input: str | list[str | tuple[str, str]] = Field(min_length=1)


class Answer:
    """Names one response and makes its objects."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat, self.model = chat, model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._object(kind, choices), "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return self._object("chat.completion.chunk" if self.chat else "text_completion", choices)

    def choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        """One choice of a whole answer."""
        body: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.chat
            else {"text": text}
        )
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, text: str, reason: str | None, logprobs: Any, first: bool) -> dict[str, Any]:
        """What one choice gained."""
        if not self.chat:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts as the API names them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {
                **entry(score.token, score.logprob),
                "top_logprobs": [entry(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ],
        "refusal": None,
    }


def completion_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
    """`logprobs` of a text completion; `offset`: characters of the answer before these tokens."""
    texts = [tokenizer.decode([score.token], skip_special_tokens=False) for score in scores]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            {tokenizer.decode([token], skip_special_tokens=False): logprob for token, logprob in score.top}
            for score in scores
        ],
        "text_offset": offsets,
    }
