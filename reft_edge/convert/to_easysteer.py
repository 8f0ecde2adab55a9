"""To a JSON file with a `SteeringSpec` of EasySteer, as its `api.py` and `payloads.py` read it, weights included.

Facts about the format, from EasySteer's vllm/steer_vectors (2026-08): an entry of `vectors` edits the outputs of whole blocks at
the tokens that its `apply` selects. `data` holds float32 tensors in base64 and a digest that tells weights apart. `loreft` adds
(hWᵀ + b − hR)Rᵀ with any R [d, r], so that it says every affine edit h + (hA + b)B: with R = cBᵀ, W = (A/c + R)ᵀ and b/c. `direct`
adds a vector; `linear` gives hWᵀ + b. Where entries meet at a token, the first of them acts (`priority`).
"""

import hashlib
import json
from base64 import b64encode
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from reft_edge.adapter.algebra import Array, LayerEdit
from reft_edge.adapter.config import Adapter
from reft_edge.adapter.linear import canonical, fold
from reft_edge.adapter.positions import UNLIMITED, Span, group_names, meet, triggers_of
from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically

_VERSION = 1
_SHRINK = 2.0**-6
"""c: what is added to hA only to be subtracted again must be small beside it, where vLLM computes in bfloat16."""
_MAX_BYTES = 1 << 28
_MAX_POSITIONS = 4096
"""Tokens at a prompt's end that are listed one by one."""


def to_easysteer(adapter: Adapter, output: Path) -> list[str]:
    """Write the file; returns what its user must know, such as the arguments that EasySteer's engine needs.

    Raises ReftEdgeError for what EasySteer cannot do: a classification head, edits of attention or MLP outputs, activations,
    triggers, position groups that overlap, and matrices beyond 256 MB, which an elementwise product takes.
    """
    vectors = steering_vectors(adapter)
    text = json.dumps({"vectors": vectors, "conflict": "priority"}, separators=(",", ":"), allow_nan=False)
    write_atomically(output, text.encode())
    return _notes(adapter, vectors, output)


def steering_vectors(adapter: Adapter) -> list[dict[str, Any]]:
    """The `vectors` of a SteeringSpec: what is constant as one a position group, the rest as one a place and group.

    Raises ReftEdgeError as `to_easysteer` does.
    """
    _check(adapter)
    config, edit = adapter.config, fold(adapter)
    names = group_names(config.positions, config.tied)
    vectors = []
    for group, span in enumerate(config.spans):
        apply, constants = _apply(config.positions, canonical(span)), {}
        for index, place in enumerate(config.places):
            part = _of_group(edit.places[place], group)
            entry = {"scale": 1.0, "apply": apply, "name": f"layer {place} at {names[group]}"}
            if part.s.any():
                entry |= {
                    "algorithm": "linear",
                    "layers": [place.layer],
                    "data": _payload("linear", _matrix(part)),
                }
            elif config.intervention == "loreft":
                own = {name: adapter.tensors[name][index, group] for name in ("R", "W", "b")}
                entry |= _loreft(place.layer, own["R"].T, own["W"], own["b"])
            elif part.A.any():
                down, up = part.A.T / _SHRINK, part.B * _SHRINK
                entry |= _loreft(place.layer, up.T, down + up, part.b / _SHRINK)
            else:
                constants[f"layer.{place.layer}"] = part.b @ part.B
                continue
            vectors.append(entry)
        if any(vector.any() for vector in constants.values()):
            data = _payload("direction", constants)
            vectors.append(
                {
                    "scale": 1.0,
                    "apply": apply,
                    "name": f"at {names[group]}",
                    "algorithm": "direct",
                    "data": data,
                }
            )
    if not vectors:
        raise ReftEdgeError("the adapter changes nothing; EasySteer takes no empty list of vectors")
    return vectors


def _check(adapter: Adapter) -> None:
    config = adapter.config
    if config.labels:
        raise ReftEdgeError("EasySteer has no classification heads; only adapters without one can be carried")
    if config.component != "block":
        raise ReftEdgeError(
            f"the adapter edits the {config.component} of layers; EasySteer edits the outputs of whole blocks"
        )
    if config.act_fn != "linear":
        raise ReftEdgeError(
            f"EasySteer has no activations; the adapter's act_fn is {config.act_fn}, and only linear can be carried"
        )
    if triggers_of(config.spans):
        raise ReftEdgeError(
            f"positions {config.positions}: EasySteer has no triggers; it can edit tokens of one kind, but not all that follow them"
        )
    if any(meet(one, other) for one, other in combinations(config.spans, 2)):
        raise ReftEdgeError(
            f"positions {config.positions} overlap: where edits meet, EasySteer applies the first of them alone"
        )
    size = config.hidden_size**2 * 4 * len(config.layers) * len(config.spans)
    if config.intervention == "red" and size > _MAX_BYTES:
        raise ReftEdgeError(
            f"EasySteer has no elementwise product: red is written as one [{config.hidden_size}, {config.hidden_size}] matrix a "
            f"layer and position group, here {size:,} bytes; at most {_MAX_BYTES:,} are written"
        )


