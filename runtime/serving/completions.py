"""The routes of a model that continues text: prompts in, choices out, whole or as a stream."""

from collections.abc import Iterator, Sequence

from fastapi import FastAPI, Request, Response

from reft_edge.runtime.logprobs import score
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.serving.answers import TextAnswer
from reft_edge.runtime.serving.chat_api import ChatRequest
from reft_edge.runtime.serving.chat_prompts import ChatPrompts
from reft_edge.runtime.serving.choices import Prepared, answer_request, too_many
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.guard import Metrics
from reft_edge.runtime.serving.logprobs import CompletionScores
from reft_edge.runtime.serving.openai_api import CompletionRequest
from reft_edge.runtime.serving.prompt_tokens import encoded
from reft_edge.runtime.serving.responses import add_responses_route
from reft_edge.runtime.serving.served import Decoder
from reft_edge.runtime.token_bytes import TokenBytes

_MOST_SCORED = 2048
"""Tokens of a prompt whose logits are computed together."""


def add_decoder_routes(app: FastAPI, served: Decoder, metrics: Metrics) -> None:
    """/v1/chat/completions, /v1/responses and /v1/completions."""
    names = TokenBytes(served.model.prompts.tokenizer)
    chats = ChatPrompts(served.model, names)
    add_responses_route(app, served, metrics, chats)

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

        def prepare(adapters: dict[str, float]) -> Prepared:
            return _prepared(served.model, names, body, adapters)

        wanted = max(1, body.max_tokens)
        return await answer_request(served, metrics, request, body, prepare, wanted, body.logprobs)

    for path in ("/v1/embeddings", "/v1/classify", "/v1/rerank"):

        @app.post(path)
        async def not_an_encoder() -> None:
            raise ApiError(
                404,
                f"{served.settings.name} continues text; embeddings and labels come from an exported encoder",
            )


def _prepared(
    model: SteeredModel, names: TokenBytes, body: CompletionRequest, adapters: dict[str, float]
) -> Prepared:
    prompts = encoded(body.prompt, model, special=True, what="prompt")
    scores = None
    if body.logprobs is not None:
        scores = [CompletionScores(names) for _ in range(len(prompts) * body.n)]
    echoes = None
    if body.echo:
        echoes = [text for text in _texts(body, model, prompts) for _ in range(body.n)]
        if scores is not None:
            _score_prompts(model, prompts, adapters, body, scores)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    answer = TextAnswer(body.model, wants_usage, scores, echoes)
    return Prepared(prompts, answer, body.constraint, only_prompts=body.max_tokens == 0)


def _texts(body: CompletionRequest, model: SteeredModel, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    for given, ids in zip(body.prompt, prompts, strict=True):
        yield given if isinstance(given, str) else model.prompts.decode(list(ids))


def _score_prompts(
    model: SteeredModel,
    prompts: Sequence[Sequence[int]],
    adapters: dict[str, float],
    body: CompletionRequest,
    scores: Sequence[CompletionScores],
) -> None:
    """Begin the log-probabilities of every choice with those of its prompt. Raises ApiError for one that is too long."""
    for number, ids in enumerate(prompts):
        if len(ids) > _MOST_SCORED:
            raise ApiError(
                400,
                f"prompt: it has {len(ids)} tokens; with echo and logprobs, {_MOST_SCORED} are allowed",
                param="prompt",
            )
        [logits] = model.logits([ids], adapters)
        found = [score(logits[at], token, body.logprobs or 0) for at, token in enumerate(ids[1:])]
        for choice in range(number * body.n, (number + 1) * body.n):
            scores[choice].begin(ids[0], found)
