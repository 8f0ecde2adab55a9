"""Charts: where the marks of a bar chart, a curve, a heat map or a cloud of points stand. parts.html draws them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LABEL_EVERY = 34
"""Units between axis labels, at least."""
_LEFT, _BELOW, _ABOVE = 46, 34, 12
"""Room beside a chart with axes, below and above it."""


@dataclass(frozen=True)
class Box:
    """A bar, or a cell of a heat map."""

    x: float
    y: float
    width: float
    height: float
    title: str
    kind: str = "mark"
    """`mark`, or `other` for what has another colour."""
    opacity: float = 1.0


@dataclass(frozen=True)
class Label:
    """Words at a place; `anchor` says which end of them is there: start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "start"


@dataclass(frozen=True)
class Dot:
    """A point of a curve or a cloud."""

    x: float
    y: float
    title: str
    kind: str = "mark"
    """As of a Box."""


@dataclass(frozen=True)
class Chart:
    """Everything is in units of the drawing, y downwards."""

    name: str
    width: float
    height: float
    boxes: Sequence[Box] = ()
    curve: Sequence[Dot] = ()
    """Points that a line joins."""
    dots: Sequence[Dot] = ()
    """Points that none does."""
    labels: Sequence[Label] = ()
    axes: Sequence[float] = ()
    """Heights of horizontal lines from `left` on."""
    left: float = _LEFT


def bars(values: Mapping[str, float], unit: str, top: float | None = None) -> Chart:
    """A bar for each named value; `top` fixes the scale's end."""
    width, height = 640 if len(values) > 12 else 420, 170
    highest = top or max(values.values(), default=0) or 1.0
    step = (width - _LEFT) / max(1, len(values))
    skip = max(1, -(-_LABEL_EVERY // int(max(1, step)))) if step < _LABEL_EVERY * 0.75 else 1
    axes, labels = _scale(highest, height)
    boxes = []
    for number, (name, value) in enumerate(values.items()):
        x = _LEFT + number * step
        tall = value / highest * (height - _BELOW - _ABOVE)
        kind = "other" if name.startswith("+") else "mark"
        boxes.append(
            Box(x + step * 0.12, height - _BELOW - tall, step * 0.76, tall, f"{name}: {value:.4g}", kind)
        )
        if number % skip == 0:
            labels.append(Label(x + step / 2, height - _BELOW + 14, name, "middle"))
    labels.append(Label(_LEFT, height - 4, unit))
    return Chart(unit, width, height, boxes, labels=labels, axes=axes)


def line(points: Sequence[tuple[int, float]], name: str) -> Chart:
    """A curve over steps."""
    width, height = 640, 220
    last, highest = max(1, points[-1][0]), max(max(value for _, value in points), 1e-12)
    axes, labels = _scale(highest, height)
    curve = [
        Dot(
            _LEFT + step / last * (width - _LEFT - 8),
            height - _BELOW - max(0.0, value) / highest * (height - _BELOW - _ABOVE),
            f"step {step}: {value:.4g}",
        )
        for step, value in points
    ]
    below = height - _BELOW + 16
    labels += [Label(_LEFT, below, "0"), Label(width - 8, below, f"step {last:,}", "end")]
    return Chart(name, width, height, curve=curve, labels=labels, axes=axes)


def scatter(points: Sequence[Dot], across: str, up: str) -> Chart:
    """Points at their numbers, with axes that fit them; those across are on a scale of logarithms, so they are above 0."""
    width, height = 640, 260
    logs = [math.log10(point.x) for point in points]
    left, right = _around(logs)
    low, high = _around([point.y for point in points])
    bottom, room = height - _BELOW, (height - _BELOW - _ABOVE, width - _LEFT - 12)
    dots = [
        Dot(
            _LEFT + (log - left) / (right - left) * room[1],
            bottom - (point.y - low) / (high - low) * room[0],
            point.title,
            point.kind,
        )
        for log, point in zip(logs, points, strict=True)
    ]
    axes, labels = [], []
    for part in (0.0, 0.5, 1.0):
        y, value = bottom - part * room[0], low + part * (high - low)
        axes.append(y)
        labels.append(Label(_LEFT - 6, y + 4, f"{value:.3g}", "end"))
        at = 10 ** (left + part * (right - left))
        anchor = ("start", "middle", "end")[round(2 * part)]
        labels.append(
            Label(_LEFT + part * room[1], bottom + 14, f"{at:,.0f}" if at >= 10 else f"{at:.2g}", anchor)
        )
    labels.append(Label(_LEFT, height - 4, f"{across} →, {up} ↑"))
    return Chart(f"{up} over {across}", width, height, dots=dots, labels=labels, axes=axes)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A little less than the lowest and a little more than the highest."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 0.1
    return low - margin, high + margin


def heatmap(
    cells: Mapping[tuple[int, int], float],
    rows: Sequence[str],
    columns: Sequence[str],
    highest: float,
    names: tuple[str, str],
) -> Chart:
    """Shades from none to `highest`; `cells` by (row, column) index; row 0 at the top."""
    left, above = 40, 20
    side = max(7.0, min(32.0, 560 / max(len(rows), len(columns))))
    width, height = left + side * len(columns) + 12, above + side * len(rows) + 20
    boxes = [
        Box(
            left + j * side,
            above + i * side,
            side - 1,
            side - 1,
            f"{names[0]} {rows[i]}, {names[1]} {columns[j]}: {value:.3g}",
            opacity=0.05 + 0.95 * (max(0.0, min(1.0, value / highest)) if highest else 0.0),
        )
        for (i, j), value in cells.items()
    ]
    skip_rows, skip_columns = -(-14 // int(side)), -(-24 // int(side))
    labels = [
        *(
            Label(left - 6, above + (i + 0.5) * side + 4, rows[i], "end")
            for i in range(0, len(rows), skip_rows)
        ),
        *(
            Label(left + (j + 0.5) * side, above - 6, columns[j], "middle")
            for j in range(0, len(columns), skip_columns)
        ),
        Label(left, height - 5, f"{names[0]} ↓, {names[1]} →; strongest {highest:.3g}"),
    ]
    return Chart(f"{names[0]} by {names[1]}", max(width, 240), height, boxes, labels=labels)


def _scale(highest: float, height: float) -> tuple[list[float], list[Label]]:
    """Axes from 0 to `highest`, and the scale's ends and middle in numbers."""
    floor, ceiling = height - _BELOW, _ABOVE
    marks = [(floor, 0.0), ((floor + ceiling) / 2, highest / 2), (ceiling, highest)]
    return [y for y, _ in marks], [Label(_LEFT - 6, y + 4, f"{value:.3g}", "end") for y, value in marks]
