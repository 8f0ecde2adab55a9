"""From what a user asks for to a training that can run: the task, the prompt format, the rows as tokens, the frozen base."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_apart, check_place, same_file
from reft_edge.model.device import chosen_dtype
from reft_edge.model.encoders import check_task, default_pooling, is_encoder, load_encoder, load_text_tokens
from reft_edge.model.loading import context_of, load_model, load_model_prompts
from reft_edge.model.packed_base import load_exported, load_halved
from reft_edge.model.prompts import Prompts
from reft_edge.model.quantised import load_quantised
from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.rows.source import RowSource, file_of
from reft_edge.training.classification import LabelledTexts, load_labelled
from reft_edge.training.data import Dataset, load_dataset
from reft_edge.training.loss_log import LossLog
from reft_edge.training.objectives import Data
from reft_edge.training.output import checkpoint_of, training_to
from reft_edge.training.preference import load_preferences
from reft_edge.training.recipes import recipe as recipe_options
from reft_edge.training.run import answers_of, train
from reft_edge.training.settings import PLAIN, Execution, StepReport, TrainResult, TrainSettings, of_kind
from reft_edge.training.trackers import Trackers, trackers
from reft_edge.training.triggers import check_triggers, tokenised

Report = Callable[[str], None]
Working = Callable[[str], AbstractContextManager[None]]
"""Gives the context in which something that takes long is done; its argument says what."""

MAX_LENGTH = 1024


@dataclass(frozen=True)
class Wanted:
    """What a training is asked for; the fields of TrainSettings come beside it."""

    rows: RowSource
    output: Path
    evaluation: RowSource | None = None
    """Held-out rows."""
    task: str | None = None
    """completion, classification or preference; by default classification for an encoder, else completion."""
    raw: bool = False
    """Prompts as they stand, without the chat template."""
    max_length: int | None = None
    """Tokens: longer rows are left out, an encoder's texts are cut; by default MAX_LENGTH. Never more than the model's
    context."""
    recipe: str | None = None
    base_weights: Path | None = None
    loss_log: Path | None = None
    report_to: tuple[str, ...] = ()
    """Trackers, by Accelerate's names."""
    resume: bool = False
    save_every: int = 50
    eval_every: int | None = None
    execution: Execution = PLAIN
    last_turn: bool = False
    """Of a conversation only the last answer is trained, in place of all."""


@dataclass(frozen=True)
class Session:
    """A training whose rows are read and, once it can run, whose base is loaded."""

    wanted: Wanted
    folder: ModelFolder
    """The base's."""
    data: Data
    evaluation: Data | None
    settings: TrainSettings
    model: Any = None
    log: LossLog | None = None
    """This and the trackers are the main process's."""
    trackers: Trackers | None = None

    def with_model(self, model: Any = None) -> "Session":
        """The same with its base: `model` where it is loaded already and will do, else what takes the least memory."""
        return dataclasses.replace(self, model=self._base(model))

    def _base(self, model: Any) -> Any:
        folder, wanted = self.folder, self.wanted
        if isinstance(self.data, LabelledTexts):
            return load_encoder(folder) if model is None else model
        return _decoder(folder, wanted, self.settings, model)

    def run(
        self, report: Report = lambda message: None, on_step: Callable[[StepReport], None] = lambda step: None
    ) -> TrainResult:
        """Train to the end and write the adapter; see `reft_edge.training.run.train`."""

        log, trackers, wanted = self.log, self.trackers, self.wanted

        def after(step: StepReport) -> None:
            on_step(step)
            for tell in (log, trackers):
                if tell is not None:
                    tell(step)

        with ExitStack() as stack:
            wanted.execution.processes.from_main(lambda: self._start_trackers(stack))
            result = train(
                self.model,
                self.folder.name,
                self.data,
                wanted.output,
                self.settings,
                evaluation=self.evaluation,
                resume=wanted.resume,
                save_every=wanted.save_every,
                execution=wanted.execution,
                base_weights=wanted.base_weights,
                report=report,
                on_step=after,
                eval_every=wanted.eval_every,
            )
            if trackers is not None:
                trackers.end(result)
        if log is not None and self.evaluation is not None:
            log.end(result.steps, result.evaluation)
        return result

    def _start_trackers(self, stack: ExitStack) -> None:
        if self.trackers is not None:
            stack.enter_context(self.trackers.running(self._described()))

    def _described(self) -> dict[str, Any]:
        """What a tracker keeps beside the losses; texts, numbers, True and False."""
        named = {"base": self.folder.name, "data_sha256": self.data.digest, "rows": len(self.data.examples)}
        settings = dataclasses.asdict(self.settings)
        return named | {name: value for name, value in settings.items() if value is not None}


