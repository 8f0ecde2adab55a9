"""An inspection as one HTML page: inline SVG, nothing fetched, dark or light as the reader's system is.

Every text that comes from a file is escaped, and the page's own policy lets it load or run nothing.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from reft_edge.inspection.weights import Inspection, Overlap, TokenShift

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1d2129; --soft: #5b6472; --line: #d9dce1;
  --mark: #2563c9; --other: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1c1f25; --text: #e6e8ec; --soft: #9aa3b2; --line: #343943; --mark: #6ea8ff;
    --other: #ff9b61; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .25rem; }
h3 { font-size: .95rem; margin: 1rem 0 .25rem; font-weight: 600; }
p { margin: 0 0 .75rem; color: var(--soft); max-width: 46rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.25rem;
  margin-top: 1rem; }
.scroll { overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); fill: none; }
.curve { stroke: var(--mark); stroke-width: 2; fill: none; stroke-linejoin: round; }
.mark { fill: var(--mark); } .other { fill: var(--other); }
section > .scroll > .wide { min-width: 34rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .5rem 1.25rem; margin: 0; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .5rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); font-weight: 400; }
th { color: var(--soft); font-size: .8rem; } td:first-child, th:first-child { text-align: left; }
code { background: var(--page); border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""
_LABEL_EVERY = 34
"""Units between axis labels, at least."""


def render(inspection: Inspection) -> str:
    """The whole page."""
    parts = [_header(inspection)]
    effect = inspection.effect
    if effect is not None and effect.norms:
        parts.append(
            _section(
                f"Edits on {effect.rows:,} rows",
                "How long the edit is, relative to the hidden state it is added to; mean over rows. Positions: 1 is the "
                "prompt's first token, -1 its last, +1 the answer's first.",
                _norms(effect.norms),
            )
        )
    if effect is not None and effect.divergence:
        parts.append(
            _section(
                "Shift of predictions",
                "KL divergence of the next token's probabilities with the adapter from those without, in nats, by the "
                "position that predicts (-1, the prompt's last token, predicts the answer's first; the answer has another colour).",
                bars(effect.divergence, "nats"),
            )
        )
    if effect is not None and (effect.gained or effect.lost):
        parts.append(
            _section(
                "The answer's first token",
                "Mean probability over rows, without the adapter and with it.",
                f'<div class="pair">{_tokens("Gained", effect.gained)}{_tokens("Lost", effect.lost)}</div>',
            )
        )
    if inspection.curve:
        parts.append(_section("Training", "Loss in nats by optimiser step.", line(inspection.curve)))
    if inspection.strengths:
        edited = [*map(str, inspection.config.layers)]
        body = "".join(
            f'<h3>{escape(strength.name)}</h3><div class="pair">'
            + bars(dict(zip(edited, strength.gains.tolist(), strict=True)), "largest gain, by layer")
            + bars(
                dict(zip(edited, strength.constants.tolist(), strict=True)),
                "constant part, by layer",
            )
            + "</div>"
            for strength in inspection.strengths
        )
        parts.append(
            _section(
                "What the weights say",
                "An edit is hA B + bB. The largest gain is AB's spectral norm, the constant part the length of bB.",
                body,
            )
        )
    if inspection.between is not None:
        overlap = inspection.between
        layers = [*map(str, overlap.layers)]
        parts.append(
            _section(
                f"Overlap with {printable(inspection.other)}",
                "Mean squared cosine of the principal angles between the subspaces that the two adapters write to: "
                "1 is the same subspace, 0 orthogonal ones.",
                '<div class="pair">'
                + bars(
                    dict(zip(layers, overlap.shared.tolist(), strict=True)), "squared cosine, by layer", 1.0
                )
                + bars(
                    dict(zip(layers, overlap.smallest.tolist(), strict=True)), "smallest angle, degrees", 90.0
                )
                + "</div>",
            )
        )
    if inspection.overlaps and len(inspection.config.layers) > 1:
        parts.append(
            _section(
                "Overlap between layers",
                "The same between the subspaces of this adapter's own layers.",
                '<div class="pair">' + "".join(map(_overlaps, inspection.overlaps)) + "</div>",
            )
        )
    title = escape(printable(inspection.name))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def facts(inspection: Inspection) -> dict[str, str]:
    """The file's description, for people; values may hold any text."""
    config = inspection.config
    found = {
        "base model": config.base_name,
        "base fingerprint": config.base_fingerprint,
        "file": f"{inspection.size / 1000:,.1f} kB, {inspection.parameters:,} parameters",
        "intervention": f"{config.intervention}, rank {config.rank}",
        "layers": f"{_ranges(config.layers)} of {config.num_layers}",
        "positions": f"{config.positions}, {'tied' if config.tied else 'untied'}",
        "prompts": config.prompt_format,
    }
    if config.act_fn != "linear":
        found["act_fn"] = config.act_fn
    if config.labels:
        found["labels"] = ", ".join(config.labels)
        found["pooling"] = config.pooling
    for name, value in config.training.items():
        if name != "curve" and value is not None:
            found.setdefault(_plain(name.replace("_", " ")), _plain(value))
    return found


