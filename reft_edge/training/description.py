"""What an adapter file and a checkpoint say of their training: what was given, how its losses went, with which versions."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from reft_edge.adapter.config import AdapterConfig
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.places import parse_layers
from reft_edge.training.objectives import Data
from reft_edge.training.settings import TrainSettings
from reft_edge.training.steps import HeldOut
from reft_edge.training.trainer import Trainer

CURVE_POINTS = 64
"""Most points of the loss curve that an adapter file keeps."""


def adapter_config(
    model: Any, base_name: str, settings: TrainSettings, labels: tuple[str, ...] = ()
) -> AdapterConfig:
    """The description of an adapter for this model. Raises ReftEdgeError for layers or a rank it cannot have."""
    num_layers = len(decoder_layers(model))
    return AdapterConfig(
        intervention=settings.intervention,
        base_name=base_name,
        base_fingerprint=fingerprint(model),
        hidden_size=model.config.hidden_size,
        num_layers=num_layers,
        layers=parse_layers(settings.layers, num_layers),
        rank=settings.rank,
        positions=settings.positions,
        tied=settings.tied,
        act_fn=settings.act_fn,
        add_bias=settings.add_bias,
        prompt_format=settings.prompt_format,
        labels=labels,
        pooling=settings.pooling,
        component=settings.component,
    )


def provenance(
    settings: TrainSettings, data: Data, trainer: Trainer, found: HeldOut, weights: dict[str, Any]
) -> dict[str, Any]:
    described = (
        "intervention",
        "layers",
        "rank",
        "positions",
        "tied",
        "act_fn",
        "add_bias",
        "prompt_format",
        "pooling",
    )
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in described}
    return {
        **kept,
        "dtype": "bf16" if trainer.autocast else "fp32",
        "steps": trainer.steps,
        "rows": len(data.examples),
        "data_sha256": data.digest,
        "loss": round(last_tenth(trainer.losses), 6),
        "evaluation_loss": None if found.loss is None else round(found.loss, 6),
        "curve": curve(trainer.losses),
        "versions": {package: version(package) for package in ("reft-edge", "torch", "transformers")},
        **({} if found.accuracy is None else {"evaluation_accuracy": round(found.accuracy, 6)}),
        **({"evaluation_curve": held_out} if (held_out := held_out_curve(trainer.held_out)) else {}),
        **({"base_weights": weights} if weights else {}),
    }


def last_tenth(losses: Sequence[float]) -> float:
    """The mean loss of the last tenth of the steps."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def belongs_to(
    settings: TrainSettings, data: Data, config: AdapterConfig, weights: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says of its training, so that no other one goes on from it."""
    rows = hashlib.sha256()
    for row in data.examples:  # as they are trained on: tokenised, cut or left out
        rows.update(repr(row).encode())
    return {
        "settings": dataclasses.asdict(settings),
        "data": data.digest,
        "base": config.base_fingerprint,
        "rows": rows.hexdigest(),
        "weights": weights,
    }


def curve(losses: Sequence[float], points: int = CURVE_POINTS) -> list[list[float]]:
    """A loss curve of at most `points` pairs: the last step of each stretch of steps, and its mean loss."""
    stretches = np.array_split(np.asarray(losses), min(points, len(losses)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return [[int(end), float(f"{stretch.mean():.5g}")] for end, stretch in zip(ends, stretches, strict=True)]


def held_out_curve(losses: Sequence[float], points: int = CURVE_POINTS) -> list[list[float | None]]:
    """Steps after which held-out rows were evaluated and their loss, None where it is not finite; the last `points`.

    `losses` are by step: NaN where they were not evaluated, infinite where the loss is not finite.
    """
    measured = [(step, loss) for step, loss in enumerate(losses, start=1) if not math.isnan(loss)]
    return [
        [step, float(f"{loss:.5g}") if math.isfinite(loss) else None] for step, loss in measured[-points:]
    ]
