"""An inspection as one HTML page: inline SVG, nothing fetched, dark or light as the reader's system is.

The page is page.html, a jinja2 template. Every text that comes from a file is escaped, and the page's own policy lets it
load or run nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from reft_edge.inspection.charts import Chart, bars, heatmap, line
from reft_edge.inspection.effect import position_order
from reft_edge.inspection.facts import facts, one_line, visible
from reft_edge.inspection.weights import Inspection, Overlap, Strength


def render(inspection: Inspection) -> str:
    """The whole page."""
    return template("page.html").render(
        name=one_line(inspection.name),
        other=one_line(inspection.other),
        facts=facts(inspection),
        effect=inspection.effect,
        **_charts(inspection),
    )


def template(name: str) -> Template:
    """A page to fill in. Every text that comes to it is escaped."""
    pages = Environment(
        loader=PackageLoader("reft_edge.inspection", ""), autoescape=True, undefined=StrictUndefined
    )
    pages.filters["visible"] = visible
    return pages.get_template(name)


def _charts(inspection: Inspection) -> dict[str, Any]:
    """What the page draws, by the names that its template has for it; None for what there is nothing of."""
    effect, layers = inspection.effect, [*map(str, inspection.config.layers)]
    return {
        "norms": _norms(effect.norms) if effect is not None and effect.norms else None,
        "divergence": bars(effect.divergence, "nats") if effect is not None and effect.divergence else None,
        "curve": line(inspection.curve, "training loss") if inspection.curve else None,
        "strengths": [_strength(strength, layers) for strength in inspection.strengths],
        "between": _between(inspection.between) if inspection.between is not None else None,
        "overlaps": [_overlap(overlap) for overlap in inspection.overlaps] if len(layers) > 1 else [],
    }


def _norms(norms: Mapping[str, Mapping[int, float]]) -> Chart:
    columns = sorted(norms, key=position_order)
    layers = sorted({layer for by_layer in norms.values() for layer in by_layer})
    cells = {
        (layers.index(layer), columns.index(name)): value
        for name, by_layer in norms.items()
        for layer, value in by_layer.items()
    }
    return heatmap(cells, [*map(str, layers)], columns, max(cells.values()), ("layer", "position"))


def _strength(strength: Strength, layers: list[str]) -> tuple[str, Chart, Chart]:
    gains = dict(zip(layers, strength.gains.tolist(), strict=True))
    constants = dict(zip(layers, strength.constants.tolist(), strict=True))
    return (
        strength.name,
        bars(gains, "largest gain, by layer"),
        bars(constants, "constant part, by layer"),
    )


def _between(overlap: Overlap) -> tuple[Chart, Chart]:
    layers = [*map(str, overlap.layers)]
    shared = dict(zip(layers, overlap.shared.tolist(), strict=True))
    smallest = dict(zip(layers, overlap.smallest.tolist(), strict=True))
    return bars(shared, "squared cosine, by layer", 1.0), bars(smallest, "smallest angle, degrees", 90.0)


def _overlap(overlap: Overlap) -> tuple[str, Chart, str]:
    labels = [*map(str, overlap.layers)]
    cells = {(i, j): float(overlap.shared[i, j]) for i, j in np.ndindex(overlap.shared.shape)}
    angles = np.where(np.eye(len(labels), dtype=bool), np.inf, overlap.smallest)
    a, b = divmod(int(angles.argmin()), len(labels))
    nearest = f"Nearest: layers {labels[a]} and {labels[b]}, smallest angle {angles[a, b]:.0f}°."
    return overlap.name, heatmap(cells, labels, labels, 1.0, ("layer", "layer")), nearest