def summary(inspection: Inspection) -> list[str]:
    """The same in a few lines for a terminal; texts from the file hold no control characters."""
    described = facts(inspection)
    width = max(map(len, described))
    lines = [f"{name:{width}}  {value}" for name, value in described.items()]
    if inspection.curve:
        (_, first), (step, last) = inspection.curve[0], inspection.curve[-1]
        lines.append(f"{'curve':{width}}  loss {first:.4g} to {last:.4g} in {step:,} steps")
    for overlap in inspection.overlaps if len(inspection.config.layers) > 1 else ():
        apart = overlap.shared[~np.eye(len(overlap.layers), dtype=bool)]
        lines.append(f"{'layers share':{width}}  {apart.mean():.1%} of their subspaces at {overlap.name}")
    if inspection.between is not None:
        between = inspection.between
        best = int(between.shared.argmax())
        lines.append(
            f"{'with the other':{width}}  {between.shared.mean():.1%} of subspaces shared, at most "
            f"{between.shared[best]:.1%}, at layer {between.layers[best]}"
        )
    effect = inspection.effect
    if effect is None:
        return lines
    strongest = sorted(
        (
            (value, layer, name)
            for name, by_layer in effect.norms.items()
            for layer, value in by_layer.items()
        ),
        reverse=True,
    )
    if strongest:
        lines.append(
            f"{'strongest edits':{width}}  "
            + ", ".join(f"{value:.1%} of h at layer {layer}, {name}" for value, layer, name in strongest[:3])
        )
    if effect.divergence:
        at = [(name, effect.divergence[name]) for name in ("-1", "+1", "+2") if name in effect.divergence]
        lines.append(f"{'KL':{width}}  " + ", ".join(f"{value:.3g} nats at {name}" for name, value in at))
    for title, shifts in (("gained", effect.gained), ("lost", effect.lost)):
        if shifts:
            named = ", ".join(
                f"{visible(shift.text)} {shift.after - shift.before:+.3f}" for shift in shifts[:6]
            )
            lines.append(f"{title:{width}}  {named}")
    return lines


