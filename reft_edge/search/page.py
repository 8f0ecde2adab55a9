"""A search as one HTML page: scores over parameters and learning rates, and all trials."""

from collections.abc import Callable, Sequence

from reft_edge.inspection.charts import Chart, Dot, scatter
from reft_edge.inspection.facts import one_line
from reft_edge.inspection.page import template
from reft_edge.search.result import Tuned
from reft_edge.search.study import Tried


def render(found: Tuned) -> str:
    """The whole page."""
    return template("trials.html").render(
        name=one_line(found.path.name),
        facts=_facts(found),
        charts=_charts(found),
        rows=rows_of(found.tried, found.best),
    )


def rows_of(tried: Sequence[Tried], best: Tried | None) -> list[tuple[str, ...]]:
    """Trials as lines of a table, the first of them its head."""
    head = (
        "trial",
        "intervention",
        "positions",
        "layers",
        "rank",
        "lr",
        "parameters",
        "steps",
        "loss",
        "accuracy",
        "",
    )
    return [head, *(_row(one, best) for one in tried)]


def _row(one: Tried, best: Tried | None) -> tuple[str, ...]:
    settings = one.settings
    act_fn = settings.get("act_fn", "linear")
    notes = [
        *(["best"] if best is not None and one.number == best.number else []),
        *(["default"] if one.default else []),
        {"done": "", "worse": "stopped early", "time": "not finished", "failed": one.error}[one.state],
    ]
    return (
        str(one.number),
        f"{settings.get('intervention', '')}{'' if act_fn == 'linear' else f':{act_fn}'}",
        str(settings.get("positions", "")),
        str(settings.get("layers", "")),
        str(settings.get("rank", "")),
        f"{settings['lr']:.2g}" if "lr" in settings else "",
        f"{one.parameters:,}" if one.parameters else "",
        f"{one.steps:,}",
        "" if one.loss is None else f"{one.loss:.4f}",
        "" if one.accuracy is None else f"{one.accuracy:.3f}",
        ", ".join(note for note in notes if note),
    )


def _facts(found: Tuned) -> dict[str, str]:
    states = [one.state for one in found.tried]
    return {
        "Trials": f"{len(states)}, of them {states.count('done')} to the end",
        "Trained rows": f"{found.rows:,}",
        "Held-out rows": f"{found.held_out:,}",
        "Chosen by": found.score,
        "Best trial": str(found.best.number),
    }


def _charts(found: Tuned) -> list[tuple[str, Chart]]:
    done = [one for one in found.tried if one.measured is not None]
    kinds: list[tuple[str, Callable[[Tried], float]]] = [
        ("Accuracy", lambda one: one.accuracy or 0.0),
        ("Loss", lambda one: one.loss or 0.0),
    ]
    over: list[tuple[str, Callable[[Tried], float]]] = [
        ("parameters", lambda one: float(one.parameters)),
        ("learning rate", lambda one: float(one.settings["lr"])),
    ]
    return [
        (
            f"{name} over {across}",
            scatter([_dot(one, found, x(one), y(one)) for one in done], across, name.lower()),
        )
        for across, x in over
        for name, y in kinds
    ]


def _dot(one: Tried, found: Tuned, x: float, y: float) -> Dot:
    marked = one.default or one.number == found.best.number
    shown = [cell for cell in _row(one, found.best) if cell]
    return Dot(x, y, f"trial {'  '.join(shown)}", "other" if marked else "mark")
