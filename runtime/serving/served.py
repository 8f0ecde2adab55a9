"""What is served: one model with its folder of adapters, and the threads in which requests are prepared."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request

from reft_edge.runtime.adapter_folder import BUDGET, AdapterFolder, UnknownAdapterError
from reft_edge.runtime.encoder import SteeredEncoder
from reft_edge.runtime.engine import Engine
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.prompt_files import BUDGET as PROMPT_BUDGET
from reft_edge.runtime.room import usual_budget
from reft_edge.runtime.serving.bodies import check_type, parse
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.openai_api import B, read_body
from reft_edge.signing.keys import TrustedKeys

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WORKERS = 4
"""Requests that are read, rendered and tokenised at once."""
_LONGEST_NAME = 200
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ServerSettings:
    """What `reft-edge serve` can be told."""

    name: str
    """Of the base in /v1/models; adapters are NAME:adapter."""
    slots: int = 8
    """Requests that run at once."""
    queue_limit: int = 64
    """Requests that may wait, beyond those that run."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_inputs: int = 2048
    """Texts in one request to an encoder, and prompts times choices in one to a decoder."""
    api_key: str | None = None
    """What clients must send as a bearer token."""
    hosts: tuple[str, ...] = LOOPBACK
    """Values of the Host header that are answered, against DNS rebinding; `*` for any."""
    cors_origins: tuple[str, ...] = ()
    shutdown_seconds: float = 10.0
    """How long running requests may go on after the server was told to stop."""
    adapter_budget: int = BUDGET
    """Bytes of adapter weights in memory, and as many again for the mixes of running requests."""
    cache_budget: int | None = None
    """Bytes of keys and values of running requests; none: `usual_budget`."""
    cache_type: str = "auto"
    """`SteeredModel`'s."""
    prompt_cache: Path | None = None
    """A folder that keeps long prompts for the next start."""
    prompt_cache_size: int = PROMPT_BUDGET
    """Bytes of all files in it."""
    speculate: bool | None = None
    """Whether to guess tokens, as `SteeredModel.batch` says."""
    trusted: TrustedKeys | None = None
    """Only adapters that one of these keys signed are used."""


class Served:
    """One model with its folder of adapters."""

    def __init__(
        self, model: SteeredModel | SteeredEncoder, adapters: Path | None, settings: ServerSettings
    ) -> None:
        self.settings = settings
        self.adapters = AdapterFolder(model, adapters, settings.adapter_budget) if adapters else None
        self.aliases: dict[str, str] = {}
        """Names that clients gave to adapters, and the names of their files; see `adapter_routes`."""
        self.hidden: set[str] = set()
        """Adapters that clients unloaded: they are not served until they are loaded again."""
        self._workers = ThreadPoolExecutor(_WORKERS, "reft-edge request")
        self._loaders = ThreadPoolExecutor(settings.slots + settings.queue_limit, "reft-edge adapter")

    def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]":
        """Run in a thread what would keep the event loop from other requests."""
        return asyncio.get_running_loop().run_in_executor(self._workers, lambda: function(*args, **kwargs))

    async def read(self, request: Request, kind: type[B]) -> B:
        """A request's body, checked. Raises ApiError."""
        check_type(request.headers.get("content-type"))
        content = await request.body()
        return await self.work(lambda: read_body(kind, parse(content)))

    def models(self) -> list[str]:
        """Names of the base and of every adapter."""
        files = self.adapters.names() if self.adapters else []
        names = sorted({*files, *self.aliases} - self.hidden)
        return [self.settings.name, *(f"{self.settings.name}:{name}" for name in names)]

    def has(self, model: str) -> bool:
        """Whether `models` lists it."""
        base, colon, adapter = model.partition(":")
        if base != self.settings.name:
            return False
        if not colon or self.adapters is None:
            return not colon
        return adapter not in self.hidden and self.adapters.has(self.aliases.get(adapter, adapter))

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model's name stands for; None for the base. Raises ApiError 404 for other models' names."""
        base, colon, adapter = model.partition(":")
        if base != self.settings.name or (colon and not adapter):
            raise unknown_model(model)
        return adapter or None

    @asynccontextmanager
    async def holding(self, mix: Mapping[str, float]) -> AsyncIterator[dict[str, float]]:
        """The adapters of a mix, loaded as `AdapterFolder.hold` does, under the names that the model has for them."""
        if not mix:
            yield {}
            return
        if self.adapters is None:
            raise UnknownAdapterError(
                f"there is no adapter {next(iter(mix))[:_LONGEST_NAME]!r}: no folder of adapters is served"
            )
        hold = self.adapters.hold(self._files(mix))
        loading = asyncio.get_running_loop().run_in_executor(self._loaders, hold.__enter__)
        try:
            chosen = await asyncio.shield(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: _let_go(done, hold))
            raise
        try:
            yield chosen
        finally:
            hold.__exit__(None, None, None)

    def _files(self, mix: Mapping[str, float]) -> dict[str, float]:
        """A mix by the names of the adapters' files."""
        found: dict[str, float] = {}
        for name, scale in mix.items():
            if name in self.hidden:
                raise UnknownAdapterError(
                    f"adapter {name[:_LONGEST_NAME]!r} was unloaded; POST /v1/load_lora_adapter loads it"
                )
            file = self.aliases.get(name, name)
            found[file] = found.get(file, 0.0) + scale
        return found

    def close(self) -> None:
        """Nothing more is prepared."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._loaders.shutdown(wait=False, cancel_futures=True)


class Decoder(Served):
    """A model that continues text."""

    def __init__(self, model: SteeredModel, adapters: Path | None, settings: ServerSettings) -> None:
        super().__init__(model, adapters, settings)
        self.model = model
        self.together = settings.slots + 1
        """Choices of one request that the engine holds at a time: as many as can run, and one to follow."""
        at_most = (settings.slots + settings.queue_limit) * self.together
        budget = usual_budget(model.graph) if settings.cache_budget is None else settings.cache_budget
        self.engine = Engine(
            model,
            settings.slots,
            at_most,
            cache_budget=budget,
            prompt_cache=settings.prompt_cache,
            prompt_cache_size=settings.prompt_cache_size,
            speculate=settings.speculate,
        )

    def close(self) -> None:
        self.engine.close(self.settings.shutdown_seconds)
        super().close()


class Encoder(Served):
    """A model that reads text."""

    def __init__(self, model: SteeredEncoder, adapters: Path | None, settings: ServerSettings) -> None:
        super().__init__(model, adapters, settings)
        self.model = model
        self.turn = asyncio.Lock()
        """Held for one batch; those who wait get it in the order in which they came."""


def _let_go(loading: "asyncio.Future[Any]", hold: AbstractContextManager[Any]) -> None:
    """Of adapters that were loaded for a request that has gone."""
    if not loading.cancelled() and loading.exception() is None:
        hold.__exit__(None, None, None)


def unknown_model(name: str) -> ApiError:
    """The answer to a name that no model has."""
    return ApiError(
        404,
        f"there is no model {name[:_LONGEST_NAME]!r}; GET /v1/models lists them",
        "model_not_found",
        param="model",
    )
