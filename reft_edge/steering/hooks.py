"""Running interventions inside a PyTorch model: hooks on the outputs of its blocks, or of their parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.positions import Span, active, triggers_of
from reft_edge.adapter.triggers import Tokens, Trigger, check_ids
from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.model.blocks import component_module, decoder_layers
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.places import Place
from reft_edge.steering.interventions import Interventions, Weights


@dataclass
class _Step:
    """What every block needs to know of the forward pass under way."""

    weights: list[Weights]
    tokens: list[list[Tensor]]
    """For every adapter and position group, indices of its active tokens in the flattened batch."""


class Steering:
    """Interventions attached to a language model, decoder or encoder; every forward pass of the model is edited.

    Positions come from the attention mask, so that left and right padding both work. The prompt's length of each
    row is what `prompts` was given, or, in a pass without a KV cache behind it, the row's whole length; later
    passes (decode steps) keep the lengths of that pass, and where triggers stood in it.
    """

    def __init__(self, model: Any, adapters: Sequence[tuple[Interventions, float]]) -> None:
        """`adapters`: interventions and the scale of each. Raises ReftEdgeError if a layer, or a trigger's token, does not
        exist."""
        self.adapters = list(adapters)
        self._step: _Step | None = None
        self._off = False
        self._continuing = False
        self._given: Tensor | None = None
        self._lengths: Tensor | None = None
        self._prompts: Sequence[Tokens] | None = None
        self._packed: tuple[Tensor, Tensor] | None = None
        self._triggers = list(
            dict.fromkeys(
                trigger
                for interventions, _ in self.adapters
                for trigger in triggers_of(interventions.config.spans)
            )
        )
        for trigger in self._triggers:
            check_ids(trigger, int(model.get_input_embeddings().num_embeddings))
        self._starts: dict[Trigger, Tensor] = {}
        blocks = decoder_layers(model)
        for interventions, _ in self.adapters:
            if (
                interventions.config.num_layers != len(blocks)
                or interventions.config.hidden_size != model.config.hidden_size
            ):
                raise ReftEdgeError(
                    f"the adapter is for {interventions.config.num_layers} layers of size "
                    f"{interventions.config.hidden_size}; this model has {len(blocks)} of {model.config.hidden_size}"
                )
        edited = sorted(
            {place for interventions, _ in self.adapters for place in interventions.config.places}
        )
        self._places = edited
        self.modules = [component_module(blocks[place.layer], place.component) for place in edited]
        """Those whose outputs are edited."""
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True), *self._edits()]

    def _edits(self) -> list[RemovableHandle]:
        return [
            module.register_forward_hook(self._hook(place))
            for module, place in zip(self.modules, self._places, strict=True)
        ]

    def remove(self) -> None:
        """Detach: the model answers as before."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside the block, edits as in the last pass, for what a backward pass computes again after `remove`."""
        handles = self._edits()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside the block, all passes are of one generation: prompts end where the first pass ended, with a KV cache or not."""
        self._continuing, self._lengths, self._starts = True, None, {}
        try:
            yield
        finally:
            self._continuing = False

    @contextmanager
    def prompts(
        self,
        lengths: Tensor,
        tokens: Sequence[Tokens] | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[None]:
        """Use these prompt lengths, `[batch]` tokens, for passes inside the block (training: prompt, then completion).

        `tokens`: the prompts themselves, where a pass has only a part of them; else triggers are looked for in the pass.
        `places`: where passes have all rows as one, the row of each of its tokens and the position there, `[tokens]`.
        """
        self._given, self._prompts, self._packed = lengths, tokens, places
        try:
            yield
        finally:
            self._given = self._prompts = self._packed = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the model answers as without adapters."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._off:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"][..., 0] if given is None else given
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        past = cache.get_seq_length() if cache is not None else 0
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is None:
            mask = ids.new_ones(ids.shape[0], past + ids.shape[1], dtype=torch.long)
        now = mask[:, -ids.shape[1] :].bool()
        t = (mask.long().cumsum(dim=1) - 1)[:, -ids.shape[1] :]
        if self._given is not None:
            self._lengths = self._given
        elif (
            self._lengths is None
            or self._lengths.shape[0] != ids.shape[0]
            or (past == 0 and not self._continuing)
        ):
            self._lengths = mask.long().sum(dim=1)
        n = self._by_row(self._lengths.to(t.device)[:, None])
        if self._packed is not None:
            t = self._packed[1][None]
        if self._triggers:
            self._find_triggers(given, now, past)
        with torch.autocast(ids.device.type, enabled=False):
            weights = [interventions.weights() for interventions, _ in self.adapters]
        self._step = _Step(
            weights=weights,
            tokens=[
                [
                    (active(span, t, n, self._start(span)) & now).flatten().nonzero().squeeze(1)
                    for span in interventions.config.spans
                ]
                for interventions, _ in self.adapters
            ],
        )

    def _start(self, span: Span) -> Tensor | None:
        return None if span.trigger is None else self._by_row(self._starts[span.trigger])

    def _by_row(self, values: Tensor) -> Tensor:
        """Of `values [rows, 1]`, where all rows are one, each token's: `[1, tokens]`."""
        return values if self._packed is None else values[self._packed[0]].T

    def _find_triggers(self, ids: Tensor | None, now: Tensor, past: int) -> None:
        """Where each trigger starts in the rows' prompts, `[batch, 1]`; passes behind a KV cache keep what the first one found.

        Raises ReftEdgeError where the prompts' tokens are not all in one pass.
        """
        if self._prompts is not None:
            self._note_starts(self._prompts, now.device)
            return
        if past:
            if not self._starts or any(len(start) != len(now) for start in self._starts.values()):
                raise ReftEdgeError(
                    f"the adapter acts {self._triggers[0]} on, and the prompts began in an earlier pass; give each prompt's "
                    "tokens in one pass, without a KV cache behind it"
                )
            return
        if ids is None:
            raise ReftEdgeError(
                f"the adapter acts {self._triggers[0]} on, which is looked for in input_ids; inputs_embeds have no tokens"
            )
        assert self._lengths is not None
        prompts = [
            row[real][:n] for row, real, n in zip(ids.cpu(), now.cpu(), self._lengths.tolist(), strict=True)
        ]
        self._note_starts([prompt.numpy() for prompt in prompts], now.device)

    def _note_starts(self, prompts: Sequence[Tokens], device: torch.device) -> None:
        self._starts = {
            trigger: torch.tensor([[trigger.start(prompt)] for prompt in prompts], device=device)
            for trigger in self._triggers
        }

    def _hook(self, place: Place) -> Any:
        def edit(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._off:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            edited = self._edit(place, hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    def _edit(self, place: Place, hidden: Tensor) -> Tensor:
        assert self._step is not None
        flat = hidden.flatten(0, 1)
        edited = flat
        with torch.autocast(hidden.device.type, enabled=False):
            for number, (interventions, scale) in enumerate(self.adapters):
                if place not in interventions.config.places:
                    continue
                index = interventions.config.places.index(place)
                groups, weights = self._step.tokens[number], self._step.weights[number]
                tokens = torch.cat(groups)
                if tokens.numel() == 0 and not torch.is_grad_enabled():
                    continue
                rows = flat.index_select(0, tokens).float()
                delta = torch.cat(
                    [
                        weights.delta(h, index, group, interventions.act)
                        for group, h in enumerate(torch.split(rows, [len(group) for group in groups]))
                    ]
                )
                delta = delta * scale if scale != 1 else delta
                if interventions.dropout.p and interventions.training:
                    delta = interventions.dropout(rows + delta) - rows
                edited = edited.index_add(0, tokens, delta.to(hidden.dtype))
        return edited.view_as(hidden)


@contextmanager
def steered(model: Any, *adapters: tuple[Interventions, float]) -> Iterator[Steering]:
    """`Steering` for the length of a block."""
    steering = Steering(model, adapters)
    try:
        yield steering
    finally:
        steering.remove()


def check_bases(model: Any, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Raise BaseMismatchError unless every adapter was trained on this model."""
    if not adapters:
        return
    found = fingerprint(model)
    for adapter, _ in adapters:
        if adapter.config.base_fingerprint != found:
            raise BaseMismatchError(
                f"the adapter was trained on {adapter.config.base_name} with fingerprint "
                f"{adapter.config.base_fingerprint}; this model has {found}: give the model it was trained on"
            )