def prepare(
    base: str | ModelFolder,
    wanted: Wanted,
    settings: dict[str, Any],
    model: Any = None,
    report: Report = lambda message: None,
    working: Working = lambda what: nullcontext(),
) -> Session:
    """Check everything, read the rows, load the base. `settings` are fields of TrainSettings; None leaves its default.

    `model` is the base's PyTorch model where it is loaded already; it is used where the training leaves its weights as they
    are. Raises ReftEdgeError for what cannot be trained, before a model is loaded.
    """
    session = read_session(base, wanted, settings, report, working)
    with working(f"loading {session.folder.name}"):
        return session.with_model(model)


def read_session(
    base: str | ModelFolder,
    wanted: Wanted,
    settings: dict[str, Any],
    report: Report = lambda message: None,
    working: Working = lambda what: nullcontext(),
) -> Session:
    """The same without a model."""
    wanted, settings = _with_recipe(wanted, settings)
    processes = wanted.execution.processes
    told: dict[str, Any] = {}
    processes.from_main(lambda: told.update(_told_of_steps(wanted, report)))
    with processes.main_first():
        folder = resolve_model(base, report) if isinstance(base, str) else base
    task = wanted.task or ("classification" if is_encoder(folder) else "completion")
    check_task(task, folder)
    classifies = task == "classification"
    load_in = settings.get("load_in")
    if classifies and wanted.base_weights:
        raise ReftEdgeError("--base-weights is for decoders: an encoder's export rounds nothing")
    if load_in and (classifies or wanted.base_weights):
        raise ReftEdgeError("--load-in is for decoders, and takes the place of --base-weights")
    prompts = load_model_prompts(folder)
    prompt_format = "raw" if wanted.raw or classifies or prompts.template is None else "chat"
    pooling = (settings.get("pooling") or default_pooling(folder)) if classifies else ""
    chosen = TrainSettings(**{**settings, "prompt_format": prompt_format, "pooling": pooling})
    if not classifies:
        chosen = dataclasses.replace(chosen, positions=tokenised(chosen.positions, prompts))
    data, evaluation = _read(wanted, task, folder, prompts, prompt_format, report, working)
    if not isinstance(data, LabelledTexts):
        check_triggers(answers_of(data), chosen.positions, chosen.tied, prompts)
    return Session(wanted, folder, data, evaluation, chosen, **told)


def _decoder(folder: ModelFolder, wanted: Wanted, settings: TrainSettings, model: Any) -> Any:
    """The base in the form in which it takes the least memory for this training; `model` if that will do."""
    if wanted.base_weights is not None:
        return load_exported(folder, wanted.base_weights)
    place = wanted.execution.place()
    dtype = chosen_dtype(settings.dtype, place)
    if settings.load_in:
        return load_quantised(folder, settings.load_in, place, dtype)
    if model is not None:
        return model
    sharded = wanted.execution.processes.sharded
    return load_halved(folder) if dtype == torch.bfloat16 and not sharded else load_model(folder)


