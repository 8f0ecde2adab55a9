"""`reft-edge tune`: the settings that do best on held-out rows, found by trying."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_edge.api import tune as tune_adapter
from reft_edge.commands import train_options as option
from reft_edge.commands.console import fail, plain_errors, print_json, say, show_table
from reft_edge.commands.options import Columns, Config, Json, Model, Split
from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.search.result import Tuned
    from reft_edge.search.study import Tried

_SHOWN = 12
"""Trials of the table that is printed."""

Choices = list[str] | None
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        show_default=False,
        help="Run on a Ray cluster: its address, such as auto or 10.0.0.5:6379. MODEL is at the same place on each machine.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes of the Ray cluster, each with the base.", show_default="one a machine"
    ),
]


def tune(
    model: Model,
    data: option.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The best trial's adapter file.", show_default=False)
    ],
    budget: Annotated[str, typer.Option(help="Time for all trials: 90s, 20m, 1h or 1h30m.")] = "20m",
    dev: Annotated[
        str | None,
        typer.Option(help="Held-out rows, as DATA.", show_default="a share of DATA, drawn by the seed"),
    ] = None,
    dev_share: Annotated[float, typer.Option(help="That share; at most 500 rows.")] = 0.2,
    trials: Annotated[
        int | None, typer.Option(min=1, help="At most so many trials.", show_default=False)
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Seeds with which the best settings and the default ones are compared in the end."
        ),
    ] = 1,
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="OUTPUT.study.db",
            help="Keeps what was tried (SQLite, Optuna's form); a search with the same options goes on from it.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            show_default="OUTPUT with .html",
            help="A page with accuracy and loss over parameters, and all trials.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="What trials are chosen by, on held-out rows: loss, or accuracy (whole answers, labels, preferences).",
            show_default="loss for completions, else accuracy",
        ),
    ] = None,
    intervention: Annotated[
        Choices, typer.Option(help="Try this intervention only; repeatable.", show_default="five of them")
    ] = None,
    positions: Annotated[
        Choices, typer.Option(help="Try these positions only; repeatable.", show_default="seven of them")
    ] = None,
    layers: Annotated[
        Choices,
        typer.Option(
            help="Try these layers only; repeatable.",
            show_default="all, halves, the middle third, every fourth",
        ),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="Try this rank only; repeatable.", show_default="1, 2, 4, 8, 16")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Learning rates to choose from.", show_default="2e-4:2e-2"),
    ] = None,
    ray: Ray = None,
    workers: Workers = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Search around the settings of this recipe, in place of the defaults of train.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="completion, classification or preference, as for train.", show_default="as the model tells"
        ),
    ] = None,
    raw: option.Raw = False,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the data of each trial.", show_default="3, or as many as leave time for several"
        ),
    ] = None,
    max_steps: option.MaxSteps = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward pass.", show_default="16")] = None,
    seed: option.Seed = 0,
    dtype: option.Dtype = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Leave out rows of more tokens; an encoder's texts are cut.", show_default="1024"
        ),
    ] = None,
    base_weights: option.BaseWeights = None,
    load_in: option.LoadIn = None,
    split: Split = None,
    dev_split: option.EvalSplit = None,
    config: Config = None,
    columns: Columns = None,
    last_turn: option.LastTurn = False,
    device: option.Device = None,
    as_json: Json = False,
) -> None:
    """Search for the settings of an adapter that do best on held-out rows, and keep the best file."""
    from reft_edge.commands.screen import Screen

    console = Screen(stderr=True)
    tried: list[Tried] = []

    def tell(text: str) -> None:
        with suppress(OSError):
            console.say(text)

    def told(one: "Tried") -> None:
        tried.append(one)
        tell(_line(one))

    with plain_errors():
        from reft_edge.rows.given import parse_columns

        try:
            found = tune_adapter(
                model,
                data,
                output,
                budget=budget,
                dev=dev,
                dev_share=dev_share,
                trials=trials,
                seeds=seeds,
                study=study,
                plot=plot,
                score=score,
                interventions=intervention,
                positions=positions,
                layers=layers,
                ranks=rank,
                lr=_range(lr),
                ray=ray,
                workers=workers,
                split=split,
                dev_split=dev_split,
                config=config,
                columns=parse_columns(columns) or None,
                last_turn=last_turn,
                task=task,
                raw=raw,
                recipe=recipe,
                max_length=max_length,
                base_weights=base_weights,
                device=device,
                report=tell,
                on_trial=told,
                epochs=epochs,
                max_steps=max_steps,
                batch_size=batch_size,
                seed=seed,
                dtype=dtype,
                load_in=load_in,
            )
        except KeyboardInterrupt as interrupt:
            _interrupted(tried, output, interrupt, as_json)
    if as_json:
        print_json(_as_json(found))
    else:
        _print_result(found)


def _range(given: str | None) -> tuple[float, ...] | None:
    """Two learning rates. Raises ReftEdgeError for anything else."""
    if given is None:
        return None
    try:
        low, high = map(float, given.split(":"))
    except ValueError as error:
        raise ReftEdgeError(
            f"cannot read the learning rates {given!r}; write LOW:HIGH, such as 2e-4:2e-2"
        ) from error
    return low, high


def _line(one: "Tried") -> str:
    from reft_edge.search.page import rows_of

    cells = rows_of([one], None)[1]
    scores = "" if one.loss is None else f"  held-out loss {one.loss:.4f}, accuracy {one.accuracy:.3f}"
    return (
        f"trial {'  '.join(cell for cell in cells[:6])}{scores}  {one.seconds:,.0f} s  {cells[-1]}".rstrip()
    )


def _interrupted(tried: list["Tried"], output: Path, interrupt: KeyboardInterrupt, as_json: bool) -> None:
    """What is there when a search is interrupted. Raises typer.Exit."""
    from reft_edge.files import sha256_of
    from reft_edge.search.page import rows_of

    found: Tuned | None = getattr(interrupt, "found", None)
    ended = tried if found is None else found.tried
    if as_json:
        print_json({"interrupted": True, "tried": [_trial(one) for one in ended]})
    elif found is not None:
        show_table(rows_of(_shown(found), found.best))
    kept = found is not None and output.is_file() and sha256_of(output) == found.best.sha256
    so_far = f"{output} is the best trial's so far; " if kept else ""
    fail(f"interrupted: {so_far}the same command goes on from here")
    raise typer.Exit(128 + getattr(interrupt, "number", 2))


def _trial(one: "Tried") -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if name != "measured"}


def _as_json(found: "Tuned") -> dict[str, Any]:
    check = found.check
    assert check is not None
    checked = {**vars(check), "better": check.better}
    if check.difference is not None:
        checked["difference"] = vars(check.difference)
    trials = {
        "best": _trial(found.best),
        "default": None if found.default is None else _trial(found.default),
        "tried": [_trial(one) for one in found.tried],
    }
    return {**vars(found), **trials, "check": checked}


def _print_result(found: "Tuned") -> None:
    from reft_edge.search.page import rows_of

    shown = _shown(found)
    show_table(rows_of(shown, found.best))
    if hidden := len(found.tried) - len(shown):
        say(f"and {hidden} more; {found.plot} has them all")
    check = found.check
    assert check is not None
    say(
        f"wrote {found.path}: trial {found.best.number}, held-out loss {check.loss:.4f}, accuracy {check.accuracy:.4f} "
        f"on {found.held_out:,} held-out answers; measured again from the file"
    )
    say(_worth(found))
    say(f"wrote {found.plot}; {found.study} keeps the study")


def _shown(found: "Tuned") -> list["Tried"]:
    """The best trials first; the default ones are never left out."""
    ordered = sorted(found.tried, key=lambda one: _order(one, found.score))
    return [one for number, one in enumerate(ordered) if number < _SHOWN or one.default]


def _order(one: "Tried", score: str) -> tuple[bool, float]:
    value = one.accuracy if score == "accuracy" else one.loss
    return one.state != "done", float("inf") if value is None else -value if score == "accuracy" else value


def _worth(found: "Tuned") -> str:
    """Whether the search was worth it."""
    check = found.check
    assert check is not None
    if found.default is None:
        return "the default settings could not be trained on these rows"
    if check.difference is None:
        return "the default settings are the best ones: the search found none that do better"
    gain = check.difference
    seeds = ""
    if check.best_seeds:
        pairs = (("best", check.best_seeds), ("default", check.default_seeds))
        scores = "; ".join(
            f"{name} {', '.join(f'{value:.4f}' for value in values)}" for name, values in pairs
        )
        seeds = f". With further seeds: {scores}"
    verdict = "the search was worth it" if check.better else "that may be chance"
    return (
        f"beside the default settings on the same rows: {found.score} better by {gain.mean:.4f}, 95 % interval {gain.low:.4f} "
        f"to {gain.high:.4f}; {verdict}{seeds}"
    )
