"""Settings by the kind of task, as options of `reft-edge train`.

`commonsense`, `math` and `glue` are post-block edits, which were ahead of LoReFT over three seeds on small models
(docs/paper.md). All others are the LoReFT paper's settings, from pyreft's `examples/loreft` (its README and scripts), which
trains LLaMA-7B (`loreft-commonsense`, `loreft-math`), Llama-2-7B (`instruct`) and RoBERTa-base (`loreft-glue`, whose learning
rate, epochs and dropout the paper chose anew for every task: these are the middle of their ranges).
"""

from typing import Any

from reft_edge.errors import ReftEdgeError

_POST_BLOCK = {
    "intervention": "nodireft",
    "layers": "all",
    "rank": 4,
    "positions": "all+gen",
    "tied": True,
    "lr": 2e-3,
    "batch_size": 16,
    "warmup": 0.1,
    "schedule": "linear",
    "weight_decay": 0.0,
    "dropout": 0.0,
    "start": "unchanged",
}
_REASONING = {
    "intervention": "loreft",
    "layers": "all",
    "rank": 8,
    "positions": "f7+l7",
    "tied": True,
    "lr": 9e-4,
    "batch_size": 16,
    "accumulate": 2,
    "warmup": 0.1,
    "schedule": "linear",
    "weight_decay": 0.0,
    "dropout": 0.0,
    "start": "random",
}
RECIPES: dict[str, dict[str, Any]] = {
    "commonsense": _POST_BLOCK,
    "math": _POST_BLOCK,
    "instruct": {
        **_REASONING,
        "layers": "3;9;18;24",
        "rank": 4,
        "positions": "f5+l5",
        "tied": False,
        "batch_size": 4,
        "accumulate": 32,
        "epochs": 9.0,
        "warmup": 0.0,
        "max_length": 768,
    },
    "glue": {
        **_POST_BLOCK,
        "task": "classification",
        "positions": "all",
        "act_fn": "silu",
        "lr": 6e-3,
        "start": "random",
    },
    "loreft-commonsense": {**_REASONING, "epochs": 6.0},
    "loreft-math": {**_REASONING, "epochs": 12.0},
    "loreft-glue": {
        **_REASONING,
        "task": "classification",
        "rank": 1,
        "positions": "f1",
        "lr": 6e-4,
        "batch_size": 32,
        "accumulate": 1,
        "epochs": 40.0,
        "warmup": 0.06,
        "dropout": 0.05,
        "max_length": 256,
    },
}


def recipe(name: str) -> dict[str, Any]:
    """Options of `train` and their values. Raises ReftEdgeError for an unknown name."""
    if name not in RECIPES:
        raise ReftEdgeError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
