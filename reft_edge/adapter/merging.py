"""Merging adapters into one file: exact concatenation of their ranks, or compressed to fewer, and subspaces.

The merged adapter's edit is the sum of the sources' edits, each times its scale and all computed from the same hidden
state: what running them at once does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Edit, LayerEdit, concat, scale
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import HEAD, Adapter
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.adapter.linear import fold, grouped, unfold
from reft_edge.adapter.positions import group_names
from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.files import name_to_store
from reft_edge.model.places import Place
from reft_edge.model.prompts import choose_format

_SOURCE = re.compile(r"(?P<path>.+?)(?:\[(?P<columns>[\d:,\s]*)\])?(?::(?P<scale>[^:/\\\[\]]+))?", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One adapter of a merge."""

    path: Path
    scale: float = 1.0
    columns: str | None = None
    """Which of the rank's columns to take, as `0:2` or `0,3`; None takes all. pyreft calls such a choice a
    subspace.
    """


@dataclass(frozen=True)
class Loss:
    """What compression cost at one place and position group."""

    place: Place
    group: int
    rank: int
    """Columns before."""
    error: float
    """Frobenius norm of the difference of the affine maps (A, b) B over the norm of the exact one; 0 is exact."""


@dataclass(frozen=True)
class Merged:
    """A merged adapter and what it lost."""

    adapter: Adapter
    losses: tuple[Loss, ...] = ()
    error: float = 0.0
    """The relative error over all places and groups together."""


def parse_source(text: str) -> Source:
    """`a.safetensors[0:2]:0.7` as path, columns and scale. Raises ReftEdgeError for a scale that is no number."""
    if Path(text).is_file():
        return Source(Path(text))
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise ReftEdgeError(f"cannot read {text!r}; write FILE, FILE:0.7, FILE[0:2] or FILE[0:2]:0.7")
    try:
        factor = float(match["scale"] or 1)
    except ValueError as error:
        raise ReftEdgeError(
            f"cannot read the scale {match['scale']!r} of {text}; write FILE:0.7 or FILE[0:2]:0.7"
        ) from error
    if not np.isfinite(factor):
        raise ReftEdgeError(f"the scale of {text} is not a finite number")
    return Source(Path(match["path"]), factor, match["columns"])


def parse_columns(text: str, rank: int) -> tuple[int, ...]:
    """`0:2,3` as columns of a rank axis, in ascending order; either end of a range may be left out.

    Raises ReftEdgeError for text that is not such a list, an empty choice and a column that is not there.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{0,6})\s*(?:(:)\s*(\d{0,6}))?\s*", part)
        if match is None or not (match[1] or match[2]):
            raise ReftEdgeError(f"columns [{text}]: cannot read {part.strip()!r}; write [0:2], [2:] or [0,3]")
        start = int(match[1] or 0)
        stop = (int(match[3]) if match[3] else rank) if match[2] else start + 1
        if start >= stop or stop > rank:
            raise ReftEdgeError(
                f"columns [{text}]: {part.strip()!r} is not within 0 to {rank - 1}; the adapter's rank is {rank}"
            )
        chosen.update(range(start, stop))
    return tuple(sorted(chosen))


def select(adapter: Adapter, columns: Sequence[int]) -> Adapter:
    """The adapter with only these columns of every rank axis: pyreft's subspaces, of the same intervention."""
    tensors = {
        name: tensor if name in HEAD else np.ascontiguousarray(tensor[:, :, list(columns)])
        for name, tensor in adapter.tensors.items()
    }
    return Adapter(replace(adapter.config, rank=len(columns)), tensors)


def compress(edit: Edit, rank: int) -> tuple[Edit, tuple[Loss, ...], float]:
    """The nearest edit of at most `rank` columns a place and span, by the Frobenius norm of the map [h, 1] → Δh.

    That is the root mean square error of the edit for hidden states of independent entries of variance 1. Each map
    [A; b] B is cut to its largest singular values (Eckart and Young 1936), found from the thin QR factors of both
    sides. Gives the edit, each place and group's loss, and the relative error over all. Raises ReftEdgeError for an edit
    whose numbers are too large for that.
    """
    if rank < 1:
        raise ReftEdgeError(f"rank {rank} holds nothing; give at least 1")
    if edit.has_diagonal or set(edit.acts) - {"linear"}:
        raise ReftEdgeError(
            "only linear edits can be compressed, and these have an act_fn or multiply hidden states elementwise; "
            "merge without --rank"
        )
    edit = grouped(edit)
    losses: list[Loss] = []
    lost = whole = 0.0
    places: dict[Place, LayerEdit] = {}
    for place, part in edit.places.items():
        pieces: list[LayerEdit] = []
        for group in np.unique(part.gates):
            columns = np.flatnonzero(part.gates == group)
            left = np.concatenate([part.A[:, columns], part.b[None, columns]]).astype(np.float64)
            q_left, r_left = np.linalg.qr(left)
            q_right, r_right = np.linalg.qr(part.B[columns].T.astype(np.float64))
            u, values, v = _svd(r_left @ r_right.T, place)
            kept = min(rank, len(values))
            root = np.sqrt(values[:kept])
            cut, total = float((values[rank:] ** 2).sum()), float((values**2).sum())
            lost, whole = lost + cut, whole + total
            losses.append(
                Loss(place, int(group), len(columns), float(np.sqrt(cut / total)) if total else 0.0)
            )
            if len(columns) <= rank:
                pieces.append(part.take(columns))
                continue
            with np.errstate(over="ignore"):
                left = (q_left @ u[:, :kept] * root).astype(np.float32)
                back = (root[:, None] * v[:kept] @ q_right.T).astype(np.float32)
            if not (np.isfinite(left).all() and np.isfinite(back).all()):
                raise ReftEdgeError(f"compressed, the edit of layer {place} is not finite in float32")
            pieces.append(LayerEdit(left[:-1], left[-1], back, np.full(kept, group, np.int64)))
        places[place] = LayerEdit(
            np.concatenate([piece.A for piece in pieces], axis=1),
            np.concatenate([piece.b for piece in pieces]),
            np.concatenate([piece.B for piece in pieces]),
            np.concatenate([piece.gates for piece in pieces]),
        )
    return replace(edit, places=places), tuple(losses), float(np.sqrt(lost / whole)) if whole else 0.0


