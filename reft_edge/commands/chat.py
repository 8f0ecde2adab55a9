"""`reft-edge chat`: a conversation in the terminal."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import (
    fail,
    plain_errors,
    provider_options,
    say,
    split_scale,
    template_arguments,
    trusted_keys,
)
from reft_edge.commands.options import (
    Adapters,
    CacheType,
    Device,
    Folder,
    PromptCache,
    ProviderOptions,
    RepetitionPenalty,
    RequireSigned,
    Seed,
    Speculate,
    Temperature,
    TemplateArguments,
    Threads,
    TopK,
    TopP,
)
from reft_edge.commands.streams import read_input_line
from reft_edge.errors import ReftEdgeError
from reft_edge.terminal import printable


def chat(
    folder: Folder,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapter files to switch among.", show_default=False)
    ] = None,
    adapter: Adapters = None,
    system: Annotated[
        str | None, typer.Option(help="The system prompt.", show_default="the chat template's own")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="File with a JSON schema; every answer is valid under it.", show_default=False),
    ] = None,
    speculate: Speculate = None,
    cache_type: CacheType = "auto",
    chat_template_kwargs: TemplateArguments = None,
    prompt_cache: PromptCache = None,
    require_signed: RequireSigned = None,
    device: Device = "auto",
    threads: Threads = None,
    provider_option: ProviderOptions = None,
) -> None:
    """Talk with an exported model and switch adapters between turns; /help lists the commands."""
    with plain_errors():
        from reft_edge.json_files import read_object
        from reft_edge.runtime import Sampling, SteeredModel
        from reft_edge.runtime.adapter_folder import AdapterFolder
        from reft_edge.runtime.chat import Chat, load_history

        schema = None if json_schema is None else read_object(json_schema)
        model = SteeredModel(
            folder,
            device,
            threads,
            trusted_keys(require_signed),
            provider_options(provider_option),
            cache_type=cache_type,
        )
        model.keep_prompts(prompt_cache)
        model.prompts = model.prompts.with_arguments(template_arguments(chat_template_kwargs))
        conversation = Chat(
            model,
            folder.resolve().name,
            lambda text: say(text, end=""),
            AdapterFolder(model, adapters) if adapters else None,
            Sampling(temperature, top_k, top_p, 0.0, repetition_penalty, seed),
            max_tokens,
            schema,
            speculate,
        )
        conversation.system = system
        loaded = [split_scale(given) for given in adapter or []]
        conversation.choose([f"{model.load_adapter(path)}:{factor}" for path, factor in loaded])
        typed = sys.stdin.isatty()
        save = load_history(_history_file()) if typed else None
        if typed:
            say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", err=True)
        try:
            while True:
                try:
                    line = input(printable(conversation.prompt)) if typed else read_input_line()
                except KeyboardInterrupt:
                    say()
                    continue
                except (ReftEdgeError, UnicodeDecodeError) as error:
                    fail(error)
                    continue
                if not conversation.take(line):
                    break
        except EOFError:
            if typed:
                say()
        finally:
            if save is not None:
                save()


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "reft-edge/chat_history"
