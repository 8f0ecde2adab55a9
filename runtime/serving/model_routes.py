"""What a client asks of the model itself: tokens of a text, text of tokens, what the model is."""

import json
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import FailFast, Field, field_validator, model_validator

from reft_edge.model.prompts import encode_batch
from reft_edge.runtime.serving.chat_api import ChatMessage, TemplateArguments, Tool
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.openai_api import Body
from reft_edge.runtime.serving.served import Decoder
from reft_edge.runtime.tool_use import ToolUse


class TokenizeRequest(Body):
    """POST /tokenize: a text under vLLM's name or llama.cpp's, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[ChatMessage], FailFast()] = Field(default_factory=list)
    tools: Annotated[list[Tool], FailFast()] = Field(default_factory=list)
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    add_special_tokens: bool = True
    return_token_strs: bool = False
    with_pieces: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if sum((self.prompt is not None, self.content is not None, bool(self.messages))) != 1:
            raise ValueError("expected one of prompt, content and messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]

    @field_validator("tokens")
    @classmethod
    def _no_negative(cls, value: list[int]) -> list[int]:
        if any(not 0 <= token < 1 << 31 for token in value):
            raise ValueError("expected token ids, 0 or more")
        return value


def add_model_routes(app: FastAPI, served: Decoder) -> None:
    """/tokenize, /detokenize and /props."""
    model = served.model
    prompts, manifest = model.prompts, model.manifest
    tools = ToolUse(prompts)

    def tokens(body: TokenizeRequest) -> list[int]:
        if body.messages:
            if prompts.template is None:
                raise ApiError(400, "this model has no chat template; send a prompt")
            listed = [tool.model_dump(exclude_none=True) for tool in body.tools]
            messages = [message.plain() for message in body.messages]
            text = tools.render(messages, listed, body.chat_template_kwargs)
            return list(encode_batch(prompts.tokenizer, [text], False)[0].ids)
        text = body.prompt if body.prompt is not None else body.content or ""
        return list(encode_batch(prompts.tokenizer, [text], body.add_special_tokens)[0].ids)

    def told(body: TokenizeRequest) -> bytes:
        ids = tokens(body)
        answer: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": manifest.context_length,
        }
        names = [prompts.tokenizer.id_to_token(token) for token in ids]
        if body.return_token_strs:
            answer["token_strs"] = names
        if body.with_pieces:
            answer["tokens"] = [{"id": token, "piece": name} for token, name in zip(ids, names, strict=True)]
        return json.dumps(answer, ensure_ascii=False).encode()

    def text_of(body: DetokenizeRequest) -> bytes:
        limit = prompts.token_limit
        if any(token >= limit for token in body.tokens):
            raise ApiError(400, f"tokens: a token id is not from 0 to {limit - 1}", param="tokens")
        text = prompts.decode(body.tokens)
        return json.dumps({"prompt": text, "content": text}, ensure_ascii=False).encode()

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await served.read(request, TokenizeRequest)
        return Response(await served.work(told, body), media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await served.read(request, DetokenizeRequest)
        return Response(await served.work(text_of, body), media_type="application/json")

    def properties() -> dict[str, Any]:
        return {
            "model": served.settings.name,
            "total_slots": served.settings.slots,
            "default_generation_settings": {"n_ctx": manifest.context_length},
            "chat_template": prompts.template or "",
            "bos_token": prompts.special_tokens.get("bos_token", ""),
            "eos_token": prompts.eos,
            "device": model.device,
            "tools": {"format": tools.form.name, "template": tools.knows_tools},
            "reasoning": tools.marks is not None,
        }

    @app.get("/props")
    async def props() -> dict[str, Any]:
        return await served.work(properties)
