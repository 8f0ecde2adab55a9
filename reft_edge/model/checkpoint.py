"""A model's weights read from its safetensors files one at a time: the whole of them never stands in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.fingerprint import fingerprint, fingerprint_of
from reft_edge.model.loading import load_model
from reft_edge.model.pretrained import from_folder
from reft_edge.model.source import ModelFolder

Change = Callable[[str, Tensor], None]
"""Told a parameter's name and its float32 values, which it may change in place."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a folder, by the names that the model's parameters have."""

    model: Any
    """The PyTorch model; its parameters have shapes and no content, its other tensors are whole."""
    files: dict[str, Path]
    """Where each parameter is."""
    keys: dict[str, str]
    """The name of each parameter in its file: of those that share a tensor, one is stored."""
    names: tuple[str, ...]
    """Of parameters, those that share a tensor once."""

    def read(self, name: str) -> Tensor:
        """A parameter as it is stored."""
        with safe_open(self.files[name], "pt") as file:
            stored: Tensor = file.get_tensor(self.keys[name])
        return stored

    @property
    def base_fingerprint(self) -> str:
        """That of the model that transformers loads from these files."""
        return fingerprint_of((name, self.read(name)) for name in sorted(self.names))

    @contextmanager
    def filled(self, change: Change = lambda name, values: None) -> Iterator[Any]:
        """The model, ready to run: each block gets its weights in float32 when it runs, and loses them after."""
        units = _units(self.model)
        try:
            handles = [
                handle
                for prefix, unit in units.items()
                for handle in (
                    unit.register_forward_pre_hook(self._fill(prefix, change)),
                    unit.register_forward_hook(_empty),
                )
            ]
            yield self.model
        finally:
            for handle in handles:
                handle.remove()
            for unit in units.values():
                _empty(unit)

    def _fill(self, prefix: str, change: Change) -> Any:
        def fill(unit: nn.Module, arguments: Any) -> None:
            for path, module in unit.named_modules(prefix=prefix):
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        full = f"{path}.{name}"
                        values = self.read(full).to(torch.float32)
                        change(full, values)
                        module._parameters[name] = nn.Parameter(values, requires_grad=False)

        return fill


@dataclass(frozen=True)
class Whole:
    """A PyTorch model that stands in memory, to be used as a `Checkpoint` is."""

    model: Any

    @property
    def base_fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.model)

    @contextmanager
    def filled(self, change: Change = lambda name, values: None) -> Iterator[Any]:
        """The model, its weights changed for good."""
        for name, parameter in self.model.named_parameters():
            change(name, parameter.data)
        yield self.model


Reference = Checkpoint | Whole
"""A model that an exported graph is held against."""


def open_model(folder: ModelFolder) -> Reference:
    """The folder's model, weights one at a time where that is possible. Raises ReftEdgeError as `load_model` does."""
    return open_checkpoint(folder) or Whole(load_model(folder))


def open_checkpoint(folder: ModelFolder) -> Checkpoint | None:
    """The folder's weights to be read one at a time; None where transformers has to compute the model's from them."""
    from accelerate import init_empty_weights
    from transformers.models.auto import AutoConfig, AutoModelForCausalLM

    config = from_folder(AutoConfig, folder.path, folder.name)
    if getattr(config, "quantization_config", None) is not None:
        return None
    stored: dict[str, tuple[Path, list[int]]] = {}
    for path in sorted(folder.path.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                stored |= {name: (path, list(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises a class of its own
            raise ReftEdgeError(f"cannot load {folder.name}: {path.name}: {error}") from error
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
    except Exception as error:  # transformers and torch raise many kinds here
        raise ReftEdgeError(f"cannot load {folder.name}: {str(error) or type(error).__name__}") from error
    keys = _keys(model, stored)
    if keys is None or _is_converted(model):
        return None
    files = {name: stored[key][0] for name, key in keys.items()}
    names = tuple(name for name, _ in model.named_parameters())
    return Checkpoint(model.eval().requires_grad_(False), files, keys, names)


def _keys(model: Any, stored: dict[str, tuple[Path, list[int]]]) -> dict[str, str] | None:
    """The stored name of each parameter; none if one is not there as it is."""
    alike: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        alike.setdefault(id(parameter), []).append(name)
    keys: dict[str, str] = {}
    for names in alike.values():
        held = [name for name in names if name in stored]
        if not held or stored[held[0]][1] != list(parameters[held[0]].shape):
            return None
        keys |= dict.fromkeys(names, held[0])
    others = set(model.state_dict()) - parameters.keys()
    return None if others else keys


def _is_converted(model: Any) -> bool:
    """Whether transformers computes some of the model's weights from others."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 there was none
        return False
    return any(type(step).__name__ != "WeightRenaming" for step in get_model_conversion_mapping(model))


def _units(model: Any) -> dict[str, nn.Module]:
    """What gets its weights at a time: each block, and every other module that has some of its own, by its name."""
    blocks = set(decoder_layers(model))
    inside = {module for block in blocks for module in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if module in blocks
        or (module not in inside and any(parameter is not None for parameter in module._parameters.values()))
    }


def _empty(unit: nn.Module, *_: Any) -> None:
    for module in unit.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
