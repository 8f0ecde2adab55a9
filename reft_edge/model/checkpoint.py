"""A model's weights read from its safetensors files one at a time: the whole of them never stands in memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.fingerprint import fingerprint, fingerprint_of
from reft_edge.model.loading import load_model
from reft_edge.model.pretrained import from_folder
from reft_edge.model.source import ModelFolder

Change = Callable[[str, Tensor, int], None]
"""Told a parameter's name, some of its rows in float32, which it may change in place, and which row is the first of them."""

_AT_ONCE = 1 << 23  # numbers of a table of embeddings or of a head that are in memory at a time


def leave(name: str, values: Tensor, first: int) -> None:
    """The change that is none."""


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
    def filled(self, change: Change = leave) -> Iterator[Any]:
        """The model, ready to run: each block gets its weights in float32 when it runs, and loses them after.

        Of the table of embeddings only rows that are looked up are kept, and the head multiplies some rows at a time.
        """
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        with ExitStack() as undo:
            for prefix, unit in _units(self.model).items():
                if unit is head and type(unit) is nn.Linear:
                    unit.forward = partial(self._multiply, prefix, unit, change)  # type: ignore[method-assign]
                    undo.callback(delattr, unit, "forward")
                    continue
                looked_up = unit is table and isinstance(unit, nn.Embedding)
                fill = self._look_up(prefix, change) if looked_up else self._fill(prefix, change)
                undo.callback(_empty, unit)
                for handle in (
                    unit.register_forward_pre_hook(fill),
                    unit.register_forward_hook(_empty),
                ):
                    undo.callback(handle.remove)
            yield self.model

    def _rows(self, name: str, change: Change) -> Iterator[tuple[int, Tensor]]:
        """All of a parameter's rows in float32, some at a time, each time with the number of the first."""
        first = rows = 0
        while first == 0 or first < rows:
            # Opened each time: what was read of a mapped file counts as this process's memory until it is closed.
            with safe_open(self.files[name], "pt") as file:
                stored = file.get_slice(self.keys[name])
                rows, *others = stored.get_shape()
                step = max(1, _AT_ONCE // max(1, math.prod(others)))
                values = stored[first : first + step].to(torch.float32)
            change(name, values, first)
            yield first, values
            first += step

    def _look_up(self, prefix: str, change: Change) -> Any:
        def fill(unit: Any, arguments: tuple[Tensor, ...]) -> None:
            wanted = torch.unique(arguments[0])
            # Zeros that are never written take no memory.
            table = torch.from_numpy(np.zeros(tuple(unit.weight.shape), np.float32))
            for first, values in self._rows(f"{prefix}.weight", change):
                here = wanted[(wanted >= first) & (wanted < first + len(values))]
                table[here] = values[here - first]
            unit.weight = nn.Parameter(table, requires_grad=False)

        return fill

    def _multiply(self, prefix: str, unit: nn.Linear, change: Change, x: Tensor) -> Tensor:
        bias = None
        if unit.bias is not None:
            bias = torch.cat([values for _, values in self._rows(f"{prefix}.bias", change)])
        product = x.new_empty(*x.shape[:-1], unit.out_features)
        for first, values in self._rows(f"{prefix}.weight", change):
            rows = slice(first, first + len(values))
            product[..., rows] = functional.linear(x, values, None if bias is None else bias[rows])
        return product

    def _fill(self, prefix: str, change: Change) -> Any:
        def fill(unit: nn.Module, arguments: Any) -> None:
            for path, module in unit.named_modules(prefix=prefix):
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        full = f"{path}.{name}"
                        values = self.read(full).to(torch.float32)
                        change(full, values, 0)
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
    def filled(self, change: Change = leave) -> Iterator[Any]:
        """The model, its weights changed for good."""
        for name, parameter in self.model.named_parameters():
            change(name, parameter.data, 0)
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
    if keys is None or _is_converted(model) or not _read_buffers(model, stored):
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
    return keys


def _read_buffers(model: Any, stored: dict[str, tuple[Path, list[int]]]) -> bool:
    """Give the model what its files hold beside parameters; whether all of it is there."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, content in model.state_dict().items():
        if name in parameters:
            continue
        if name not in stored or stored[name][1] != list(content.shape):
            return False
        with safe_open(stored[name][0], "pt") as file:
            content.copy_(file.get_tensor(name))
    return True


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
