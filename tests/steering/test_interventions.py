"""Interventions against pyreft 0.1.0's formulas, run with torch's own modules."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.adapter.linear import fold
from reft_edge.errors import ReftEdgeError
from reft_edge.steering.interventions import Interventions, Rotation, random_rotations

D, RANK = 24, 3


def config(intervention: str = "loreft", **fields: Any) -> AdapterConfig:
    rank = 1 if intervention in ("steering", "red") else RANK
    return AdapterConfig(
        **{
            "intervention": intervention,
            "base_name": "b",
            "base_fingerprint": "0",
            "hidden_size": D,
            "num_layers": 4,
            "layers": (0, 2, 3),
            "rank": rank,
            "positions": "f2+l2",
            **fields,
        }
    )


class PyreftEdit(nn.Module):
    """One pyreft intervention: linear maps, and R under torch's orthogonal parametrization."""

    def __init__(self, kind: str, tensors: dict[str, torch.Tensor], act: Any) -> None:
        super().__init__()
        self.kind, self.act = kind, act
        self.t = nn.ParameterDict({name: tensor.clone() for name, tensor in tensors.items() if name != "R"})
        if "R" in tensors:
            self.rotate = nn.Linear(RANK, D, bias=False)
            self.rotate.weight.data = tensors["R"].mT.clone()
            nn.utils.parametrizations.orthogonal(self.rotate)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        t = self.t
        if self.kind in ("noreft", "nodireft"):
            source = self.act(h @ t["W1"].T + t["b"])
            return (
                h
                + (
                    source - (h @ t["W2"].T + t["b2"] if "b2" in t else h @ t["W2"].T)
                    if self.kind == "noreft"
                    else source
                )
                @ t["W2"]
            )
        R = self.rotate.weight
        if self.kind == "loreft":
            return h + (self.act(h @ t["W"].T + t["b"]) - h @ R) @ R.T
        if self.kind == "direft":
            return h + self.act(h @ t["W"].T + t["b"]) @ R.T
        if self.kind == "consreft":
            return h + (t["b"] - h @ R) @ R.T
        return h + t["b"] @ R.T


@pytest.mark.parametrize(
    ("kind", "act_fn"),
    [
        ("loreft", "linear"),
        ("loreft", "relu"),
        ("noreft", "linear"),
        ("noreft", "gelu"),
        ("direft", "linear"),
        ("direft", "silu"),
        ("nodireft", "linear"),
        ("nodireft", "tanh"),
        ("consreft", "linear"),
        ("lobireft", "linear"),
    ],
)
@pytest.mark.parametrize("add_bias", [False, True])
def test_delta_and_its_gradients_are_pyrefts(kind: str, act_fn: str, add_bias: bool) -> None:
    if add_bias and kind != "noreft":
        add_bias = False
    module = Interventions(config(kind, act_fn=act_fn, add_bias=add_bias), seed=3)
    h = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    target = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    for layer, group in ((0, 0), (2, 1)):
        tensors = {name: tensor[layer, group].detach() for name, tensor in module.tensors().items()}
        reference = PyreftEdit(kind, tensors, module.act)
        module.zero_grad()
        found = h + module.weights().delta(h, layer, group, module.act)
        torch.testing.assert_close(found, reference(h), atol=1e-5, rtol=1e-5)
        (found * target).sum().backward()
        (reference(h) * target).sum().backward()
        for name, parameter in reference.t.items():
            torch.testing.assert_close(
                module.trained[name].grad[layer, group], parameter.grad, atol=1e-4, rtol=1e-4
            )


def test_rotation_trains_like_torchs_orthogonal_parametrization() -> None:
    """Same R and same AdamW path from the same start, when torch's base is completed as ours is."""
    initial = random_rotations((2, 1, RANK, D), torch.Generator().manual_seed(0))
    ours = Rotation(initial)
    theirs = nn.Linear(RANK, D, bias=False)
    theirs.weight.data = initial[1, 0].mT.clone()
    nn.utils.parametrizations.orthogonal(theirs)
    theirs.parametrizations.weight[0].base = dense_base(ours)[1, 0]
    torch.testing.assert_close(theirs.weight, initial[1, 0].mT, atol=1e-5, rtol=0)
    target = torch.randn(RANK, D, generator=torch.Generator().manual_seed(2))
    optimizers = [
        torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0) for module in (ours, theirs)
    ]
    for _ in range(30):
        for optimizer, weight in zip(
            optimizers, (lambda: ours()[1, 0], lambda: theirs.weight.T), strict=True
        ):
            optimizer.zero_grad()
            (weight() - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours()[1, 0], theirs.weight.T, atol=1e-4, rtol=0)
    assert float((ours()[1, 0] - initial[1, 0]).detach().abs().max()) > 0.1
    torch.testing.assert_close(ours()[0], initial[0], atol=1e-5, rtol=0)


def dense_base(rotation: Rotation) -> torch.Tensor:
    """The orthogonal [d, d] matrix that `Rotation` keeps as reflections."""
    base = torch.eye(D).expand(*rotation.base_vectors.shape[:-2], D, D).clone()
    base[..., :RANK, :] *= rotation.base_signs[..., None]
    for k in reversed(range(RANK)):
        v = rotation.base_vectors[..., k : k + 1]
        base = base - 2 * v @ (v.mT @ base) / (v.mT @ v)
    return base


