"""`reft-edge run`: one answer, or the labels of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_edge.commands.console import (
    plain_errors,
    print_json,
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
    Json,
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
from reft_edge.commands.streams import read_input
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.signing.keys import TrustedKeys

_GENERATION = (
    "raw",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "json_schema",
    "speculate",
    "cache_type",
    "chat_template_kwargs",
    "prompt_cache",
    "stats",
    "provider_option",
)


def run(
    context: typer.Context,
    folder: Folder,
    prompt: Annotated[
        str,
        typer.Argument(
            help="What to ask, or the text to classify; `-` reads it from standard input (to classify: one a line).",
            show_default=False,
        ),
    ],
    adapter: Adapters = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Prompt as it stands, or through the chat template.",
            show_default="as the adapter was trained",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens at least this share as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; repeatable.", show_default=False)
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="File with a JSON schema; the answer is valid under it.", show_default=False),
    ] = None,
    speculate: Speculate = None,
    cache_type: CacheType = "auto",
    text2: Annotated[
        str | None, typer.Option(help="The second text of a pair to classify.", show_default=False)
    ] = None,
    chat_template_kwargs: TemplateArguments = None,
    prompt_cache: PromptCache = None,
    require_signed: RequireSigned = None,
    device: Device = "auto",
    threads: Threads = None,
    provider_option: ProviderOptions = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print token counts and speed after the answer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer PROMPT with an exported model, with any adapters; an encoder classifies it."""
    with plain_errors():
        from reft_edge.model.manifest import load_manifest

        trusted = trusted_keys(require_signed)
        if load_manifest(folder).kind == "encoder":
            _refuse(context, _GENERATION, "is for models that continue text; this folder holds an encoder")
            _run_encoder(folder, prompt, text2, adapter or [], trusted, device, threads, as_json)
            return
        if text2 is not None:
            raise ReftEdgeError("--text2 is for encoders; this model continues text")
        from reft_edge.json_files import read_object
        from reft_edge.runtime import Sampling, SteeredModel

        schema = None if json_schema is None else read_object(json_schema)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        model = SteeredModel(
            folder, device, threads, trusted, provider_options(provider_option), cache_type=cache_type
        )
        if prompt_cache is not None:
            model.keep_prompts(prompt_cache)
        model.prompts = model.prompts.with_arguments(template_arguments(chat_template_kwargs))
        scales: dict[str, float] = {}
        for number, given in enumerate(adapter or []):
            path, factor = split_scale(given)
            scales[model.load_adapter(path, name=f"{number}:{path}")] = factor
        if prompt == "-":
            prompt = _without_last_line_end(read_input())
        generation = model.stream(
            prompt,
            scales,
            raw=raw,
            max_tokens=max_tokens,
            stop=stop or (),
            sampling=sampling,
            schema=schema,
            speculate=speculate,
        )
        pieces = []
        for piece in generation:
            pieces.append(piece)
            if not as_json:
                say(piece, end="")
    if as_json:
        print_json(
            {
                "text": "".join(pieces),
                "finish_reason": generation.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "tokens": len(generation.tokens),
                "time_to_first_token": generation.prefill_seconds,
                "decode_tokens_per_second": generation.tokens_per_second,
                "device": model.device,
            }
        )
        return
    say()
    if json_schema is not None and generation.finish_reason == "length":
        say(f"the answer was cut after {len(generation.tokens)} tokens: raise --max-tokens", err=True)
    if stats:
        say(
            f"{generation.prompt_tokens} prompt tokens, first token after {generation.prefill_seconds * 1000:.0f} ms; "
            f"{len(generation.tokens)} tokens at {generation.tokens_per_second:.1f} a second on {model.device}",
            err=True,
        )


def _without_last_line_end(text: str) -> str:
    """What `echo` and editors add is not part of a prompt."""
    return text.removesuffix("\n")


def _refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raise ReftEdgeError if any of these options was given."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ReftEdgeError(f"{parameter.opts[0]} {why}")


def _run_encoder(
    folder: Path,
    text: str,
    text2: str | None,
    adapters: list[str],
    trusted: "TrustedKeys | None",
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Classify a text, or every line of standard input, with one adapter."""
    from reft_edge.runtime import SteeredEncoder

    if len(adapters) != 1:
        raise ReftEdgeError(
            f"{folder} holds an encoder, which classifies with one --adapter; {len(adapters)} were given"
        )
    if text == "-" and text2 is not None:
        raise ReftEdgeError("--text2 needs its first text as an argument, not from standard input")
    model = SteeredEncoder(folder, device, threads, trusted)
    path, factor = split_scale(adapters[0])
    name = model.load_adapter(path)
    if text2 is not None:
        found = model.classify([(text, text2)], name, factor)
    else:
        lines = [line for line in read_input().split("\n") if line.strip()] if text == "-" else [text]
        found = model.classify(lines, name, factor)
    if as_json:
        for classification in found:
            print_json(vars(classification))
        return
    for classification in found:
        ranked = sorted(classification.probabilities.items(), key=lambda item: -item[1])
        say(f"{classification.label}\t" + "  ".join(f"{label} {share:.3f}" for label, share in ranked))