def merge(sources: Sequence[Source], rank: int | None = None, raw: bool | None = None) -> Merged:
    """One adapter that does what the sources do at once; `raw` settles different prompt formats.

    One source alone, unscaled and not compressed, keeps its intervention; else the result is NoDiReFT, or RED where all
    sources are RED or vectors. Raises AdapterFileError, BaseMismatchError for different bases, and ReftEdgeError for what one
    file cannot hold: two classification heads, different components or activations, RED beside matrices.
    """
    if not sources:
        raise ReftEdgeError("there is nothing to merge; give at least one adapter file")
    adapters = []
    for source in sources:
        adapter = load_adapter(source.path)
        if source.columns is not None:
            adapter = select(adapter, parse_columns(source.columns, adapter.config.rank))
        adapters.append(adapter)
    first = adapters[0].config
    for source, adapter in zip(sources, adapters, strict=True):
        if Base.of(adapter.config) != replace(Base.of(first), name=adapter.config.base_name):
            raise BaseMismatchError(
                f"{source.path} was trained on {adapter.config.base_name} with fingerprint "
                f"{adapter.config.base_fingerprint}, {sources[0].path} on {first.base_name} with {first.base_fingerprint}; "
                "only adapters of one base model merge"
            )
    formats = [adapter.config.prompt_format for adapter in adapters]
    prompt_format = choose_format(raw, formats, has_template=True)
    training: dict[str, Any] = {
        "merged": [
            {
                "name": name_to_store(source.path),
                "intervention": adapter.config.intervention,
                "scale": source.scale,
                "columns": source.columns,
            }
            for source, adapter in zip(sources, adapters, strict=True)
        ]
    }
    if len(sources) == 1 and sources[0].scale == 1 and rank is None:
        config = replace(first, prompt_format=prompt_format, training={**first.training, **training})
        return Merged(Adapter(config, adapters[0].tensors))
    edit = concat(
        [
            scale(_fold(source, adapter), source.scale)
            for source, adapter in zip(sources, adapters, strict=True)
        ]
    )
    losses: tuple[Loss, ...] = ()
    error = 0.0
    if rank is not None:
        edit, losses, error = compress(edit, rank)
        training |= {"rank": rank, "relative_error": error}
    return Merged(
        _with_head(unfold(edit, Base.of(first), prompt_format, training), sources, adapters), losses, error
    )


def _svd(product: NDArray[np.float64], place: Place) -> Any:
    try:
        return np.linalg.svd(product)
    except np.linalg.LinAlgError as error:
        raise ReftEdgeError(
            f"the edit of layer {place} cannot be compressed: {error}; merge without --rank"
        ) from error


def save_merged(merged: Merged, output: Path) -> int:
    """Write the merged adapter; returns the file's size in bytes."""
    save_adapter(merged.adapter, output)
    return output.stat().st_size


def describe_loss(merged: Merged) -> str:
    """The largest loss of a place and position group, in words."""
    worst = max(merged.losses, key=lambda loss: loss.error)
    config = merged.adapter.config
    group = group_names(config.positions, config.tied)[worst.group]
    return f"{worst.error:.2g} at layer {worst.place}, {group}"


def _fold(source: Source, adapter: Adapter) -> Edit:
    try:
        return fold(adapter)
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{source.path} cannot be merged: {error}") from error


def _with_head(adapter: Adapter, sources: Sequence[Source], parts: Sequence[Adapter]) -> Adapter:
    """With the classification head of the one source that has one."""
    heads = [part for part in parts if part.config.labels]
    if not heads:
        return adapter
    if len(heads) > 1:
        named = [str(source.path) for source, part in zip(sources, parts, strict=True) if part.config.labels]
        raise ReftEdgeError(
            f"{' and '.join(named)} have a classification head each; an adapter file holds one"
        )
    head = heads[0]
    config = replace(adapter.config, labels=head.config.labels, pooling=head.config.pooling)
    return Adapter(config, adapter.tensors | {name: head.tensors[name] for name in HEAD})
