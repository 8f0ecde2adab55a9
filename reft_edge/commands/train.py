"""`reft-edge train`: an adapter for a frozen model."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_edge.commands.console import extra, plain_errors, print_json, say, table
from reft_edge.commands.options import MOST_SEED, Json, Model
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen


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
        Path | None,
        typer.Option("--eval", help="Held-out rows; their loss is printed and saved.", show_default=False),
    ] = None,
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
        from reft_edge.training.distributed import launch_note, launched_processes

        processes = launched_processes(device)
        console = Screen(stderr=True, quiet=not processes.main)
        if (note := launch_note(processes)) is not None:
            console.say(note)
        from reft_edge.commands.training_progress import training_progress, working_on
        from reft_edge.files import check_apart, check_place
        from reft_edge.model.device import chosen_dtype
        from reft_edge.model.encoders import check_task, default_pooling, load_encoder, load_text_tokens
        from reft_edge.model.loading import load_model, load_model_prompts
        from reft_edge.model.quantised import load_quantised
        from reft_edge.model.source import resolve_model
        from reft_edge.training.classification import LabelledTexts, load_labelled
        from reft_edge.training.data import load_dataset
        from reft_edge.training.interrupts import Terminated
        from reft_edge.training.loss_log import LossLog
        from reft_edge.training.objectives import Data
        from reft_edge.training.preference import load_preferences
        from reft_edge.training.run import train as run_training
        from reft_edge.training.run import training_to
        from reft_edge.training.settings import Execution, StepReport, TrainSettings

        def tell(text: str) -> None:
            """A terminal or a pipe that is gone does not end a training."""
            with suppress(OSError):
                console.say(text)

        def begin() -> None:
            """What would stop the training at its end is found before a model is loaded."""
            for path in (output, loss_log):
                if path is not None:
                    check_apart(path, data, evaluate)
            if eval_every is not None and evaluate is None:
                raise ReftEdgeError("--eval-every needs held-out rows; give a file with --eval")
            check_place(output)
            with training_to(output):
                pass
            if loss_log is not None:
                check_apart(loss_log, output)
                logs.append(LossLog(loss_log, resume, tell))

        logs: list[LossLog] = []
        processes.from_main(begin)
        if recipe is not None:
            _print_recipe(recipe, context, console)
        with processes.main_first():
            folder = resolve_model(model, console.say)
        check_task(task, folder)
        classifies = task == "classification"
        if classifies and base_weights:
            raise ReftEdgeError("--base-weights is for decoders: an encoder's export rounds nothing")
        if load_in and (classifies or base_weights):
            raise ReftEdgeError("--load-in is for decoders, and takes the place of --base-weights")
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
            group_by_length=group_by_length,
            warmup=warmup,
            schedule=schedule,
            weight_decay=weight_decay,
            dropout=dropout,
            clip=clip,
            seed=seed,
            dtype=dtype,
            beta=beta,
            load_in=load_in or "",
            pooling=(pooling or default_pooling(folder)) if classifies else "",
        )
        execution = Execution(device, processes, profile, checkpointing, compile_blocks)
        rows: Data
        held_out: Data | None
        if classifies:
            tokens = load_text_tokens(folder, max_length)
            with working_on(console, f"reading {data}"):
                rows = load_labelled(data, tokens)
                held_out = load_labelled(evaluate, tokens, rows.labels) if evaluate else None
        else:
            load = load_preferences if task == "preference" else load_dataset
            with working_on(console, f"reading {data}"):
                rows = load(data, prompts, prompt_format, max_length)
                held_out = load(evaluate, prompts, prompt_format, max_length) if evaluate else None
        if not isinstance(rows, LabelledTexts) and rows.left_out:
            console.print(
                f"{rows.left_out} of {rows.left_out + len(rows.examples)} rows are longer than "
                f"{max_length} tokens and are left out"
            )
        if not isinstance(rows, LabelledTexts):
            for notice in rows.notices:
                console.say(notice)

        def base() -> Any:
            if load_in:
                place = execution.place()
                return load_quantised(folder, load_in, place, chosen_dtype(dtype, place))
            return load_encoder(folder) if classifies else load_model(folder)

        with working_on(console, f"loading {folder.name}"):
            loaded = base()
        with training_progress(console, tell) as show:

            def on_step(step: StepReport) -> None:
                show(step)
                for log in logs:
                    log(step)

            try:
                result = run_training(
                    loaded,
                    folder.name,
                    rows,
                    output,
                    settings,
                    evaluation=held_out,
                    resume=resume,
                    save_every=save_every,
                    execution=execution,
                    base_weights=base_weights,
                    report=tell,
                    on_step=on_step,
                    eval_every=eval_every,
                )
            except Terminated as signal:
                tell("terminated")
                raise typer.Exit(128 + signal.number) from None
        for log in logs if evaluate else ():
            log.end(result.steps, result.evaluation)
        processes.end()
    if not processes.main:
        return
    if as_json:
        print_json({**vars(result), "path": str(result.path)})
        return
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
    for line in table([("a step", "", ""), *rows, ("all", f"{total * 1000:,.1f} ms", "")]):
        say(line)


def _print_recipe(name: str, context: typer.Context, console: "Screen") -> None:
    from reft_edge.training.recipes import recipe

    say = console.say
    say(f"recipe {name}:")
    for option, value in recipe(name).items():
        used = context.params[option]
        yours = "" if used == value else f"  yours; the recipe has {value}"
        say(f"  {option:13} {used}{yours}")
