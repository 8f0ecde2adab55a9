"""The routes of a model that continues text: prompts in, choices out, whole or as a stream."""

from fastapi import FastAPI, Request, Response

from reft_edge.runtime.serving.answers import TextAnswer
from reft_edge.runtime.serving.chat_api import ChatRequest
from reft_edge.runtime.serving.chat_prompts import ChatPrompts
from reft_edge.runtime.serving.choices import Prepared, answer_request, too_many
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.guard import Metrics
from reft_edge.runtime.serving.logprobs import CompletionScores
from reft_edge.runtime.serving.openai_api import CompletionRequest
from reft_edge.runtime.serving.prompt_tokens import encoded
from reft_edge.runtime.serving.served import Decoder
from reft_edge.runtime.token_bytes import TokenBytes


def add_decoder_routes(app: FastAPI, served: Decoder, metrics: Metrics) -> None:
    """/v1/chat/completions and /v1/completions."""
    names = TokenBytes(served.model.prompts.tokenizer)
    chats = ChatPrompts(served.model, names)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await served.read(request, ChatRequest)
        wanted = body.max_completion_tokens or body.max_tokens
        top = body.top_logprobs if body.logprobs else None
        return await answer_request(
            served, metrics, request, body, lambda _: chats.prepare(body), wanted, top
        )

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await served.read(request, CompletionRequest)
        count = len(body.prompt) * body.n
        if count > served.settings.max_inputs:
            raise too_many(count, served.settings.max_inputs)

        def prepare(_adapters: dict[str, float]) -> Prepared:
            prompts = encoded(body.prompt, served.model, special=True, what="prompt")
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            scores = None if body.logprobs is None else [CompletionScores(names) for _ in range(count)]
            return Prepared(prompts, TextAnswer(body.model, wants_usage, scores), body.constraint)

        return await answer_request(served, metrics, request, body, prepare, body.max_tokens, body.logprobs)

    for path in ("/v1/embeddings", "/v1/classify"):

        @app.post(path)
        async def not_an_encoder() -> None:
            raise ApiError(
                404,
                f"{served.settings.name} continues text; embeddings and labels come from an exported encoder",
            )
