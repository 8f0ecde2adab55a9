"""How a graph's kernels round: a few tokens, run in two ways, tell whether both have the same numbers."""

from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import ReftEdgeError

if TYPE_CHECKING:
    from reft_edge.runtime.session import GraphSession

_STEPS_AGREE = 0.1
"""Of the largest logit; arithmetic in bfloat16 stays below a tenth of this."""
RUNS = (2, 4, 8, 16)
"""Tokens of a run with guesses, so few kinds that what each takes is soon measured."""
_PROMPT = 16
_LEAST_VOCABULARY = 64


def rows_alike(graph: "GraphSession") -> bool:
    """Whether a row that is decoded alone has, bit for bit, the numbers that it has beside another.

    Some processors have kernels for one row of a quantised matrix that round in another way than those for several:
    one step of this very graph tells.
    """
    if graph.context_length < 8:
        return False
    found = []
    for rows in (1, 2):
        bound = graph.bind(graph.take_cache(rows, 8), {})
        bound.step(np.tile(np.array([[0, 1, 0, 1, 1]]), (rows, 1)))
        found.append([bound.step(np.full((rows, 1), token))[0].tobytes() for token in (0, 1)])
    return found[0] == found[1]


def steps_alike(graph: "GraphSession") -> bool:
    """Whether tokens that run together behind a cached prompt have, bit for bit, the numbers that they have one by one.

    Attention to float caches has another kernel for one token, attention to caches in 8 bits has not.
    """
    longest = RUNS[-1]
    if graph.context_length < _PROMPT + longest or not graph.steps_back:
        return False
    ids = np.random.default_rng(0).integers(0, _LEAST_VOCABULARY, (1, _PROMPT + longest))
    bound = graph.bind(graph.take_cache(1, ids.shape[1]), {})
    bound.step(ids[:, :_PROMPT])
    together = bound.step_all(ids[:, _PROMPT:], _PROMPT)[0].copy()
    for count in RUNS[:-1]:
        shorter = bound.step_all(ids[:, _PROMPT : _PROMPT + count], _PROMPT)[0]
        if shorter.tobytes() != together[:count].tobytes():
            return False
    rows = 1 if graph.rounds_rows_alike else 2  # as a batch runs a row that is alone
    bound = graph.bind(graph.take_cache(rows, ids.shape[1]), {})
    bound.step(np.tile(ids[:, :_PROMPT], (rows, 1)))
    alone = [bound.step(np.full((rows, 1), token))[0].tobytes() for token in ids[0, _PROMPT : _PROMPT + 3]]
    return bool(together[:3].tobytes() == b"".join(alone))


def check_steps(graph: "GraphSession") -> None:
    """Raise ReftEdgeError if tokens get other logits after a cached prompt than together with it.

    That tells a provider that does not carry the KV cache on as ONNX Runtime's own do.
    """
    if not graph.cache_shapes or graph.context_length < 8:
        return
    ids = np.array([[0, 1, 0, 1, 1]])
    at_once = graph.bind(graph.take_cache(1, 8), {}).step(ids)
    bound = graph.bind(graph.take_cache(1, 8), {})
    bound.step(ids[:, :3])
    in_steps = [bound.step(ids[:, at : at + 1]) for at in (3, 4)][-1]
    error, most = float(np.abs(at_once - in_steps).max()), float(np.abs(at_once).max())
    if not error <= _STEPS_AGREE * most:
        raise ReftEdgeError(
            f"{graph.device} gives wrong answers with this model: five tokens get other logits at once than one by one "
            f"({error:.2g} apart, the largest is {most:.2g}); use --device cpu"
        )
