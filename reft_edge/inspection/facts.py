"""What an inspection says in words: the file's description, and a summary for a terminal. Values may hold any text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reft_edge.inspection.weights import Effect, Inspection


def facts(inspection: Inspection) -> dict[str, str]:
    """The file's description, for people, by what is described."""
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


def summary(inspection: Inspection) -> dict[str, str]:
    """The facts, and in short what was found; no text from the file holds control characters."""
    described = facts(inspection)
    if inspection.curve:
        (_, first), (step, last) = inspection.curve[0], inspection.curve[-1]
        described["curve"] = f"loss {first:.4g} to {last:.4g} in {step:,} steps"
    shares = [
        f"{overlap.shared[~np.eye(len(overlap.layers), dtype=bool)].mean():.1%} of their subspaces at {overlap.name}"
        for overlap in inspection.overlaps
        if len(inspection.config.layers) > 1
    ]
    if shares:
        described["layers share"] = "; ".join(shares)
    if inspection.between is not None:
        between = inspection.between
        best = int(between.shared.argmax())
        described["with the other"] = (
            f"{between.shared.mean():.1%} of subspaces shared, at most {between.shared[best]:.1%}, "
            f"at layer {between.layers[best]}"
        )
    return described if inspection.effect is None else {**described, **_effect(inspection.effect)}


def _effect(effect: Effect) -> dict[str, str]:
    found = {}
    norms = [
        (value, layer, name) for name, by_layer in effect.norms.items() for layer, value in by_layer.items()
    ]
    if norms:
        found["strongest edits"] = ", ".join(
            f"{value:.1%} of h at layer {layer}, {name}"
            for value, layer, name in sorted(norms, reverse=True)[:3]
        )
    if effect.divergence:
        at = [(name, effect.divergence[name]) for name in ("-1", "+1", "+2") if name in effect.divergence]
        found["KL"] = ", ".join(f"{value:.3g} nats at {name}" for name, value in at)
    for title, shifts in (("gained", effect.gained), ("lost", effect.lost)):
        if shifts:
            found[title] = ", ".join(
                f"{visible(shift.text)} {shift.after - shift.before:+.3f}" for shift in shifts[:6]
            )
    return found


def one_line(text: str) -> str:
    """Text on one line, its line ends and control characters shown."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def visible(text: str) -> str:
    """The same with its spaces shown."""
    return one_line(text).replace(" ", "␣")


def _plain(value: Any) -> str:
    """A described value, cut where a file says too much."""
    if isinstance(value, dict):
        text = ", ".join(f"{name} {_plain(part)}" for name, part in list(value.items())[:12])
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return one_line(text)[:200]


def _ranges(layers: Sequence[int]) -> str:
    """`0-5, 9` for the layers 0 to 5 and 9."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
