"""`reft-edge serve`: a local server with OpenAI's API."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, provider_options, say, trusted_keys
from reft_edge.commands.options import (
    CacheType,
    Device,
    Folder,
    PromptCache,
    ProviderOptions,
    RequireSigned,
    Speculate,
    Threads,
)
from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text


def serve(
    folder: Folder,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="A folder of adapter files; NAME.safetensors is served as the model MODEL:NAME.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The base's name among the models.", show_default="DIR's name")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the key that clients must send; REFT_EDGE_API_KEY in the environment does the same.",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Requests that run at once.")] = 8,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait beyond those; more are answered with 429.")
    ] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Largest body of a request, in bytes.")] = 1 << 20,
    max_inputs: Annotated[
        int, typer.Option(min=1, help="Most texts, or prompts times choices, in one request.")
    ] = 2048,
    adapter_memory: Annotated[
        int, typer.Option(min=1, help="MB of adapter weights that are kept in memory.")
    ] = 256,
    cache_memory: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MB of KV caches that running requests share; those that do not fit wait.",
            show_default="a whole context, 768 or more",
        ),
    ] = None,
    cache_type: CacheType = "auto",
    prompt_cache: PromptCache = None,
    prompt_cache_size: Annotated[
        int, typer.Option(min=1, help="MB that this folder may take; what was not used for longest goes.")
    ] = 2048,
    speculate: Speculate = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web origin whose pages may call the server; repeatable.", show_default=False),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests get when the server stops.")
    ] = 10.0,
    require_signed: RequireSigned = None,
    device: Device = "auto",
    threads: Threads = None,
    provider_option: ProviderOptions = None,
) -> None:
    """Serve an exported model, and each adapter as a model of its own, with OpenAI's API."""
    with plain_errors(), extra("serve"):
        from reft_edge.runtime.serving.app import create_app
        from reft_edge.runtime.serving.connections import address_of, listen, make_server
        from reft_edge.runtime.serving.guard import is_loopback
        from reft_edge.runtime.serving.served import LOOPBACK, ServerSettings

        key = _api_key(api_key_file)
        if not is_loopback(host) and key is None:
            raise ReftEdgeError(
                f"{host} can be reached from other machines; set a key with --api-key-file, or keep to 127.0.0.1"
            )
        settings = ServerSettings(
            name=name or folder.resolve().name,
            slots=slots,
            queue_limit=queue,
            max_body=max_body,
            max_inputs=max_inputs,
            api_key=key,
            hosts=(*LOOPBACK, host) if is_loopback(host) else ("*",),
            cors_origins=tuple(cors_origin or ()),
            shutdown_seconds=grace,
            adapter_budget=adapter_memory << 20,
            cache_type=cache_type,
            speculate=speculate,
            cache_budget=None if cache_memory is None else cache_memory << 20,
            prompt_cache=prompt_cache,
            prompt_cache_size=prompt_cache_size << 20,
            trusted=trusted_keys(require_signed),
        )
        if ":" in settings.name:
            raise ReftEdgeError(
                f"the name {settings.name!r} has a colon, which separates adapters; give a --name without"
            )
        if not settings.name.isprintable():
            raise ReftEdgeError(f"the name {settings.name!r} cannot be shown; give another --name")
        sockets = listen(host, port)
        try:
            app = create_app(folder, adapters, settings, device, threads, provider_options(provider_option))

            def started() -> None:
                url = f"http://{address_of(host, sockets)}/v1"
                say(f"serving {settings.name} at {url} (Ctrl-C stops); try")
                say(f"  curl {url}/models" + (" -H 'Authorization: Bearer KEY'" if key else ""))

            with suppress(KeyboardInterrupt):
                make_server(app, grace, app.state.metrics.count, started).run(sockets)
        finally:
            for made in sockets:
                made.close()


def _api_key(file: Path | None) -> str | None:
    """The key that clients must send, from a file or the environment; None if there is neither."""
    if file is None:
        source, key = "REFT_EDGE_API_KEY", os.environ.get("REFT_EDGE_API_KEY", "").strip()
        if not key:
            return None
    else:
        source, key = str(file), read_text(file, f"the API key in {file}").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ReftEdgeError(f"{source} holds no API key; expected one line of ASCII text")
    return key
