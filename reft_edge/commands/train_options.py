"""The options of `reft-edge train`."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.options import MOST_SEED
from reft_edge.errors import ReftEdgeError


def taken_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make a recipe's values the defaults of the options that follow."""
    if name is not None:
        from reft_edge.training.recipes import recipe

        try:
            context.default_map = recipe(name)
        except ReftEdgeError as error:
            raise typer.BadParameter(str(error)) from error
    return name


Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        show_default=False,
        help="Rows: a JSONL, JSON, CSV or Parquet file, or a dataset of the Hub (hub:OWNER/NAME). Their columns are prompt "
        "and completion, messages, Alpaca's or ShareGPT's, text and label, or prompt, chosen and rejected.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="The adapter file to write.", show_default=False)
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="Settings for a kind of task: commonsense, math, instruct or glue; or the LoReFT paper's: loreft-commonsense, "
        "loreft-math or loreft-glue. Your own options go first.",
        show_default=False,
        callback=taken_recipe,
        is_eager=True,
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="completion; classification: an encoder and a head for the rows' labels; or preference: DPO on chosen "
        "and rejected answers."
    ),
]
Intervention = Annotated[
    str, typer.Option(help="loreft, noreft, direft, nodireft, consreft, lobireft, steering or red.")
]
Layers = Annotated[str, typer.Option(help="Layers to edit: `all`, `3;9;18`, `0-5`, or a mix.")]
Rank = Annotated[int, typer.Option(help="Rank of each intervention.")]
Positions = Annotated[
    str,
    typer.Option(
        help="Tokens to edit: f7, l7, all, gen, gen5, joined with `+`; -f1 or -l1 leaves some out. Or a trigger, as in "
        "`'from:\"<tool>\"'`: from the last of this text in the prompt on."
    ),
]
Component = Annotated[
    str,
    typer.Option(help="What of each layer to edit: the output of its block, its attention or its mlp."),
]
Tied = Annotated[
    bool,
    typer.Option("--tied/--untied", help="One set of weights for all positions, or one for each part."),
]
ActFn = Annotated[
    str, typer.Option(help="Activation inside the edit; only `linear` runs on exported models.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as they stand, without the chat template.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
MaxSteps = Annotated[
    int | None, typer.Option(help="Optimiser steps, in place of --epochs.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(help="Rows a forward pass.")]
Accumulate = Annotated[int, typer.Option(help="Forward passes an optimiser step.")]
GroupByLength = Annotated[
    bool,
    typer.Option(
        "--group-by-length",
        help="Put rows of like length into one batch, so that less is padding; batches are still shuffled.",
    ),
]
Warmup = Annotated[float, typer.Option(help="Share of steps over which the learning rate rises.")]
Schedule = Annotated[str, typer.Option(help="Learning rate after the warm-up: linear, cosine or constant.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay; never applied to R.")]
Dropout = Annotated[float, typer.Option(help="Dropout on edited hidden states.")]
Clip = Annotated[float, typer.Option(help="Largest gradient norm.")]
Beta = Annotated[float, typer.Option(help="DPO's beta: how firmly the base's own preferences are kept.")]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="Seed of initial weights, row order and dropout.")
]
Start = Annotated[
    str,
    typer.Option(
        help="unchanged: edits begin as none; random: as pyreft's begin; or auto: unchanged where the formula can."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Base model arithmetic: fp32, bf16, or auto (bf16 where the hardware has it).")
]
MaxLength = Annotated[
    int,
    typer.Option(min=1, help="Leave out rows of more tokens than this; an encoder's texts are cut to it."),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        help="The vector a classification head reads: cls (the first token's) or mean.",
        show_default="mean for a sentence-transformers model that pools so, else cls",
    ),
]
BaseWeights = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        show_default=False,
        help="Train on the rounded weights of a folder that this model was exported to; they stay packed, and so take "
        "less memory.",
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option("--eval", help="Held-out rows; their loss is printed and saved.", show_default=False),
]
EvalSplit = Annotated[
    str | None,
    typer.Option(help="The same for the held-out rows.", show_default="validation, or test"),
]
LastTurn = Annotated[
    bool,
    typer.Option("--last-turn", help="Of a conversation train the last answer only, in place of all."),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between evaluations on the held-out rows.",
        show_default="only after the last step",
    ),
]
LossLog = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        show_default=False,
        help="Write every step's loss, and held-out losses, while training.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        show_default="none",
        help="A tracker that gets every step: tensorboard, wandb, or another that Accelerate knows; repeat it, or set "
        "commas, for several.",
    ),
]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")]
Device = Annotated[
    str | None,
    typer.Option(help="A torch device, such as cpu or cuda:0.", show_default="cuda if there is one"),
]
LoadIn = Annotated[
    str | None,
    typer.Option(help="Hold the frozen base in 4bit or 8bit, by bitsandbytes.", show_default=False),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpointing", help="Compute activations twice to keep fewer: less memory, slower."),
]
CompileBlocks = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model's blocks: faster steps after half a minute or so."),
]
SharedPrefix = Annotated[
    bool,
    typer.Option(
        "--shared-prefix/--no-shared-prefix",
        help="Run the tokens with which all rows of a batch begin, such as a system prompt, once for all of them.",
    ),
]
NeededTokens = Annotated[
    bool,
    typer.Option(
        "--needed-tokens/--all-tokens",
        help="Leave padding out, and out of the last block what no label needs.",
    ),
]
FrozenCache = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="MB",
        help="Keep hidden states below the lowest edited layer from one epoch to the next, in at most so many MB; 0 for none.",
    ),
]
FrozenCacheIn = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        show_default="in memory",
        help="Keep them in a file in this folder, which is removed in the end.",
    ),
]
Profile = Annotated[bool, typer.Option("--profile", help="Print where the time of a step goes.")]
