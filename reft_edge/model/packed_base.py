"""A frozen base in PyTorch whose matrices stay as they are stored, in an exported folder or in a checkpoint."""

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.checkpoint import open_checkpoint
from reft_edge.model.exported_weights import GraphWeights
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.manifest import Manifest, load_manifest
from reft_edge.model.packed import PackedMatrix, Stored, packed_module
from reft_edge.model.source import ModelFolder

Read = Callable[[str], Tensor]
"""Gives a parameter's values as they are stored, by its name."""
Form = PackedMatrix | Tensor
"""What is held in a parameter's place."""


def load_exported(folder: ModelFolder, exported: Path) -> Any:
    """The decoder with the weights of a folder that it was exported to; see `use_exported_weights`.

    Raises ReftEdgeError as that does, and as `load_model` does.
    """
    found = open_checkpoint(folder)
    if found is None:
        model = load_model(folder)
        use_exported_weights(model, exported, fingerprint(model))
        return model
    use_exported_weights(found.model, exported, found.base_fingerprint, found.read)
    return found.model


def load_halved(folder: ModelFolder) -> Any:
    """The decoder for arithmetic in bfloat16: its linear layers are rounded to that, an embedding in 16 bits stays so.

    It keeps the fingerprint of the weights as they are stored. Raises ReftEdgeError as `load_model` does.
    """
    found = open_checkpoint(folder)
    if found is None:
        return load_model(folder)
    read = found.read
    _hold(found.model, found.base_fingerprint, lambda held: _in_half(held, read))
    return found.model


def use_exported_weights(
    model: Any, folder: Path, base_fingerprint: str, read: Read | None = None
) -> Manifest:
    """Give a PyTorch model the weights of an exported folder, in place; returns the folder's manifest.

    Quantised and 16-bit matrices stay packed as in the folder, whose file must stay; they are unpacked when they are used
    (`reft_edge.model.packed`). The model keeps `base_fingerprint`. `read` is for a model whose parameters have no content.
    A model that has this folder's weights already is left alone.

    Raises ReftEdgeError if there is no exported model in `folder`, or if it is not an export of the model that has
    `base_fingerprint`.
    """
    manifest = load_manifest(folder)
    if manifest.base_fingerprint != base_fingerprint:
        raise ReftEdgeError(
            f"{folder} is an export of {manifest.base_name} with fingerprint {manifest.base_fingerprint}, not of this "
            f"model, which has {base_fingerprint}; give the folder that this model was exported to"
        )
    if manifest.source != "export" and manifest.quantisation:
        raise ReftEdgeError(
            f"{folder} holds a quantised graph that reft-edge did not build, and cannot read the weights of; "
            "train on the model itself, or give a folder that `reft-edge export` wrote"
        )
    held = getattr(model, "exported_to", None)
    if held is None:
        weights = GraphWeights(model, folder / manifest.graph)
        weights.round_tables()
        _hold(model, base_fingerprint, lambda held: _as_exported(held, weights, read), weights)
        model.exported_to = folder
    elif held != folder:
        raise ReftEdgeError(f"the model was given the weights of {held} already; load it again for {folder}")
    return manifest


@dataclass(frozen=True)
class _Held:
    """A parameter of a module."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    tied: bool
    """Whether another module has it, too."""

    @property
    def multiplies(self) -> bool:
        """Whether it is the matrix of a linear layer or of an embedding."""
        linear = type(self.module) is nn.Linear or isinstance(self.module, nn.Embedding)
        return linear and self.name.endswith(".weight")


def _as_exported(held: _Held, weights: GraphWeights, read: Read | None) -> Form:
    """A matrix packed as the graph has it, or the graph's numbers in float32."""
    found: PackedMatrix | None = None
    quantised = held.name in weights
    if quantised and held.multiplies:
        found = weights.packed(held.name)
    if found is None:
        stored = held.parameter.data if read is None else read(held.name)
        if held.multiplies and not quantised:
            found = weights.halved(stored)
    return weights.changed(held.name, stored) if found is None else found


def _in_half(held: _Held, read: Read) -> Form:
    stored = read(held.name)
    if type(held.module) is nn.Linear and held.multiplies and not held.tied:
        return stored.bfloat16()
    if held.multiplies and stored.dtype in (torch.float16, torch.bfloat16):
        return PackedMatrix([Stored(stored)], stored.shape[1])
    return stored.float()


def _hold(
    model: Any, base_fingerprint: str, form: Callable[[_Held], Form], apart: Container[str] = ()
) -> None:
    """Give each parameter of a model its form. Tied ones share theirs, but for those whose names are in `apart`."""
    parameters = model.num_parameters()
    count = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared: dict[int, tuple[nn.Parameter, PackedMatrix | nn.Parameter]] = {}

    def found(held: _Held) -> PackedMatrix | nn.Parameter:
        shares = held.tied and held.name not in apart
        if shares and id(held.parameter) in shared:
            return shared[id(held.parameter)][1]
        made = form(held)
        made = nn.Parameter(made, requires_grad=False) if isinstance(made, Tensor) else made
        if shares:
            shared[id(held.parameter)] = held.parameter, made
        return made

    for path, module in list(model.named_modules()):
        forms = {
            name: found(_Held(f"{path}.{name}".lstrip("."), module, parameter, count[id(parameter)] > 1))
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        matrix = forms.pop("weight") if isinstance(forms.get("weight"), PackedMatrix) else None
        module._parameters.update(
            {name: made for name, made in forms.items() if isinstance(made, nn.Parameter)}
        )
        if isinstance(matrix, PackedMatrix):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, packed_module(module, matrix))
    model.base_fingerprint, model.base_parameters = base_fingerprint, parameters
