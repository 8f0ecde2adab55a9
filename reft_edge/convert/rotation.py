"""Rotations as torch's parametrisations store them, and edits whose rotation is none."""

from collections.abc import Callable

import numpy as np
import torch

from reft_edge.adapter.algebra import Array

ORTHONORMAL = 1e-4
"""How far R Rᵀ may be from the identity."""


def off_orthonormal(rotations: Array) -> float:
    """The largest entry of R Rᵀ − 1 over all R `[..., r, d]`."""
    wide = rotations.astype(np.float64)
    return float(np.abs(wide @ wide.swapaxes(-1, -2) - np.eye(wide.shape[-2])).max())


def householder_rows(original: Array, base: Array) -> Array:
    """R [r, d] from torch's parametrisation: `original [d, r]` and `base [d, d]`."""
    vectors = torch.from_numpy(original).tril(-1)
    columns = torch.linalg.householder_product(vectors, 2 / (1 + (vectors * vectors).sum(dim=0)))
    signs = torch.from_numpy(original).diagonal().int()
    rows: Array = (torch.from_numpy(base) @ (columns * signs)).mT.contiguous().numpy()
    return rows


def sound(
    intervention: str, tensors: dict[str, Array], report: Callable[[str], None]
) -> tuple[str, dict[str, Array]]:
    """The same edit without a rotation where R's rows are not orthonormal, which our rotations always are.

    That happens in pyreft with weight decay, which turns R into zeros, and with weights kept in bfloat16.
    """
    if "R" not in tensors:
        return intervention, tensors
    off = off_orthonormal(tensors["R"])
    if off <= ORTHONORMAL:
        return intervention, tensors
    kind = {"loreft": "noreft", "consreft": "noreft", "direft": "nodireft", "lobireft": "nodireft"}[
        intervention
    ]
    zeros = " (R is zero: the adapter changes nothing; weight decay does that to torch's parametrisation)"
    report(
        f"R is not orthonormal, off by {off:.2g}{'' if tensors['R'].any() else zeros}; carried as {kind}, the same edit"
    )
    W1 = tensors["W"] if "W" in tensors else np.zeros_like(tensors["R"])
    return kind, {"W1": W1, "W2": tensors["R"], "b": tensors["b"]}