def _of_group(part: LayerEdit, group: int) -> LayerEdit:
    taken = part.take(part.gates == group)
    rows = part.s_gates == group
    return LayerEdit(taken.A, taken.b, taken.B, taken.gates, taken.acts, part.s[rows], part.s_gates[rows])


def _matrix(part: LayerEdit) -> dict[str, Array]:
    """hWᵀ + b for h + s ⊙ h + (hA + b)B."""
    weight = np.diag(1 + part.s.sum(axis=0)) + (part.A @ part.B).T
    return {"weight": weight, "bias": part.b @ part.B}


def _loreft(layer: int, rotation: Array, weight: Array, bias: Array) -> dict[str, Any]:
    tensors = {
        "rotate_layer": rotation,
        "learned_source_weight": weight,
        "learned_source_bias": bias,
    }
    return {"algorithm": "loreft", "data": _payload("reft", tensors, layer=layer)}


def _payload(kind: str, tensors: dict[str, Array], **extra: int) -> dict[str, Any]:
    """The wire form of `payloads.py`, with its digest."""
    digest = hashlib.sha256(f"{kind}:{_VERSION}".encode())
    stored = {}
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], "<f4")
        digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
        stored[name] = {"shape": list(array.shape), "data": b64encode(array.tobytes()).decode()}
    for name, value in sorted(extra.items()):
        digest.update(f"{name}={value!r}".encode())
    return {
        "version": _VERSION,
        "kind": kind,
        "tensors": stored,
        "extra": extra,
        "sha256": digest.hexdigest(),
    }


def _apply(positions: str, span: Span) -> dict[str, Any]:
    """The ApplySpec of a gate."""
    return {
        **(_prompt(positions, "", span.first, span.last) if span.last != UNLIMITED else {"prompt": "all"}),
        **_prompt(positions, "exclude_", span.skip_first, span.skip_last),
        **_generated(span.after),
    }


def _prompt(positions: str, prefix: str, first: int, last: int) -> dict[str, Any]:
    """The first and last tokens; there is one window a spec, so beside the first ones the last ones are listed."""
    selected: dict[str, Any] = {}
    if first:
        selected[f"{prefix}prompt_window"] = [0, first]
    if last and not first:
        selected[f"{prefix}prompt_window"] = [-last, None]
    if last and first:
        if last > _MAX_POSITIONS:
            raise ReftEdgeError(
                f"positions {positions}: beside a prompt's first tokens, EasySteer takes the last ones one by one, and at most "
                f"{_MAX_POSITIONS:,} are written"
            )
        selected[f"{prefix}prompt_positions"] = list(range(-last, 0))
    return selected


def _generated(after: int) -> dict[str, Any]:
    if after == UNLIMITED:
        return {"generation": "all"}
    return {"generation_window": [0, after]} if after else {}


def _notes(adapter: Adapter, vectors: list[dict[str, Any]], output: Path) -> list[str]:
    config = adapter.config
    algorithms = sorted({vector["algorithm"] for vector in vectors})
    several = ", steer_multi_vector=True" if len(vectors) > 1 else ""
    notes = [
        f"give EasySteer's engine enable_steer_vector=True, steer_algorithms={json.dumps(algorithms)}{several}, and each request "
        f'steering=SteeringSpec.model_validate_json(open("{output.name}").read()); its server takes the file as "steering"',
        f"prompts are written {'as they stand' if config.prompt_format == 'raw' else 'through the chat template'}",
    ]
    counts = [
        count for span in config.spans for count in (span.first, span.last) if count not in (0, UNLIMITED)
    ]
    if counts:
        notes.append(
            f"of a prompt with fewer than {2 * max(counts):,} tokens EasySteer edits the whole counts of {config.positions}; here "
            "at most half the prompt counts for each part"
        )
    if algorithms != ["direct"] and config.intervention not in ("loreft", "red"):
        notes.append(f"{config.intervention} is written as loreft, the same edit")
    if "linear" in algorithms:
        notes.append("red is written as linear, the same edit; its scale must stay 1")
    return notes
