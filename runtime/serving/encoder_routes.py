"""The routes of a model that reads text: embeddings and labels."""

import base64
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import FastAPI, Request, Response

from reft_edge.runtime.encoder import Classification, Floats, Input
from reft_edge.runtime.serving import openai_api as api
from reft_edge.runtime.serving.errors import CLIENT_LEFT, ApiError, too_long
from reft_edge.runtime.serving.served import Encoder

_RELEVANT = "relevant"
"""A label by whose probability a pair of query and document is ranked."""
_BATCH = 32
"""Texts that run together; other requests come between batches."""
G = TypeVar("G")
T = TypeVar("T")


def add_encoder_routes(app: FastAPI, served: Encoder) -> None:
    """/v1/embeddings, /v1/classify and /v1/rerank."""
    model = served.model

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        body = await served.read(request, api.ClassifyRequest)
        adapter = served.adapter_of(body.model)
        if adapter is None:
            raise ApiError(
                400, f"the base has no labels; name an adapter, as in {served.settings.name}:ADAPTER"
            )
        _few(len(body.input), served)
        async with served.holding({adapter: 1.0}) as chosen:
            found = await _in_turn(
                served, request, body.input, lambda texts: model.classify(texts, next(iter(chosen)))
            )
        return await _json(served, lambda: _labels(body.model, found))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await served.read(request, api.EmbeddingRequest)
        adapter = served.adapter_of(body.model)
        _few(len(body.input), served)
        width = model.manifest.hidden_size
        if body.dimensions not in (None, width):
            raise ApiError(
                400,
                f"dimensions: this model's vectors have {width}; others are not supported",
                param="dimensions",
            )
        for item in body.input:
            if isinstance(item, list) and len(item) > model.manifest.context_length:
                raise too_long(model.manifest.context_length, len(item), "input")
        async with served.holding({adapter: 1.0} if adapter else {}) as chosen:
            key = next(iter(chosen), None)

            def embed(inputs: Sequence[Input]) -> list[tuple[list[Floats], int]]:
                return [model.embed(inputs, key)]

            parts = await _in_turn(served, request, body.input, embed)
        vectors = [vector for part, _ in parts for vector in part]
        tokens = sum(count for _, count in parts)
        return await _json(served, lambda: _vectors(body, vectors, tokens))

    @app.post("/v1/rerank")
    async def rerank(request: Request) -> Response:
        body = await served.read(request, api.RerankRequest)
        adapter = served.adapter_of(body.model)
        _few(len(body.documents) + 1, served)
        async with served.holding({adapter: 1.0} if adapter else {}) as chosen:
            key = next(iter(chosen), None)
            if key is not None and _RELEVANT in model.adapters[key].labels:
                pairs = [(body.query, document) for document in body.documents]
                labels = await _in_turn(served, request, pairs, lambda texts: model.classify(texts, key))
                scores = [found.probabilities[_RELEVANT] for found in labels]
            else:

                def embed(inputs: Sequence[Input]) -> list[Floats]:
                    return model.embed(inputs, key)[0]

                first, *others = await _in_turn(served, request, [body.query, *body.documents], embed)
                scores = [float(first @ vector) for vector in others]
        return await _json(served, lambda: _ranked(body, scores))

    for path in ("/v1/chat/completions", "/v1/completions"):

        @app.post(path)
        async def not_a_decoder() -> None:
            raise ApiError(
                404,
                f"{served.settings.name} is an encoder; it has /v1/classify, /v1/embeddings and /v1/rerank",
            )


def _few(count: int, served: Encoder) -> None:
    if count > served.settings.max_inputs:
        raise ApiError(
            400, f"input: {count} texts; at most {served.settings.max_inputs} are allowed", param="input"
        )


async def _in_turn(
    served: Encoder, request: Request, inputs: Sequence[G], run: Callable[[Sequence[G]], list[T]]
) -> list[T]:
    """Run batch by batch, with batches of other requests between them, for as long as the client is there."""
    found: list[T] = []
    for start in range(0, len(inputs), _BATCH):
        async with served.turn:
            found += await served.work(run, inputs[start : start + _BATCH])
        if await request.is_disconnected():
            raise ApiError(CLIENT_LEFT, "the client went away")
    return found


async def _json(served: Encoder, render: Callable[[], str]) -> Response:
    content = await served.work(lambda: render().encode())
    return Response(content, media_type="application/json")


def _labels(model: str, found: Sequence[Classification]) -> str:
    data = [
        {"index": i, "label": answer.label, "probabilities": answer.probabilities}
        for i, answer in enumerate(found)
    ]
    return json.dumps({"object": "list", "model": model, "data": data}, ensure_ascii=False, allow_nan=False)


def _ranked(body: api.RerankRequest, scores: Sequence[float]) -> str:
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": body.documents[index]}} if body.return_documents else {}),
        }
        for index in order
    ]
    return json.dumps({"model": body.model, "results": results}, ensure_ascii=False, allow_nan=False)


def _vectors(body: api.EmbeddingRequest, vectors: Sequence[Floats], tokens: int) -> str:
    """Vector by vector: one call for all would keep every other thread waiting."""
    data = ",".join(
        json.dumps({"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)})
        for i, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    rest = json.dumps({"object": "list", "model": body.model, "usage": usage}, ensure_ascii=False)
    return f'{rest[:-1]}, "data": [{data}]}}'


def _encoded(vector: Floats, encoding: str) -> list[float] | str:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.tobytes()).decode()
