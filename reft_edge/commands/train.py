"""`reft-edge train`: an adapter for a frozen model."""

from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from reft_edge.commands import train_options as option
from reft_edge.commands.console import extra, plain_errors, print_json, say, show_table
from reft_edge.commands.options import Columns, Config, Json, Model, Split

if TYPE_CHECKING:
    from reft_edge.commands.screen import Screen
    from reft_edge.training.settings import TrainResult


def train(
    context: typer.Context,
    model: Model,
    data: option.Data,
    output: option.Output,
    recipe: option.Recipe = None,
    task: option.Task = "completion",
    intervention: option.Intervention = "loreft",
    layers: option.Layers = "all",
    rank: option.Rank = 4,
    positions: option.Positions = "f7+l7",
    component: option.Component = "block",
    tied: option.Tied = False,
    act_fn: option.ActFn = "linear",
    raw: option.Raw = False,
    lr: option.Lr = 2e-3,
    epochs: option.Epochs = 3.0,
    max_steps: option.MaxSteps = None,
    batch_size: option.BatchSize = 16,
    accumulate: option.Accumulate = 1,
    group_by_length: option.GroupByLength = False,
    warmup: option.Warmup = 0.1,
    schedule: option.Schedule = "linear",
    weight_decay: option.WeightDecay = 0.0,
    dropout: option.Dropout = 0.0,
    clip: option.Clip = 1.0,
    beta: option.Beta = 0.1,
    seed: option.Seed = 0,
    start: option.Start = "auto",
    dtype: option.Dtype = "auto",
    max_length: option.MaxLength = 1024,
    pooling: option.Pooling = None,
    base_weights: option.BaseWeights = None,
    evaluate: option.Evaluate = None,
    split: Split = None,
    eval_split: option.EvalSplit = None,
    config: Config = None,
    columns: Columns = None,
    last_turn: option.LastTurn = False,
    eval_every: option.EvalEvery = None,
    loss_log: option.LossLog = None,
    report_to: option.ReportTo = None,
    save_every: option.SaveEvery = 50,
    resume: option.Resume = False,
    device: option.Device = None,
    load_in: option.LoadIn = None,
    checkpointing: option.Checkpointing = False,
    compile_blocks: option.CompileBlocks = False,
    shared_prefix: option.SharedPrefix = True,
    needed_tokens: option.NeededTokens = True,
    frozen_cache: option.FrozenCache = 512,
    frozen_cache_in: option.FrozenCacheIn = None,
    profile: option.Profile = False,
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
            execution=Execution(
                device,
                processes,
                profile,
                checkpointing,
                compile_blocks,
                shared_prefix,
                needed_tokens,
                frozen_cache,
                frozen_cache_in,
            ),
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
        if kind := port_kind_of(intervention, act_fn):
            say(f"to run it, export the model with --ports affine,{kind}")


def port_kind_of(intervention: str, act_fn: str) -> str | None:
    """What an export must be asked for to run such an adapter; None for what every export has."""
    return "act" if act_fn != "linear" else "diagonal" if intervention == "red" else None


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
    for setting, value in recipe(name).items():
        used = context.params[setting]
        yours = "" if used == value else f"  yours; the recipe has {value}"
        say(f"  {setting:13} {used}{yours}")
