"""`reft-edge train`: an adapter for a frozen model."""

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_edge.commands.console import extra, plain_errors, print_json, say, show_table
from reft_edge.commands.options import MOST_SEED, Columns, Config, Json, Model, Split
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen
    from reft_edge.training.settings import TrainResult


def _take_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make a recipe's values the defaults of the options that follow."""
    if name is not None:
        from reft_edge.training.recipes import recipe

        try:
            context.default_map = recipe(name)
        except ReftEdgeError as error:
            raise typer.BadParameter(str(error)) from error
    return name


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="Rows: a JSONL, JSON, CSV or Parquet file, or a dataset of the Hub (hub:OWNER/NAME). Their columns are prompt "
            "and completion, messages, Alpaca's or ShareGPT's, text and label, or prompt, chosen and rejected.",
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
    group_by_length: Annotated[
        bool,
        typer.Option(
            "--group-by-length",
            help="Put rows of like length into one batch, so that less is padding; batches are still shuffled.",
        ),
    ] = False,
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
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Seed of initial weights, row order and dropout.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Base model arithmetic: fp32, bf16, or auto (bf16 where the hardware has it).")
    ] = "auto",
    max_length: Annotated[
        int,
        typer.Option(
            min=1, help="Leave out rows of more tokens than this; an encoder's texts are cut to it."
        ),
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
        str | None,
        typer.Option("--eval", help="Held-out rows; their loss is printed and saved.", show_default=False),
    ] = None,
    split: Split = None,
    eval_split: Annotated[
        str | None,
        typer.Option(help="The same for the held-out rows.", show_default="validation, or test"),
    ] = None,
    config: Config = None,
    columns: Columns = None,
    last_turn: Annotated[
        bool,
        typer.Option("--last-turn", help="Of a conversation train the last answer only, in place of all."),
    ] = False,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between evaluations on the held-out rows.",
            show_default="only after the last step",
        ),
    ] = None,
    loss_log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            show_default=False,
            help="Write every step's loss, and held-out losses, while training.",
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="none",
            help="A tracker that gets every step: tensorboard, wandb, or another that Accelerate knows; repeat it, or set "
            "commas, for several.",
        ),
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="A torch device, such as cpu or cuda:0.", show_default="cuda if there is one"),
    ] = None,
    load_in: Annotated[
        str | None,
        typer.Option(help="Hold the frozen base in 4bit or 8bit, by bitsandbytes.", show_default=False),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Compute activations twice to keep fewer: less memory, slower."),
    ] = False,
    compile_blocks: Annotated[
        bool,
        typer.Option("--compile", help="Compile the model's blocks: faster steps after half a minute or so."),
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time of a step goes.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter for MODEL on DATA and write it to one small file."""
    from reft_edge.commands.screen import Screen

    with plain_errors(), extra("train"):
        from reft_edge.commands.training_progress import training_progress, working_on
        from reft_edge.rows.given import held_out_source, parse_columns, row_source
        from reft_edge.training.distributed import launch_note, launched_processes
        from reft_edge.training.interrupts import Terminated
        from reft_edge.training.session import Wanted, prepare
        from reft_edge.training.settings import Execution, TrainSettings

        processes = launched_processes(device)
        console = Screen(stderr=True, quiet=not processes.main)
        if (note := launch_note(processes)) is not None:
            console.say(note)

        def tell(text: str) -> None:
            """A terminal or a pipe that is gone does not end a training."""
            with suppress(OSError):
                console.say(text)

        if recipe is not None:
            _print_recipe(recipe, context, console)
        names = parse_columns(columns)
        wanted = Wanted(
            row_source(data, split, config, names),
            output,
            held_out_source(evaluate, eval_split, config, names),
            task,
            raw,
            max_length,
            base_weights=base_weights,
            loss_log=loss_log,
            report_to=tuple(report_to or ()),
            resume=resume,
            save_every=save_every,
            eval_every=eval_every,
            execution=Execution(device, processes, profile, checkpointing, compile_blocks),
            last_turn=last_turn,
        )
        settings = {
            field.name: context.params[field.name]
            for field in fields(TrainSettings)
            if field.name in context.params
        }
        session = prepare(
            model, wanted, settings, report=tell, working=lambda what: working_on(console, what)
        )
        with training_progress(console, tell) as on_step:
            try:
                result = session.run(tell, on_step)
            except Terminated as signal:
                tell("terminated")
                raise typer.Exit(128 + signal.number) from None
        processes.end()
    if not processes.main:
        return
    if as_json:
        read = None if session.data.read is None else vars(session.data.read)
        print_json({**vars(result), "path": str(result.path), "data": read})
    else:
        _print_result(result)


def _print_result(result: "TrainResult") -> None:
    share = result.parameters / result.base_parameters
    say(
        f"wrote {result.path}: {result.size / 1000:,.1f} kB, {result.parameters:,} parameters "
        f"({share:.4%} of the base's {result.base_parameters / 1e6:,.1f} M)"
    )
    held = "" if result.evaluation is None else f", held-out loss {result.evaluation:.4f}"
    if result.accuracy is not None:
        held += f", held-out accuracy {result.accuracy:.4f}"
    say(f"{result.steps} steps in {result.seconds:,.0f} s, training loss {result.loss:.4f}{held}")
    if result.profile is not None:
        _print_profile(result.profile)


def _print_profile(seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    rows = [
        (section, f"{spent * 1000:,.1f} ms", f"{spent / total:.1%}") for section, spent in seconds.items()
    ]
    show_table([("a step", "", ""), *rows, ("all", f"{total * 1000:,.1f} ms", "")])


def _print_recipe(name: str, context: typer.Context, console: "Screen") -> None:
    from reft_edge.training.recipes import recipe

    say = console.say
    say(f"recipe {name}:")
    for option, value in recipe(name).items():
        used = context.params[option]
        yours = "" if used == value else f"  yours; the recipe has {value}"
        say(f"  {option:13} {used}{yours}")
