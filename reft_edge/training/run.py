"""Training an adapter: the base stays frozen, the loss is taken on completions only."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from reft_edge.adapter.config import AdapterConfig
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place
from reft_edge.model.packed import count_parameters, is_quantised
from reft_edge.model.packed_base import use_exported_weights
from reft_edge.steering.hooks import Steering, steered
from reft_edge.steering.interventions import Interventions
from reft_edge.steering.likelihood import check_tokens, joined_logits
from reft_edge.training.checkpoint import Checkpoint
from reft_edge.training.classification import LabelledTexts
from reft_edge.training.data import Dataset, check_positions
from reft_edge.training.description import adapter_config, belongs_to, last_tenth, provenance
from reft_edge.training.frozen_base import checkpointed, compiled, frozen
from reft_edge.training.interrupts import Interrupts, interrupts
from reft_edge.training.objectives import Data
from reft_edge.training.output import check_room, checkpoint_of, training_to, write_adapter
from reft_edge.training.passes import Passes
from reft_edge.training.preference import Preferences
from reft_edge.training.profile import Profile
from reft_edge.training.settings import PLAIN, Execution, StepReport, TrainResult, TrainSettings
from reft_edge.training.steps import AfterStep, HeldOut, Steps, nothing_more
from reft_edge.training.trainer import Trainer
from reft_edge.training.turns import Example

_SETTLE = 2.0
"""Seconds within which a launcher passes on a signal that its processes have got already."""


def train(
    model: Any,
    base_name: str,
    data: Data,
    output: Path,
    settings: TrainSettings,
    evaluation: Data | None = None,
    resume: bool = False,
    save_every: int = 50,
    execution: Execution = PLAIN,
    base_weights: Path | None = None,
    report: Callable[[str], None] = lambda message: None,
    on_step: Callable[[StepReport], None] = lambda step: None,
    eval_every: int | None = None,
    after_step: AfterStep = nothing_more,
) -> TrainResult:
    """Train an adapter for a frozen model and write it to `output`.

    The kind of `data` says which: a causal language model learns completions, or to prefer one answer to another, an
    encoder and a new head learn labels.

    With `base_weights`, a folder that this model was exported to, the model is given that folder's 16-bit or quantised
    weights first, so that the adapter is trained on what it will meet on the device. They stay packed.

    The loss on the rows of `evaluation` is measured at the end, and every `eval_every` steps. `after_step` gets the training
    under way after each step; what it raises ends it.

    A checkpoint beside `output` is written every `save_every` steps, after the last one and when interrupted, and removed
    once `output` is written; `resume` continues from it. One that cannot be written is reported and the training goes on.
    If `output` cannot be written at the end, the adapter goes to another folder, which the error names. One process at
    a time trains to an output. Raises ReftEdgeError for settings the model cannot follow, a place that cannot be written
    or that another training writes to, a checkpoint of another training, a loss that is not finite, or rows too short
    for any of the positions.
    """
    started = time.perf_counter()
    _check_intervals(save_every, eval_every, evaluation)
    processes = execution.processes
    processes.from_main(lambda: check_place(output))
    labels = data.labels if isinstance(data, LabelledTexts) else ()
    config = adapter_config(model, base_name, settings, labels)
    for notice in _checked_rows(model, data, evaluation, settings):
        report(notice)
    base_parameters = count_parameters(model)
    weights = _rounded_weights(model, settings, base_weights, config.base_fingerprint)
    trainer, passes = _trainer(model, config, data, settings, execution, report)
    checkpoint = Checkpoint(checkpoint_of(output), belongs_to(settings, data, config, weights))
    steps = Steps(model, trainer, checkpoint, evaluation, save_every, eval_every, report, on_step, after_step)

    def write(found: HeldOut) -> tuple[int, int]:
        """Parameters and bytes."""
        described = dataclasses.replace(config, training=provenance(settings, data, trainer, found, weights))
        adapter = trainer.interventions.to_adapter(described)
        return adapter.num_parameters, processes.from_main(lambda: write_adapter(adapter, output, checkpoint))

    with _under_way(steps, output, execution, resume, passes) as (steering, caught):
        steps.run(steering, caught)
        found = _measured(steps, steering, write, output)
        parameters, size = write(found)
        processes.from_main(lambda: checkpoint.remove() and None)
    return TrainResult(
        output,
        size,
        parameters,
        base_parameters,
        trainer.steps,
        last_tenth(trainer.losses),
        found.loss,
        time.perf_counter() - started,
        found.accuracy,
        trainer.profile.a_step() if trainer.profile else None,
    )


def _trainer(
    model: Any,
    config: AdapterConfig,
    data: Data,
    settings: TrainSettings,
    execution: Execution,
    report: Callable[[str], None],
) -> tuple[Trainer, AbstractContextManager[None]]:
    """With the model in its place, and new interventions; and the context in which it runs."""
    place = execution.place()
    model = execution.processes.place(model, place)
    interventions = Interventions(config, settings.dropout, settings.seed, settings.start)
    passes = (
        None
        if isinstance(data, LabelledTexts)
        else Passes(model, interventions, data, settings, execution, report)
    )
    trainer = Trainer(
        model,
        interventions,
        settings,
        data,
        place,
        execution.processes,
        Profile(place) if execution.profile else None,
        passes or joined_logits,
    )
    return trainer, passes.attached() if passes else nullcontext()


@contextmanager
def _under_way(
    steps: Steps, output: Path, execution: Execution, resume: bool, passes: AbstractContextManager[None]
) -> Iterator[tuple[Steering, Interrupts]]:
    """Inside the block the output is held, the base frozen and steered, and signals are noted."""
    model, trainer, processes = steps.model, steps.trainer, execution.processes
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(training_to(output, steps.report)) and None)
        processes.from_main(lambda: check_room(output, steps.checkpoint.path, trainer.interventions))
        steps.begin(resume)
        caught = stack.enter_context(interrupts(settle=_SETTLE if processes.count > 1 else 0.0))
        stack.enter_context(frozen(model, trainer.autocast and not processes.sharded))
        stack.enter_context(checkpointed(model) if execution.checkpointing else nullcontext())
        stack.enter_context(compiled(model) if execution.compile else nullcontext())
        stack.enter_context(passes)
        yield stack.enter_context(steered(model, (trainer.interventions, 1.0))), caught


def _measured(steps: Steps, steering: Steering, write: Callable[[HeldOut], object], output: Path) -> HeldOut:
    """What is told of the held-out rows; the adapter is written first where they cannot be evaluated."""
    if steps.evaluation is None:
        return HeldOut()
    steps.report("evaluating on the held-out file")
    try:
        return steps.measure(steering)
    except BaseException as error:
        write(HeldOut())
        said = f"{output} is written, without the held-out rows' loss"
        if isinstance(error, Exception):
            raise ReftEdgeError(f"the held-out rows could not be evaluated: {error}. {said}") from error
        steps.report(said)
        raise


def _check_intervals(save_every: int, eval_every: int | None, evaluation: Data | None) -> None:
    for name, every in (("save_every", save_every), ("eval_every", eval_every)):
        if every is not None and every < 1:
            raise ReftEdgeError(f"{name} is {every}; expected 1 or more")
    if eval_every is not None and evaluation is None:
        raise ReftEdgeError("eval_every needs held-out rows; give a file with --eval")


def _rounded_weights(
    model: Any, settings: TrainSettings, exported: Path | None, fingerprint: str
) -> dict[str, Any]:
    """Give the model an exported folder's weights, where there is one; how these were rounded."""
    if settings.load_in and (exported is not None or not is_quantised(model)):
        raise ReftEdgeError("load_in is for a model that load_quantised gave, without an export's weights")
    if exported is None:
        return {}
    manifest = use_exported_weights(model, exported, fingerprint)
    return {"precision": manifest.precision, **manifest.quantisation}


def _checked_rows(
    model: Any, data: Data, evaluation: Data | None, settings: TrainSettings
) -> tuple[str, ...]:
    """Notices on rows that cannot be learnt from. Raises ReftEdgeError if all are such rows, or one has a token that the
    model lacks.
    """
    for part in (data, evaluation):
        if isinstance(part, LabelledTexts):
            check_tokens(model, [row.tokens.ids for row in part.examples])
        elif part is not None:
            check_tokens(model, [(*row.prompt, *row.completion) for row in answers_of(part)])
    if isinstance(data, LabelledTexts):
        return ()
    return check_positions(answers_of(data), settings.positions, settings.tied)


def answers_of(data: Dataset | Preferences) -> list[Example]:
    """Of a pair, both."""
    if isinstance(data, Dataset):
        return data.examples
    return [side for pair in data.examples for side in (pair.chosen, pair.rejected)]
