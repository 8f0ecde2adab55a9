"""A local server with OpenAI's API: one exported folder, and a model name for the base and for each adapter."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from starlette.middleware.cors import CORSMiddleware

from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import load_manifest
from reft_edge.runtime.encoder import SteeredEncoder
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.serving.adapter_routes import add_adapter_routes
from reft_edge.runtime.serving.completions import add_decoder_routes
from reft_edge.runtime.serving.encoder_routes import add_encoder_routes
from reft_edge.runtime.serving.errors import add_errors
from reft_edge.runtime.serving.guard import Counting, Guard, Metrics
from reft_edge.runtime.serving.model_routes import add_model_routes
from reft_edge.runtime.serving.served import LOOPBACK, Decoder, Encoder, ServerSettings, unknown_model

__all__ = ["LOOPBACK", "ServerSettings", "create_app", "serve"]


def create_app(
    folder: Path,
    adapters: Path | None,
    settings: ServerSettings,
    device: str = "auto",
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> FastAPI:
    """The server for an exported folder. `adapters`: a folder of adapter files; `provider_options`: of the device's
    execution provider, for a decoder. Raises ReftEdgeError if the model cannot be loaded."""
    manifest = load_manifest(folder)
    served: Decoder | Encoder
    if manifest.kind == "encoder":
        if provider_options:
            raise ReftEdgeError("provider options are for decoders; this folder holds an encoder")
        if settings.prompt_cache is not None:
            raise ReftEdgeError("a prompt cache is for decoders; this folder holds an encoder")
        served = Encoder(SteeredEncoder(folder, device, threads, settings.trusted), adapters, settings)
    else:
        model = SteeredModel(
            folder,
            device,
            threads,
            settings.trusted,
            provider_options,
            settings.adapter_budget,
            settings.cache_type,
        )
        served = Decoder(model, adapters, settings)
    return serve(served)


def serve(served: Decoder | Encoder) -> FastAPI:
    """The app of a model that is loaded."""
    metrics, settings = Metrics(), served.settings

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.close)

    app = FastAPI(
        title="reft-edge",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.metrics, app.state.served = metrics, served
    add_errors(app)
    _add_common_routes(app, served, metrics)
    add_adapter_routes(app, served)
    if isinstance(served, Encoder):
        add_encoder_routes(app, served)
    else:
        add_decoder_routes(app, served, metrics)
        add_model_routes(app, served)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after"],
        )
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Counting, metrics=metrics, paths=paths)
    return app


def _add_common_routes(app: FastAPI, served: Decoder | Encoder, metrics: Metrics) -> None:
    created = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "reft-edge"}

    def listing() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [entry(name) for name in served.models()]})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        if isinstance(served, Decoder):
            metrics.running.set(served.engine.running)
            metrics.waiting.set(served.engine.waiting)
        metrics.loaded.set(len(served.adapters.loaded) if served.adapters else 0)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return await served.work(listing)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if not await served.work(served.has, name):
            raise unknown_model(name)
        return entry(name)
