"""The trainable interventions of one adapter, in PyTorch, all layers and position groups stacked.

Formulas and initialisation follow pyreft 0.1.0 (`interventions.py`): linear maps start as `torch.nn.Linear`
does, rotations as random orthonormal matrices, the constants of ConsReFT and LoBiReFT uniform in [0, 1). RED starts as no
edit, and others can.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from reft_edge.adapter.algebra import folded_rows
from reft_edge.adapter.config import HEAD, Adapter, AdapterConfig
from reft_edge.errors import ReftEdgeError

STARTS = ("auto", "unchanged", "random")
_ORTHONORMAL = 1e-4
"""Most that R Rᵀ of a file may be off the identity for R to be taken as a rotation."""


@dataclass(frozen=True)
class Weights:
    """One step's effective parameters, computed from the trained ones for all layers at once.

    h' = h + (act(h Aᵀ + b) − h Cᵀ − c) B with `A, C, B [L, G, r, d]`, `b, c [L, G, r]`; A None is zero,
    C None drops the subtraction. With a linear act_fn, C and c are already folded into A and b. With `s [L, G, 1, d]`, s ⊙ h
    is added, too.
    """

    A: Tensor | None
    b: Tensor
    B: Tensor
    C: Tensor | None = None
    c: Tensor | None = None
    s: Tensor | None = None

    def delta(self, h: Tensor, layer: int, group: int, act: Callable[[Tensor], Tensor]) -> Tensor:
        """The edit f(h) of h' = h + f(h) for `h [tokens, d]`, at the adapter's layer-th layer."""
        A, b, B, C, c, s = (part and part[layer][group] for part in self._parts)
        z = b.expand(h.shape[0], -1) if A is None else act(torch.addmm(b, h, A.mT))
        if C is not None:
            z = z - h @ C.mT
        if c is not None:
            z = z - c
        edit: Tensor = z @ B if s is None else torch.addcmul(z @ B, h, s)
        return edit

    @cached_property
    def _parts(self) -> list[Any]:
        """A, b, B, C, c, s apart by layer and group at once: their gradients then come as one stack, not a sum of sparse ones."""
        tensors = (self.A, self.b, self.B, self.C, self.c, self.s)
        return [
            tensor if tensor is None else [layer.unbind() for layer in tensor.unbind()] for tensor in tensors
        ]


class Rotation(nn.Module):
    """Orthonormal rows R [L, G, r, d] for every layer and group, from one batched Householder product.

    R is the first r columns of `base · H(x)`, transposed: `base` is a fixed orthogonal matrix whose first columns
    are the initial R, and H(x) a product of r reflections whose vectors are the trained parameters, zero at the
    start. This is the chart in which pyreft trains R (torch's `orthogonal` parametrization with its
    trivialization), but for all layers at once, in compact WY form (Schreiber and Van Loan 1989), with no
    [d, d] matrix stored and no sign kept in a trained tensor, so that weight decay cannot turn R into zeros.
    """

    base_vectors: Tensor
    base_signs: Tensor

    def __init__(self, initial: Tensor) -> None:
        """`initial [..., r, d]`: orthonormal rows to start from."""
        super().__init__()
        columns = initial.mT.float()
        reflectors, tau = torch.geqrf(columns)
        signs = reflectors.diagonal(dim1=-2, dim2=-1).sign()
        self.register_buffer("base_vectors", _unit_lower(reflectors))
        self.register_buffer("base_signs", torch.where(tau == 0, -signs, signs))
        self.vectors = nn.Parameter(torch.zeros_like(columns))

    def forward(self) -> Tensor:
        rank = self.vectors.shape[-1]
        vectors = _unit_lower(self.vectors)
        columns = -_reflect(vectors, _eye_like(self.vectors))
        signed = torch.cat(
            [columns[..., :rank, :] * self.base_signs[..., None], columns[..., rank:, :]], dim=-2
        )
        return self.moved(signed).mT

    def moved(self, columns: Tensor) -> Tensor:
        """The base's reflections of `columns [..., d, n]`."""
        return _reflect(self.base_vectors, columns)


