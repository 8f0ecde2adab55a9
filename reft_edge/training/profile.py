"""Where the time of a training step goes: base forward and backward, interventions, loss, optimiser."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reft_edge.steering.hooks import Steering

SECTIONS = ("base forward", "base backward", "interventions", "loss", "optimiser", "other")


@dataclass
class Profile:
    """A clock that is always in one section; GPU work is waited for when the section changes, which costs some speed.

    The first step is not counted where there are more: it pays for memory and code that later ones find ready.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECTIONS, 0.0))
    steps: int = 0
    _first: dict[str, float] | None = None
    _section: str = "other"
    _since: float = field(default_factory=time.perf_counter)

    def switch(self, section: str) -> None:
        """From now on time goes to this section."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._section] += now - self._since
        self._section, self._since = section, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block is nobody's."""
        self.switch(self._section)
        kept = dict(self.seconds), self._section
        try:
            yield
        finally:
            self.seconds, self._section = kept
            self._since = time.perf_counter()

    def end_step(self) -> None:
        """Count a step, or forget it if it was the first."""
        self.switch("other")
        self.steps += 1
        if self._first is None:
            self._first = dict(self.seconds)
            self.seconds = dict.fromkeys(SECTIONS, 0.0)
            self.steps = 0

    def a_step(self) -> dict[str, float] | None:
        """Mean seconds of a step by section; None if there was no step."""
        if not self.steps:
            return self._first
        return {section: total / self.steps for section, total in self.seconds.items()}


@contextmanager
def watched(model: Any, steering: Steering, profile: Profile) -> Iterator[None]:
    """Inside the block, passes of the steered model and their gradients move the profile's clock.

    Edits are between two hooks on each edited module, one before and one behind the steering's own; in the backward pass
    the same two tensors' gradients say when an edit's turn begins and ends.
    """

    def to(section: str) -> Any:
        return lambda *_: profile.switch(section)

    def when_gradient_comes(output: Any, section: str) -> None:
        tensor = _first_tensor(output)
        if tensor.requires_grad:
            tensor.register_hook(to(section))  # type: ignore[no-untyped-call]

    def before_edit(module: nn.Module, args: Any, output: Any) -> None:
        profile.switch("interventions")
        when_gradient_comes(output, "base backward")

    def after_edit(module: nn.Module, args: Any, output: Any) -> None:
        when_gradient_comes(output, "interventions")
        profile.switch("base forward")

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        when_gradient_comes(output, "base backward")
        profile.switch("loss")

    handles = [
        model.register_forward_pre_hook(to("interventions"), prepend=True),
        model.register_forward_pre_hook(to("base forward")),
        model.register_forward_hook(after_model),
    ]
    for module in steering.modules:
        handles.append(module.register_forward_hook(before_edit, prepend=True))
        handles.append(module.register_forward_hook(after_edit))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor))
