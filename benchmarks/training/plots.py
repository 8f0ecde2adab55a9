"""Accuracy over parameters and loss over steps, as SVG, from what table.py wrote: python plots.py RESULTS

pyreft's marks are moved a little to the right, where they would cover reft-edge's.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

COLOURS = {"loreft": "#2563c9", "pyreft": "#0f9d8a", "lora": "#c2410c"}
MARKS = {"loreft": "o", "pyreft": "s", "pyreft-reflections": "D", "lora": "^"}
LABELS = {
    "loreft": "LoReFT, reft-edge",
    "lora": "LoRA, PEFT",
    "pyreft": "LoReFT, pyreft",
    "pyreft-reflections": "pyreft, completed by reflections",
}
LEFT_OUT = ("pyreft-fp32",)
"""Of the plot of accuracy: it lies on pyreft's mark."""
STRETCH = 5
"""Steps that a point of a loss curve is the mean of."""


def family(method: str) -> str:
    return method.split("-")[0]


def panels(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_task: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_task.setdefault(cell["task"], []).append(cell)
    return by_task


def figure(count: int) -> tuple[Any, Any]:
    fig, axes = plt.subplots(1, count, figsize=(3.3 * count + 0.4, 3.6), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e5e9", linewidth=0.8)
    return fig, axes[0]


def accuracy(by_task: dict[str, list[dict[str, Any]]], path: Path) -> None:
    fig, axes = figure(len(by_task))
    for axis, (task, cells) in zip(axes, by_task.items(), strict=True):
        for cell in cells:
            if cell["method"] in LEFT_OUT:
                continue
            if "parameters" not in cell:
                axis.axhline(cell["accuracy"], color="#5b6472", linestyle=":", label=cell["title"])
                continue
            kind = family(cell["method"])
            error = [[cell["accuracy"] - cell["low"]], [cell["high"] - cell["accuracy"]]]
            axis.errorbar(
                cell["parameters"] * (1.12 if kind == "pyreft" else 1),
                cell["accuracy"],
                error,
                fmt=MARKS.get(cell["method"], MARKS[kind]),
                color=COLOURS[kind],
                capsize=3,
                label=LABELS.get(cell["method"]),
            )
        axis.set(title=task, xscale="log", xlabel="trained parameters")
        axis.set_xlim(1e4, 1e7)
    axes[0].set_ylabel("accuracy on test rows, 95 % interval")
    finish(fig, axes, path)


def losses(by_task: dict[str, list[dict[str, Any]]], path: Path) -> None:
    fig, axes = figure(len(by_task))
    for axis, (task, cells) in zip(axes, by_task.items(), strict=True):
        for cell in cells:
            if cell["method"] in COLOURS:
                curve = cell["losses"]
                starts = range(0, len(curve), STRETCH)
                means = [sum(curve[i : i + STRETCH]) / len(curve[i : i + STRETCH]) for i in starts]
                style = (0, (3, 2)) if cell["method"] == "pyreft" else "solid"
                axis.plot(
                    [i + STRETCH / 2 for i in starts],
                    means,
                    color=COLOURS[cell["method"]],
                    linestyle=style,
                    label=LABELS[cell["method"]],
                )
        axis.set(title=task, xlabel="step", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel(f"training loss, nats a token, mean of {STRETCH} steps")
    finish(fig, axes, path)


def finish(fig: Any, axes: Any, path: Path) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(4, 2 * len(axes) - 1), frameon=False)
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    results = Path(sys.argv[1])
    plt.rcParams.update({"svg.hashsalt": "reft-edge", "svg.fonttype": "none", "font.size": 9})
    by_task = panels(json.loads((results / "summary.json").read_text(encoding="utf-8"))["cells"])
    accuracy(by_task, results / "accuracy.svg")
    losses(by_task, results / "loss.svg")


if __name__ == "__main__":
    main()
