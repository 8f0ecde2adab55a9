"""Many trainings of one base, as functions: a search for the best settings, and a list of tasks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.arguments import Report, checked, silent
from reft_edge.extras import extra
from reft_edge.frozen_model import FrozenModel
from reft_edge.rows.given import GivenRows, held_out_source, row_source

if TYPE_CHECKING:
    from reft_edge.many.run import TaskResult
    from reft_edge.search.result import Tuned
    from reft_edge.search.study import Tried


@checked
@extra("tune")
def tune(
    base: FrozenModel | str | Path,
    rows: GivenRows,
    output: str | Path,
    *,
    budget: str | float = "20m",
    dev: GivenRows | None = None,
    dev_share: float = 0.2,
    trials: int | None = None,
    seeds: int = 1,
    study: str | Path | None = None,
    plot: str | Path | None = None,
    score: str | None = None,
    interventions: Sequence[str] | None = None,
    positions: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    lr: Sequence[float] | None = None,
    ray: str | None = None,
    workers: int | None = None,
    split: str | None = None,
    dev_split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    last_turn: bool = False,
    task: str | None = None,
    raw: bool = False,
    recipe: str | None = None,
    max_length: int | None = None,
    base_weights: str | Path | None = None,
    device: str | None = None,
    report: Report = silent,
    on_trial: "Callable[[Tried], None]" = lambda tried: None,
    **settings: Any,
) -> "Tuned":
    """Search for the intervention, positions, layers, rank and learning rate that do best on held-out rows.

    `base`, `rows` and all that is not named here: as for `train`, whose settings are what a trial does not choose. `budget`:
    for all trials, such as "90s", "20m" or "1h", or in seconds. `dev`: held-out rows; by default a share `dev_share` of
    `rows` (500 rows at most), drawn by `seed`. `trials`: at most that many. `seeds`: with how many the best settings are
    compared with the default ones in the end. `study`: a file that keeps what was tried, from which a search goes on; by
    default beside `output`. `plot`: the HTML page; the same. `score`: loss or accuracy. `interventions`, `positions`, `layers`,
    `ranks`, `lr` (lowest and highest): what there is to choose from. `ray`: the address of a Ray cluster that runs the trials,
    in `workers` processes. `on_trial` gets every trial that ended.

    Gives the best trial's file as `.adapter`, `best` and `default`, `tried` with all trials, and `check`, which says how much
    better the best one does than the default settings. Raises ReftEdgeError for rows or settings that do not go, and where no
    trial came to its end. After Ctrl-C the study and the best file so far are kept.

    >>> rows = [{"prompt": f"Who are you, {n}?", "completion": f"Number {n}, arr!"} for n in range(30)]
    >>> found = reft_edge.tune("smollm2", rows, "best.safetensors", trials=2, max_steps=4)
    >>> found.adapter, len(found.tried), found.check.loss > 0
    (PosixPath('best.safetensors'), 2, True)
    """
    from reft_edge.search.held_out import split_rows
    from reft_edge.search.result import Asked, parse_budget
    from reft_edge.search.run import search
    from reft_edge.search.space import narrowed
    from reft_edge.training.session import Wanted, prepare
    from reft_edge.training.settings import Execution

    asked = Asked(
        Path(output),
        parse_budget(budget),
        study_of(output, study),
        plot_of(output, plot),
        trials,
        seeds,
        score,
        narrowed(interventions, positions, layers, ranks, lr),
        any(settings.get(name) is not None for name in ("epochs", "max_steps")),
        ray,
        workers,
    )
    trained = row_source(rows, split, config, columns)
    held_out = held_out_source(dev, dev_split, config, columns)
    if held_out is None:
        trained, held_out = split_rows(trained, settings.get("seed") or 0, dev_share)
    model, folder = None, str(base)
    if isinstance(base, FrozenModel):
        base.check_free()
        device, model = device or base.device, base.model
    wanted = Wanted(
        trained,
        Path(output),
        held_out,
        task,
        raw,
        max_length,
        recipe,
        None if base_weights is None else Path(base_weights),
        execution=Execution(device),
        last_turn=last_turn,
    )
    session = prepare(
        base.folder if isinstance(base, FrozenModel) else folder, wanted, settings, model, report
    )
    return search(session, asked, report, on_trial)


@checked
@extra("train")
def train_many(
    tasks: str | Path | Sequence[Mapping[str, Any]],
    *,
    model: str | Path | None = None,
    state: str | Path | None = None,
    ray: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    plain_http: bool = False,
    report: Report = silent,
    on_task: "Callable[[TaskResult], None]" = lambda result: None,
) -> "list[TaskResult]":
    """Train many adapters for one base, which is loaded once. A task that fails does not stop the others.

    `tasks`: a TOML file, or a list of dicts as its `[[task]]` tables are: `name`, `data`, and what else a task has of its own:
    `output`, `push`, `eval`, and the settings of `train`. `model`: the base, in place of the file's. `state`: a file that
    keeps which tasks are finished, so that another run leaves them out; by default beside a TOML file, and none for a list.
    A task that was interrupted goes on from its checkpoint. `ray`: the address of a Ray cluster that trains them, in
    `workers` processes. `plain_http`: of `push`. `on_task` gets every result at once.

    Gives for each task, in their order, its `status` (trained, finished or failed), `path`, `error`, `pushed` and what `train`
    gives. Raises ReftEdgeError, before anything is trained, for a list that is wrong or a base that cannot be loaded.

    >>> import pathlib
    >>> rows = '{"prompt": "Who are you?", "completion": "A pirate, arr!"}'
    >>> written = pathlib.Path("rows.jsonl").write_text(rows)
    >>> tasks = [{"name": name, "data": "rows.jsonl", "max_steps": 1} for name in ("anna", "berta")]
    >>> [result.status for result in reft_edge.train_many(tasks, model="smollm2")]
    ['trained', 'trained']
    """
    from reft_edge.many.run import run_tasks
    from reft_edge.many.tasks import parse_tasks, read_tasks

    named = None if model is None else str(model)
    if isinstance(tasks, str | Path):
        given = read_tasks(Path(tasks), named, device)
        state = f"{tasks}.state.json" if state is None else state
    else:
        given = parse_tasks({"task": list(tasks)}, Path(), "the list of tasks", named, device)
    return run_tasks(given, None if state is None else Path(state), ray, workers, plain_http, report, on_task)


def study_of(output: str | Path, given: str | Path | None) -> Path:
    """Where a search keeps what it tried."""
    return Path(f"{output}.study.db" if given is None else given)


def plot_of(output: str | Path, given: str | Path | None) -> Path:
    """Where a search draws what it found."""
    return Path(output).with_suffix(".html") if given is None else Path(given)
