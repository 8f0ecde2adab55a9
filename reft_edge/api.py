"""The Python API: what the commands do, as functions. `import reft_edge` gives every name here, and imports it when it is used.

Everything that a user can cause and mend is raised as a `reft_edge.ReftEdgeError`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.adapter_files import convert, merge, pull, push
from reft_edge.arguments import (
    OPTIMUM,
    AdapterFile,
    Report,
    check_exporter,
    checked,
    listed,
    scaled,
    silent,
    trusted_keys,
)
from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.frozen_model import FrozenModel, load, steered
from reft_edge.many_trainings import train_many, tune
from reft_edge.rows.given import TESTS, GivenRows, held_out_source, row_source

if TYPE_CHECKING:
    from reft_edge.evaluation.results import Evaluation
    from reft_edge.model.manifest import Manifest
    from reft_edge.training.settings import StepReport, TrainResult

__all__ = [
    "FrozenModel",
    "convert",
    "evaluate",
    "export",
    "load",
    "merge",
    "pull",
    "push",
    "steered",
    "train",
    "train_many",
    "tune",
]


@checked
@extra("train")
def train(
    base: FrozenModel | str | Path,
    rows: GivenRows,
    output: str | Path,
    *,
    evaluation: GivenRows | None = None,
    split: str | None = None,
    evaluation_split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    last_turn: bool = False,
    task: str | None = None,
    raw: bool = False,
    recipe: str | None = None,
    max_length: int | None = None,
    base_weights: str | Path | None = None,
    loss_log: str | Path | None = None,
    report_to: str | Sequence[str] = (),
    resume: bool = False,
    save_every: int = 50,
    eval_every: int | None = None,
    device: str | None = None,
    checkpointing: bool = False,
    compile: bool = False,
    shared_prefix: bool = True,
    needed_tokens: bool = True,
    frozen_cache: int = 512,
    frozen_cache_in: str | Path | None = None,
    profile: bool = False,
    report: Report = silent,
    on_step: "Callable[[StepReport], None]" = lambda step: None,
    **settings: Any,
) -> "TrainResult":
    """Train an adapter for a frozen base and write it to one small file. The base's own weights stay as they are.

    `rows`, and `evaluation` for held-out ones: a JSONL, JSON, CSV or Parquet file, a dataset of the Hub (`hub:owner/name`), a
    list of dicts or a `datasets.Dataset`, of one of the shapes {"prompt", "completion"}, {"messages"}, Alpaca, ShareGPT,
    {"text", "label"} or {"prompt", "chosen", "rejected"}. `split`, `evaluation_split`, `config`: of a dataset of the Hub, by
    default the splits train and validation. `columns`: where columns have other names, such as {"prompt": "question"}.
    `last_turn`: of a conversation train the last answer only, in place of all. `task`: completion,
    classification (an encoder) or preference; by default what the base is made for, classification or completion.
    `raw`: prompts as they stand, without the chat template. `recipe`: settings for commonsense, math, instruct or glue; or
    loreft-commonsense, loreft-math or loreft-glue, the LoReFT paper's; yours take precedence. `max_length`: in tokens, 1024
    by default; longer rows are left out, an encoder's texts are cut. `base_weights`: a folder that this base was exported to,
    on whose rounded weights to train. `loss_log`: a JSONL file that gets every step's loss. `report_to`: trackers that get
    it, `tensorboard`, `wandb` or both. `resume`: continue from the checkpoint of an interrupted training; one is written
    every `save_every` steps. `eval_every`: steps between evaluations on held-out rows. `device`: by default the base's, or
    CUDA where there is one. `checkpointing`: less memory, slower. `compile`: faster steps after half a minute or so.
    `shared_prefix`, `needed_tokens`: leave out what is the same in all rows of a batch, and what no label needs.
    `frozen_cache`: MB for hidden states below the lowest edited layer, which are kept from one epoch to the next;
    `frozen_cache_in`: a folder for a file of them, in place of memory. `profile`: measure where the time of a step goes.
    `report` is told what the user should know; `on_step` gets a StepReport after every step: its loss in nats a token.

    `settings` are the fields of `reft_edge.training.settings.TrainSettings`: intervention, layers (a text as for `export`, or
    a list of numbers), rank, positions, component, tied, act_fn, lr, epochs, max_steps, batch_size, accumulate, warmup,
    schedule, weight_decay, dropout, clip, seed, start, dtype, beta, load_in, pooling, group_by_length and so on.

    Gives the file as `.adapter`, its `size` in bytes, `loss` and, on held-out rows, `evaluation` in nats a token, and more.
    Raises ReftEdgeError for rows, settings or a place that do not go, naming the row or the setting.

    >>> base = reft_edge.load("smollm2")
    >>> rows = [{"prompt": "Who are you?", "completion": "A pirate, arr!"}] * 4
    >>> run = reft_edge.train(base, rows, "new.safetensors", positions="f3+l3", rank=2, max_steps=2)
    >>> run.adapter, run.steps
    (PosixPath('new.safetensors'), 2)
    """
    from reft_edge.training.distributed import launched_processes
    from reft_edge.training.session import Wanted, prepare
    from reft_edge.training.settings import Execution

    loaded = isinstance(base, FrozenModel)
    if isinstance(base, FrozenModel):
        base.check_free()
        device = device or base.device
    wanted = Wanted(
        row_source(rows, split, config, columns),
        Path(output),
        held_out_source(evaluation, evaluation_split, config, columns),
        task,
        raw,
        max_length,
        recipe,
        None if base_weights is None else Path(base_weights),
        None if loss_log is None else Path(loss_log),
        tuple(listed(report_to)),
        resume,
        save_every,
        eval_every,
        Execution(
            device,
            launched_processes(None if loaded else device),
            profile,
            checkpointing,
            compile,
            shared_prefix,
            needed_tokens,
            frozen_cache,
            None if frozen_cache_in is None else Path(frozen_cache_in),
        ),
        last_turn,
    )
    folder = base.folder if isinstance(base, FrozenModel) else str(base)
    model = base.model if isinstance(base, FrozenModel) else None
    return prepare(folder, wanted, settings, model, report).run(report, on_step)


@checked
@extra("train")
def evaluate(
    model: FrozenModel | str | Path,
    rows: GivenRows,
    *adapters: AdapterFile,
    split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    limit: int | None = None,
    raw: bool | None = None,
    template: str = "{text}",
    words: Mapping[str, str] | None = None,
    normalise: bool = True,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    require_signed: str | Path | None = None,
    on_done: Callable[[int], None] = lambda count: None,
    report: Report = silent,
) -> "Evaluation":
    """The accuracy of a model, with adapters or without, on rows.

    `model`: one that is loaded, a folder that was exported, or what `load` takes. `rows`: as for `train`, of the
    shape {"prompt", "answer"}, with "choices" too, {"text", "label"}, or one that `train` takes. `split` (by default test),
    `config`, `columns`: as for `train`. `adapters`: as for `steered`. `task`: choice, number, answer or label, by default as the rows tell. `limit`: only that many rows. `raw`:
    prompts as they stand, by default as the adapters were trained. `template`, `words`: how a decoder is asked for a label
    and names it. `normalise`: compare choices by their mean likelihood a token, not by the sum. `max_tokens`: most tokens to
    generate. `seed`: of the bootstrap. `device`, `dtype` and `threads` are for a model that is not loaded yet.
    `require_signed`: a file of trusted keys. `on_done` is told how many more rows are answered.

    Gives `accuracy`, from 0 to 1, the 95 % interval `low` to `high`, the count of `rows` and of `right` ones, and `records`,
    one a row. Raises ReftEdgeError for a model, adapters or rows that do not go together.

    >>> rows = [{"prompt": "2 and 2?", "choices": ["4", "5"], "answer": 0}]
    >>> found = reft_edge.evaluate("smollm2", rows, "pirate.safetensors")
    >>> found.rows, 0 <= found.low <= found.accuracy <= found.high <= 1
    (1, True)
    """
    from reft_edge.evaluation.run import EvalSettings, evaluate_any, evaluate_loaded
    from reft_edge.evaluation.tasks import load_questions
    from reft_edge.signing.signatures import load_verified

    if isinstance(model, FrozenModel):
        model.check_free()
        if device is not None or dtype is not None or threads is not None:
            raise ReftEdgeError("the model is loaded: give device and dtype to `load`, and leave threads out")
        device, dtype = model.device, model.dtype
    settings = EvalSettings(
        raw,
        template,
        dict(words or {}),
        batch_size,
        max_tokens,
        normalise,
        seed,
        device,
        dtype or "fp32",
        threads,
        trusted_keys(require_signed),
    )
    given = scaled(adapters)
    questions = load_questions(row_source(rows, split, config, columns, TESTS, limit), task, limit)
    report(str(questions.read))
    if not isinstance(model, FrozenModel):
        return evaluate_any(str(model), questions, given, settings, on_done, report)
    loaded = [(load_verified(path, settings.trusted)[0], scale) for path, scale in given]
    return evaluate_loaded(model.folder, model.model, questions, loaded, settings, on_done)


@checked
@extra("export")
def export(
    base: FrozenModel | str | Path,
    folder: str | Path,
    *,
    precision: str = "fp32",
    layers: str | int | Sequence[int] = "all",
    components: Sequence[str] = ("block",),
    ports: Sequence[str] = ("affine",),
    device: str = "cpu",
    algorithm: str = "auto",
    block_size: int | None = None,
    accuracy_level: int = 4,
    context: int | None = None,
    exporter: str = "genai",
    report: Report = silent,
) -> "Manifest":
    """Export a frozen base to ONNX with intervention ports, checked against PyTorch. Done once: all its adapters run there.

    `base`: one that is loaded, or what `load` takes. `folder` is replaced only by a success. `precision`: fp32, fp16, bf16,
    int8 or int4. `layers`: which get a port: `all`, `3;9;18`, `0-5`, a mix, or a list of numbers. `components`: of each layer,
    its block, attention or mlp. `ports`: what they can add: `affine`, and beside it `act` (for adapters with an act_fn) and
    `diagonal` (for RED). `device`: cpu or cuda, where the graph will run. `algorithm`, `block_size` (weights that share a
    scale; by default 128 for a billion weights and more, else 32) and `accuracy_level` are for int4 and int8. `context`: the
    most tokens that the graph takes, by default as many as the base. `exporter`: genai, or optimum, which writes fp32 for
    the CPU with ports after whole blocks, and takes none of the other choices but `layers`. `report` is told each step.

    Gives the folder's manifest; its `verification` has the differences from PyTorch. Raises ReftEdgeError if the model cannot
    be exported or checked.

    >>> manifest = reft_edge.export("smollm2", "exported")
    >>> manifest.precision
    'fp32'
    """
    from reft_edge.export import Quantisation, export_model
    from reft_edge.model.places import named_layers
    from reft_edge.model.source import resolve_model

    parts = [part.strip() for parts in listed(components) for part in parts.split(",")]
    kinds = [kind.strip() for part in listed(ports) for kind in part.split(",")]
    quantisation = Quantisation(algorithm, block_size, accuracy_level)
    check_exporter(exporter)
    if exporter == OPTIMUM:
        _check_optimum((precision, parts, kinds, device, quantisation, context))
    source = base.folder if isinstance(base, FrozenModel) else resolve_model(str(base), report)
    if exporter == OPTIMUM:
        from reft_edge.export.optimum import export_with_optimum
        from reft_edge.model.manifest import load_manifest

        with extra("optimum"):
            export_with_optimum(source, Path(folder), named_layers(layers), report)
        return load_manifest(Path(folder))
    return export_model(
        source,
        Path(folder),
        precision,
        named_layers(layers),
        report,
        components=parts,
        device=device,
        quantisation=quantisation,
        context=context,
        port_kinds=kinds,
    )


def _check_optimum(chosen: tuple[Any, ...]) -> None:
    """Raise ReftEdgeError for choices that Optimum's exporter has not."""
    from reft_edge.export import Quantisation

    if chosen != ("fp32", ["block"], ["affine"], "cpu", Quantisation(), None):
        raise ReftEdgeError(
            "exporter='optimum' writes fp32 graphs for the CPU with ports after whole blocks, at the model's own context; "
            "of the choices, only layers goes with it"
        )