def bars(values: Mapping[str, float], unit: str, top: float | None = None) -> str:
    """A bar for each named value; `top` fixes the scale's end."""
    width, height, left, below = 640 if len(values) > 12 else 420, 170, 46, 34
    highest = top or max(values.values(), default=0) or 1.0
    step = (width - left) / max(1, len(values))
    drawn = [_scale(highest, width, height, left, below)]
    skip = max(1, -(-_LABEL_EVERY // int(max(1, step)))) if step < _LABEL_EVERY * 0.75 else 1
    for number, (name, value) in enumerate(values.items()):
        x = left + number * step
        tall = value / highest * (height - below - 12)
        drawn.append(
            f'<rect class="{"other" if name.startswith("+") else "mark"}" x="{x + step * 0.12:.1f}" y="{height - below - tall:.1f}" '
            f'width="{step * 0.76:.1f}" height="{tall:.1f}"><title>{escape(name)}: {value:.4g}</title></rect>'
        )
        if number % skip == 0:
            drawn.append(
                f'<text x="{x + step / 2:.1f}" y="{height - below + 14}" text-anchor="middle">{escape(name)}</text>'
            )
    drawn.append(f'<text x="{left}" y="{height - 4}">{escape(unit)}</text>')
    return _svg(width, height, drawn, unit)


def line(points: Sequence[tuple[int, float]]) -> str:
    """A curve over steps."""
    width, height, left, below = 640, 220, 46, 34
    last, highest = max(1, points[-1][0]), max(max(loss for _, loss in points), 1e-12)
    drawn = [_scale(highest, width, height, left, below)]
    places = [
        (
            left + step / last * (width - left - 8),
            height - below - max(0.0, loss) / highest * (height - below - 12),
        )
        for step, loss in points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn.append(f'<polyline class="curve" points="{path}"/>')
    drawn += [
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>step {step}: {loss:.4g}</title></circle>'
        for (x, y), (step, loss) in zip(places, points, strict=True)
    ]
    drawn.append(f'<text x="{left}" y="{height - below + 16}">0</text>')
    drawn.append(f'<text x="{width - 8}" y="{height - below + 16}" text-anchor="end">step {last:,}</text>')
    return _svg(width, height, drawn, "training loss")


def heatmap(
    cells: Mapping[tuple[int, int], float],
    rows: Sequence[str],
    columns: Sequence[str],
    highest: float,
    names: tuple[str, str],
) -> str:
    """Shades from none to `highest`; `cells` by (row, column) index; row 0 at the top."""
    left, above = 40, 20
    side = max(7.0, min(32.0, 560 / max(len(rows), len(columns))))
    width, height = left + side * len(columns) + 12, above + side * len(rows) + 20
    drawn = []
    for (i, j), value in cells.items():
        share = max(0.0, min(1.0, value / highest)) if highest else 0.0
        drawn.append(
            f'<rect class="mark" fill-opacity="{0.05 + 0.95 * share:.3f}" x="{left + j * side:.1f}" '
            f'y="{above + i * side:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}"><title>{names[0]} '
            f"{escape(rows[i])}, {names[1]} {escape(columns[j])}: {value:.3g}</title></rect>"
        )
    skip_rows, skip_columns = -(-14 // int(side)), -(-24 // int(side))
    drawn += [
        f'<text x="{left - 6}" y="{above + (i + 0.5) * side + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(rows)
        if i % skip_rows == 0
    ]
    drawn += [
        f'<text x="{left + (j + 0.5) * side:.1f}" y="{above - 6}" text-anchor="middle">{escape(name)}</text>'
        for j, name in enumerate(columns)
        if j % skip_columns == 0
    ]
    drawn.append(
        f'<text x="{left}" y="{height - 5:.1f}">{names[0]} ↓, {names[1]} →; strongest {highest:.3g}</text>'
    )
    return _svg(max(width, 240), height, drawn, f"{names[0]} by {names[1]}")


def _header(inspection: Inspection) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts(inspection).items()
    )
    return f"<h1>{escape(printable(inspection.name))}</h1><section><h2>Adapter</h2><dl>{rows}</dl></section>"


def _section(title: str, explained: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(explained)}</p>{body}</section>"


def _norms(norms: Mapping[str, Mapping[int, float]]) -> str:
    columns = sorted(norms, key=position_order)
    layers = sorted({layer for by_layer in norms.values() for layer in by_layer})
    cells = {
        (layers.index(layer), columns.index(name)): value
        for name, by_layer in norms.items()
        for layer, value in by_layer.items()
    }
    return heatmap(cells, [*map(str, layers)], columns, max(cells.values()), ("layer", "position"))


def _overlaps(overlap: Overlap) -> str:
    labels = [*map(str, overlap.layers)]
    cells = {(i, j): float(overlap.shared[i, j]) for i, j in np.ndindex(overlap.shared.shape)}
    drawn = heatmap(cells, labels, labels, 1.0, ("layer", "layer"))
    angles = np.where(np.eye(len(labels), dtype=bool), np.inf, overlap.smallest)
    a, b = divmod(int(angles.argmin()), len(labels))
    nearest = f"Nearest: layers {labels[a]} and {labels[b]}, smallest angle {angles[a, b]:.0f}°."
    return f"<div><h3>{escape(overlap.name)}</h3>{drawn}<p>{nearest}</p></div>"


def _tokens(title: str, shifts: Sequence[TokenShift]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(visible(shift.text))}</code></td><td>{shift.before:.4f}</td><td>{shift.after:.4f}</td>"
        f"<td>{shift.after - shift.before:+.4f}</td></tr>"
        for shift in shifts
    )
    return (
        f"<div><h3>{title}</h3><table><tr><th>token</th><th>without</th><th>with</th><th>change</th></tr>"
        f"{rows}</table></div>"
    )


def printable(text: str) -> str:
    """Text on one line, its line ends and control characters shown."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def visible(text: str) -> str:
    """The same with its spaces shown."""
    return printable(text).replace(" ", "␣")


def _scale(highest: float, width: float, height: float, left: float, below: float) -> str:
    """The axes, and the scale's end and middle in numbers."""
    floor, ceiling = height - below, 12
    middle = (floor + ceiling) / 2
    lines = "".join(f'<path class="axis" d="M{left} {y:.1f}H{width}"/>' for y in (floor, middle, ceiling))
    numbers = "".join(
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for y, value in ((floor, 0), (middle, highest / 2), (ceiling, highest))
    )
    return lines + numbers


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<div class="scroll"><svg class="{"wide" if width > 600 else "small"}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></div>'
    )


def _plain(value: Any) -> str:
    """A described value, cut where a file says too much."""
    if isinstance(value, dict):
        text = ", ".join(f"{name} {_plain(part)}" for name, part in list(value.items())[:12])
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return printable(text)[:200]


def _ranges(layers: Sequence[int]) -> str:
    """`0-5, 9` for the layers 0 to 5 and 9."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def position_order(name: str) -> tuple[int, int]:
    """A sort key that puts position names in reading order."""
    if name == "…":
        return (1, 0)
    if name == "+…":
        return (4, 0)
    return (3 if name.startswith("+") else 2 if name.startswith("-") else 0, int(name))