def _with_recipe(wanted: Wanted, settings: dict[str, Any]) -> tuple[Wanted, dict[str, Any]]:
    """The settings that were given over those of the recipe. Raises ReftEdgeError for one that there is not."""
    given = {name: value for name, value in settings.items() if value is not None}
    known = {field.name for field in dataclasses.fields(TrainSettings)} - {"prompt_format"}
    if unknown := sorted(given.keys() - known):
        raise ReftEdgeError(
            f"there is no setting {', '.join(unknown)}; expected one of {', '.join(sorted(known))}"
        )
    given = {name: of_kind(name, value) for name, value in given.items()}
    if wanted.recipe is None:
        return wanted, given
    values = {**recipe_options(wanted.recipe), **given}
    task, length = values.pop("task", None), values.pop("max_length", None)
    return dataclasses.replace(
        wanted, task=wanted.task or task, max_length=wanted.max_length or length
    ), values


def _told_of_steps(wanted: Wanted, report: Report) -> dict[str, Any]:
    """The Session's `log` and `trackers`. What would stop the training at its end is found before a model is loaded."""
    _check_places(wanted)
    log = None if wanted.loss_log is None else LossLog(wanted.loss_log, wanted.resume, report)
    return {"log": log, "trackers": trackers(wanted.report_to, wanted.output, report)}


def _check_places(wanted: Wanted) -> None:
    """Raise ReftEdgeError for places that cannot be written, or that one would replace of the other."""
    read = [file_of(source) for source in (wanted.rows, wanted.evaluation) if source is not None]
    for path in (wanted.output, wanted.loss_log):
        if path is not None:
            check_apart(path, *read)
    if wanted.eval_every is not None and wanted.evaluation is None:
        raise ReftEdgeError("--eval-every needs held-out rows; give a file with --eval")
    check_place(wanted.output)
    check_place(checkpoint_of(wanted.output))
    with training_to(wanted.output):
        pass
    written = (wanted.output, checkpoint_of(wanted.output))
    if wanted.loss_log is not None and any(same_file(wanted.loss_log, path) for path in written):
        raise ReftEdgeError(f"the loss log {wanted.loss_log} would replace the adapter; give another name")


def _read(
    wanted: Wanted,
    task: str,
    folder: ModelFolder,
    prompts: Prompts,
    prompt_format: str,
    report: Report,
    working: Working,
) -> tuple[Data, Data | None]:
    """The rows and the held-out rows as the task wants them; what was left out is reported."""
    length = MAX_LENGTH if wanted.max_length is None else wanted.max_length
    if task == "classification":
        tokens = load_text_tokens(folder, length)

        def load(source: RowSource, labels: tuple[str, ...] | None) -> Data:
            return load_labelled(source, tokens, labels)
    else:
        length = min(length, context_of(folder) or length)

        def load(source: RowSource, labels: tuple[str, ...] | None) -> Data:
            if task == "preference":
                return load_preferences(source, prompts, prompt_format, length)
            return load_dataset(source, prompts, prompt_format, length, wanted.last_turn)

    with working(f"reading {wanted.rows}"):
        rows = load(wanted.rows, None)
        labels = rows.labels if isinstance(rows, LabelledTexts) else None
        held_out = None if wanted.evaluation is None else load(wanted.evaluation, labels)
    _report(rows, length, report)
    if held_out is not None:
        _report(held_out, length, lambda message: report(f"held out: {message}"))
    return rows, held_out


def _report(data: Data, length: int, report: Report) -> None:
    """What the rows were read as, and what of them is not trained."""
    if data.read is not None:
        report(str(data.read))
    if isinstance(data, LabelledTexts):
        return
    if _several(data):
        report(
            f"they have {len(data.examples) + data.left_out:,} answers, each trained behind what comes before it"
        )
    if data.left_out:
        report(
            f"{data.left_out:,} of {data.left_out + len(data.examples):,} {'answers' if _several(data) else 'rows'} are longer "
            f"than {length:,} tokens{' with their prompts' if _several(data) else ''} and are left out"
        )
    for notice in data.notices:
        report(notice)


def _several(data: Data) -> bool:
    """Whether rows have several answers that are trained."""
    if not isinstance(data, Dataset) or data.read is None:
        return False
    return len(data.examples) + data.left_out > data.read.rows