def test_weight_decay_cannot_empty_the_rotation() -> None:
    """With torch's parametrization, one AdamW step with its default decay turns R into zeros; ours stays orthonormal."""
    rotation = Rotation(random_rotations((3, 2, RANK, D), torch.Generator().manual_seed(0)))
    theirs = nn.utils.parametrizations.orthogonal(nn.Linear(RANK, D, bias=False))
    for module, weight in ((rotation, rotation), (theirs, lambda: theirs.weight)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        assert optimizer.defaults["weight_decay"] > 0
        for _ in range(3):
            optimizer.zero_grad()
            weight().square().sum().backward()
            optimizer.step()
    gram = rotation() @ rotation().mT
    torch.testing.assert_close(gram, torch.eye(RANK).expand(3, 2, RANK, RANK), atol=1e-5, rtol=0)
    assert float(theirs.weight.detach().abs().max()) == 0


@pytest.mark.parametrize("initial", [torch.eye(RANK, D), -torch.eye(RANK, D), torch.eye(D, D)])
def test_rotation_of_unit_vectors(initial: torch.Tensor) -> None:
    torch.testing.assert_close(Rotation(initial[None, None])()[0, 0], initial, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "kind", ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "steering"]
)
def test_adapter_round_trip_and_fold(kind: str) -> None:
    module = Interventions(config(kind), seed=5)
    adapter = module.to_adapter()
    again = Interventions.from_adapter(adapter)
    h = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    edit = fold(adapter)
    for layer in range(3):
        for group in range(2):
            delta = again.weights().delta(h, layer, group, again.act).detach().numpy()
            part = edit.places[adapter.config.places[layer]]
            columns = part.gates == group
            folded = (h.numpy() @ part.A[:, columns] + part.b[columns]) @ part.B[columns]
            np.testing.assert_allclose(delta, folded, atol=1e-5)


@pytest.mark.parametrize("kind", ["loreft", "direft", "consreft", "lobireft"])
def test_a_rounded_rotation_is_run_as_the_file_holds_it(kind: str) -> None:
    """As the exported graph runs it, not made orthonormal again."""
    adapter = Interventions(config(kind), seed=5).to_adapter()
    rounded = Adapter(adapter.config, {**adapter.tensors, "R": np.round(adapter.tensors["R"] * 64) / 64})
    module = Interventions.from_adapter(rounded)
    np.testing.assert_array_equal(module.tensors()["R"].detach().numpy(), rounded.tensors["R"])
    np.testing.assert_array_equal(module.weights().B.detach().numpy(), rounded.tensors["R"])
    assert module.to_adapter().tensors.keys() == rounded.tensors.keys()


def test_initial_distributions() -> None:
    module = Interventions(
        config("loreft", hidden_size=64, num_layers=8, layers=tuple(range(8)), rank=8), seed=0
    )
    bound = 64**-0.5
    for name in ("W", "b"):
        tensor = module.trained[name]
        assert float(tensor.detach().abs().max()) <= bound
        assert float(tensor.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    constants = Interventions(config("lobireft"), seed=0).trained["b"].detach()
    assert 0 <= float(constants.min()) < float(constants.max()) < 1
    assert not torch.equal(
        Interventions(config(), seed=1).trained["W"], Interventions(config(), seed=2).trained["W"]
    )
    assert torch.equal(
        Interventions(config(), seed=1).tensors()["R"], Interventions(config(), seed=1).tensors()["R"]
    )


@pytest.mark.parametrize("start", ["unchanged", "auto"])
@pytest.mark.parametrize(
    ("kind", "act_fn", "add_bias"),
    [
        ("loreft", "linear", False),
        ("noreft", "linear", False),
        ("noreft", "linear", True),
        ("direft", "linear", False),
        ("direft", "silu", False),
        ("nodireft", "linear", False),
        ("nodireft", "sigmoid", False),
        ("lobireft", "linear", False),
        ("red", "linear", False),
        ("steering", "linear", False),
    ],
)
def test_a_start_that_leaves_the_model_unchanged_can_be_trained(
    kind: str, act_fn: str, add_bias: bool, start: str
) -> None:
    chosen = config(kind, act_fn=act_fn, add_bias=add_bias)
    module = Interventions(chosen, seed=3, start=start)
    h = 100 * torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    edit = module.weights().delta(h, 1, 0, module.act)
    assert float(edit.detach().abs().max()) < 1e-3
    (edit * torch.randn(7, D)).sum().backward()
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in module.parameters())


@pytest.mark.parametrize(
    ("kind", "act_fn"),
    [("loreft", "gelu"), ("noreft", "tanh"), ("direft", "sigmoid"), ("consreft", "linear")],
)
def test_formulas_without_such_a_start_are_named(kind: str, act_fn: str) -> None:
    with pytest.raises(ReftEdgeError, match=f"{kind}.* has no start that leaves the model unchanged"):
        Interventions(config(kind, act_fn=act_fn), start="unchanged")
    begun, random = (
        Interventions(config(kind, act_fn=act_fn), seed=3, start=start) for start in ("auto", "random")
    )
    for name, tensor in begun.tensors().items():
        assert torch.equal(tensor, random.tensors()[name])


def test_unsound_parameters_are_noticed() -> None:
    module = Interventions(config())
    module.check_sound()
    with torch.no_grad():
        module.trained["W"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ReftEdgeError, match="W is no longer finite"):
        module.check_sound()
    module = Interventions(config())
    module.rotation.base_signs.zero_()
    with pytest.raises(ReftEdgeError, match="no longer orthonormal"):
        module.check_sound()


def test_refusals() -> None:
    with pytest.raises(ReftEdgeError, match="unknown act_fn 'nothing'"):
        Interventions(config(act_fn="nothing"))
    with pytest.raises(ReftEdgeError, match="dropout is 1"):
        Interventions(config(), dropout=1.0)
