"""Loading and unloading adapters by name, as vLLM's servers have it. Only files of the served folder can be loaded, and only
where clients need a key."""

from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from reft_edge.adapter.file import is_adapter_name
from reft_edge.runtime.adapter_folder import SUFFIX, AdapterFolder
from reft_edge.runtime.serving.errors import ApiError
from reft_edge.runtime.serving.openai_api import Body
from reft_edge.runtime.serving.served import Served


class LoadRequest(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """Whether an adapter of that name is replaced."""


class UnloadRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def add_adapter_routes(app: FastAPI, served: Served) -> None:
    """/v1/load_lora_adapter and /v1/unload_lora_adapter."""

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        folder = _folder(served)
        body = await served.read(request, LoadRequest)
        name = body.lora_name
        if not is_adapter_name(name):
            raise ApiError(400, "lora_name: it cannot be the name of an adapter", param="lora_name")
        file = await served.work(_file_of, folder, body.lora_path)
        known = name not in served.hidden and await served.work(served.has, f"{served.settings.name}:{name}")
        if known and not body.load_inplace and served.aliases.get(name, name) != file:
            raise ApiError(
                400,
                f"lora_name: there is an adapter {name[:200]!r} already; unload it, or send load_inplace",
                param="lora_name",
            )
        await served.work(folder.use, [file])
        served.hidden.discard(name)
        served.aliases.pop(name, None)
        if name != file:
            served.aliases[name] = file
        return PlainTextResponse(f"Success: the adapter is the model {served.settings.name}:{name}")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        folder = _folder(served)
        name = (await served.read(request, UnloadRequest)).lora_name
        if not await served.work(served.has, f"{served.settings.name}:{name}"):
            raise ApiError(404, f"there is no adapter {name[:200]!r}", "model_not_found", param="lora_name")
        file = served.aliases.pop(name, name)
        if file == name or await served.work(folder.has, name):
            served.hidden.add(name)
        await served.work(folder.unload, file)
        return PlainTextResponse(f"Success: adapter {name} is no longer served")


def _folder(served: Served) -> AdapterFolder:
    if served.settings.api_key is None:
        raise ApiError(
            403,
            "adapters are loaded and unloaded only where clients need a key; start serve with --api-key-file",
        )
    if served.adapters is None:
        raise ApiError(400, "no folder of adapters is served; start serve with --adapters")
    return served.adapters


def _file_of(folder: AdapterFolder, path: str) -> str:
    """The name of the folder's adapter that a path stands for: its name, its file's, or its whole path. Raises ApiError."""
    given = Path(path)
    name = given.name.removesuffix(SUFFIX)
    try:
        inside = given.parent == Path() or given.parent.resolve() == folder.folder.resolve()
    except (OSError, ValueError):
        inside = False
    if not inside or not folder.has(name):
        raise ApiError(
            404,
            f"lora_path: {path[:200]!r} is no adapter file of the folder that is served",
            "model_not_found",
            param="lora_path",
        )
    return name