class Interventions(nn.Module):
    """The interventions of one adapter, and its classification head if it has one; parameters are float32."""

    is_intervention = True
    """Tells these parameters from the base's own, where the two are in one module."""

    def __init__(
        self, config: AdapterConfig, dropout: float = 0.0, seed: int = 0, start: str = "random"
    ) -> None:
        """Random initial parameters, pyreft's; or, with the start `unchanged`, such that they edit nothing yet; or, with `auto`,
        the latter where the formula can.

        Raises ReftEdgeError for an unknown act_fn, a dropout outside [0, 1) or an intervention that has no such start.
        """
        super().__init__()
        if not 0 <= dropout < 1:
            raise ReftEdgeError(f"dropout is {dropout}; expected at least 0 and less than 1")
        self.config = config
        self.act = activation(config.act_fn)
        self.dropout = nn.Dropout(dropout if config.intervention != "consreft" else 0.0)
        random = torch.Generator().manual_seed(seed)
        tensors = initial_tensors(config, random)
        self._set(_begun(config, tensors, start))

    @classmethod
    def from_adapter(cls, adapter: Adapter, dropout: float = 0.0) -> "Interventions":
        """The same parameters as a saved adapter; an R that is not orthonormal, as of a file in int8, stays what it is."""
        module = cls(adapter.config, dropout)
        module._set({name: torch.from_numpy(tensor.copy()) for name, tensor in adapter.tensors.items()})
        return module

    def to_adapter(self, config: AdapterConfig | None = None) -> Adapter:
        """The parameters as they would be saved; `config` may describe the training that led to them."""
        tensors = {
            name: tensor.detach().float().cpu().contiguous().numpy()
            for name, tensor in self.tensors().items()
        }
        return Adapter(config or self.config, tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Unfolded parameters by the names of the adapter file; differentiable."""
        named = dict(self.trained.items())
        if self.rotation is not None:
            named["R"] = self.rotation()
        return named | {f"head.{name}": tensor for name, tensor in self.head.items()}

    def weights(self) -> Weights:
        """Effective parameters of this step; call once a forward pass."""
        t = self.tensors()
        if self.config.act_fn == "linear":
            return Weights(*folded_rows(self.config.intervention, t), s=t.get("s"))
        kind = self.config.intervention
        if kind == "loreft":
            return Weights(t["W"], t["b"], t["R"], C=t["R"])
        if kind == "noreft":
            return Weights(t["W1"], t["b"], t["W2"], C=t["W2"], c=t.get("b2"))
        if kind == "direft":
            return Weights(t["W"], t["b"], t["R"])
        return Weights(t["W1"], t["b"], t["W2"])

    @torch.no_grad()
    def check_sound(self) -> None:
        """Raise ReftEdgeError if a parameter is not finite or R has lost its orthonormal rows."""
        for name, tensor in self.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ReftEdgeError(f"parameter {name} is no longer finite; lower the learning rate")
            if name == "R":
                error = _off_orthonormal(tensor)
                if error > 1e-3:
                    raise ReftEdgeError(
                        f"R is no longer orthonormal (off by {error:.2g}); lower the learning rate"
                    )

    def _set(self, tensors: dict[str, Tensor]) -> None:
        head = {name.removeprefix("head."): tensors.pop(name) for name in HEAD if name in tensors}
        self.head = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in head.items()})
        rotated = "R" in tensors and _off_orthonormal(tensors["R"]) <= _ORTHONORMAL
        self.rotation = Rotation(tensors.pop("R")) if rotated else None
        self.trained = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})


@contextmanager
def dropout_off(*modules: Interventions) -> Iterator[None]:
    """Inside the block the interventions answer as in use, not as in training."""
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """pyreft's act_fn by transformers' name. Raises ReftEdgeError if there is none of that name."""
    if name == "linear":
        return nn.Identity()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ReftEdgeError(f"unknown act_fn {name!r}; known: {', '.join(sorted(ACT2FN))}")
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def initial_tensors(config: AdapterConfig, random: torch.Generator) -> dict[str, Tensor]:
    """pyreft's initial distribution for every tensor of the adapter file; a head starts as BERT's does."""

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=random) * (high - low) + low

    bound = 1 / math.sqrt(config.hidden_size)
    tensors: dict[str, Tensor] = {}
    for name, shape in config.shapes().items():
        if name in HEAD:
            tensors[name] = torch.randn(shape, generator=random) * (0.02 if name == "head.weight" else 0)
        elif name == "R":
            tensors[name] = random_rotations(shape, random)
        elif config.intervention == "steering":
            tensors[name] = torch.zeros(shape) if name == "v" else torch.ones(shape)
        elif config.intervention == "red":
            tensors[name] = torch.zeros(shape)
        elif config.intervention in ("consreft", "lobireft"):
            tensors[name] = uniform(shape, 0, 1)
        else:
            tensors[name] = uniform(shape, -bound, bound)
    return tensors


def without_edit(config: AdapterConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Initial tensors that edit nothing: LoReFT with W = R, NoReFT with W1 = W2, DiReFT with W = 0, NoDiReFT with W2 = 0, each
    with a bias that adds nothing. None where the formula leaves no such start.
    """
    kind, t = config.intervention, tensors
    zero = {"b": torch.zeros_like(t["b"])} if "b" in t else {}
    linear = config.act_fn == "linear"
    if kind in ("steering", "red"):
        return t
    if kind == "loreft" and linear:
        return t | zero | {"W": t["R"].clone()}
    if kind == "noreft" and linear:
        return t | {"W1": t["W2"].clone(), "b": t["b2"].clone() if "b2" in t else zero["b"]}
    if kind == "direft" and not activation(config.act_fn)(torch.zeros(1)).any():
        return t | zero | {"W": torch.zeros_like(t["W"])}
    if kind == "nodireft":
        return t | {"W2": torch.zeros_like(t["W2"])}
    if kind == "lobireft":
        return t | zero
    return None


def _begun(config: AdapterConfig, random: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors of a start. Raises ReftEdgeError where the formula does not have it."""
    if start == "random":
        return random
    begun = without_edit(config, random)
    if begun is None and start == "unchanged":
        formula = config.intervention
        if config.act_fn != "linear":
            formula += f" with the act_fn {config.act_fn}"
        raise ReftEdgeError(
            f"{formula} has no start that leaves the model unchanged; start at random, or take nodireft"
        )
    return random if begun is None else begun


def random_rotations(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Uniformly random orthonormal rows, `shape [..., r, d]` with r <= d (as `torch.nn.init.orthogonal_`)."""
    normal = torch.randn((*shape[:-2], shape[-1], shape[-2]), generator=random)
    q, r = torch.linalg.qr(normal)
    signs: Tensor = r.diagonal(dim1=-2, dim2=-1).sign()
    rows: Tensor = (q * signs[..., None, :]).mT
    return rows.contiguous()


def _off_orthonormal(rows: Tensor) -> float:
    """The largest entry of R Rᵀ − I."""
    gram = rows @ rows.mT
    return float((gram - torch.eye(rows.shape[-2], device=rows.device)).abs().max())


def _unit_lower(x: Tensor) -> Tensor:
    return x.tril(-1) + _eye_like(x)


def _eye_like(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-2], x.shape[-1], device=x.device, dtype=x.dtype).expand(x.shape)


def _reflect(vectors: Tensor, y: Tensor) -> Tensor:
    """H1 H2 … Hr y with H_i = I − 2 v_i v_iᵀ / ‖v_i‖², as y − V T Vᵀ y with T⁻¹ = striu(VᵀV) + diag(VᵀV) / 2."""
    gram = vectors.mT @ vectors
    inverse_t = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    solved: Tensor = torch.linalg.solve_triangular(inverse_t, vectors.mT @ y, upper=True)
    return y - vectors @ solved
