"""`ray_app`: the server with OpenAI's API as a Ray Serve application."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.model.manifest import load_manifest
from reft_edge.runtime.adapter_folder import BUDGET
from reft_edge.serving.adapters import Adapters, kept, local_folder, places
from reft_edge.signing.keys import load_trusted


@dataclass(frozen=True)
class _Replica:
    """What a replica is made of, on whatever machine."""

    folder: str
    adapters: tuple[str, ...]
    name: str
    slots: int
    queue: int
    api_key: str | None
    cache_memory: int | None
    cache_type: str
    adapter_memory: int
    prompt_cache: str | None
    require_signed: str | None
    device: str
    threads: int | None
    provider_options: dict[str, str]
    plain_http: bool

    def app(self) -> Any:
        """The FastAPI app. Raises ReftEdgeError if the model or its adapters cannot be loaded."""
        from reft_edge.runtime.serving.app import create_app
        from reft_edge.runtime.serving.served import ServerSettings

        folder = Path(self.folder)
        trusted = None if self.require_signed is None else load_trusted(Path(self.require_signed))
        settings = ServerSettings(
            name=self.name,
            slots=self.slots,
            queue_limit=self.queue,
            api_key=self.api_key,
            hosts=("*",),
            adapter_budget=self.adapter_memory << 20,
            cache_type=self.cache_type,
            cache_budget=None if self.cache_memory is None else self.cache_memory << 20,
            prompt_cache=None if self.prompt_cache is None else Path(self.prompt_cache),
            trusted=trusted,
        )
        adapters = local_folder(self.adapters, folder, trusted, self.plain_http)
        return create_app(folder, adapters, settings, self.device, self.threads, self.provider_options)


def ray_app(
    folder: str | Path,
    adapters: Adapters | None = None,
    *,
    replicas: int = 1,
    slots: int = 8,
    queue: int = 64,
    name: str | None = None,
    api_key: str | None = None,
    cache_memory: int | None = None,
    cache_type: str = "auto",
    adapter_memory: int = BUDGET >> 20,
    prompt_cache: str | Path | None = None,
    require_signed: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    provider_options: Mapping[str, str] | None = None,
    plain_http: bool = False,
    deployment: Mapping[str, Any] | None = None,
) -> Any:
    """The server as an application for `ray.serve.run`, with a model loaded in every replica.

    `folder`: an exported model, at the same place on every machine. `adapters`: a folder of adapter files there, or
    repositories (oci://, hf://, https://), whose newest adapters every replica pulls when it starts. `replicas`: how many;
    `slots`: requests that one runs at once, beyond which Ray sends requests to other replicas; `queue`: requests that wait for
    a replica, for all of them together. `name`, `api_key`, `cache_memory` and `adapter_memory` in MB, `cache_type`,
    `prompt_cache`, `require_signed`, `device`, `threads` and `provider_options`: as for `reft-edge serve`. `cpus`, `gpus`: of
    one replica; `threads` are as many as `cpus` by default. `plain_http`: pull without encryption, too. `deployment`: options
    of `ray.serve.deployment` in place of those that are chosen here, such as `autoscaling_config`.

    Requests with the same header `x-session-id` go to the same replica, which holds their prefix, while it has a free slot.

    Raises ReftEdgeError where Ray is not installed (extra `ray`), for numbers below 1, or for a folder that is no export.

    >>> from reft_edge.serving import ray_app
    >>> application = ray_app("smol", "oci://registry.example/team/adapters", replicas=2)  # doctest: +SKIP
    """
    _check(Path(folder), replicas, slots)
    replica = _Replica(
        str(Path(folder).resolve()),
        places(adapters),
        name or Path(folder).resolve().name,
        slots,
        queue,
        api_key,
        cache_memory,
        cache_type,
        adapter_memory,
        None if prompt_cache is None else kept(prompt_cache),
        None if require_signed is None else kept(require_signed),
        device,
        threads or max(1, int(cpus)),
        dict(provider_options or {}),
        plain_http,
    )
    options: dict[str, Any] = {
        "name": "reft-edge",
        "max_ongoing_requests": slots,
        "max_queued_requests": queue,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "request_router_config": {"request_router_class": "reft_edge.serving.ray_router.SessionRouter"},
        **({} if "autoscaling_config" in (deployment or {}) else {"num_replicas": replicas}),
        **(deployment or {}),
    }
    return _bound(replica, options)


def _check(folder: Path, replicas: int, slots: int) -> None:
    """Raise ReftEdgeError for what no replica could start with."""
    with extra("ray"):
        import ray.serve  # noqa: F401
    for what, count in (("replicas", replicas), ("slots", slots)):
        if count < 1:
            raise ReftEdgeError(f"{what} is {count}; expected 1 or more")
    load_manifest(folder)


def _bound(replica: _Replica, options: dict[str, Any]) -> Any:
    from ray import serve

    def build() -> Any:
        return replica.app()

    return serve.deployment(serve.ingress(build)(), **options).bind()
