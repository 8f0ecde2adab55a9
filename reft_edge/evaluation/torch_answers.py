"""Answering evaluation questions with a PyTorch model, with any adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from reft_edge.adapter.config import Adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.evaluation.answering import Continuations
from reft_edge.model.prompts import Prompts
from reft_edge.model.texts import Text, TextTokens
from reft_edge.steering.heads import class_scores
from reft_edge.steering.hooks import Steering, check_bases, steered
from reft_edge.steering.interventions import Interventions
from reft_edge.steering.likelihood import check_targets, check_tokens, completion_logits, readable


@dataclass(frozen=True)
class TorchDecoder:
    """A causal language model of transformers; `torch_decoder` makes one."""

    model: Any
    steering: Steering
    prompts: Prompts
    prompt_format: str
    context_length: int
    device: torch.device
    autocast: bool

    @torch.no_grad()
    def log_likelihoods(self, batch: Sequence[Continuations]) -> list[list[float]]:
        """See `evaluation.Decoder`."""
        rows = [(item.prompt, item.shared) for item in batch]
        logits = completion_logits(self.model, self.steering, rows, self.device, self.autocast)
        check_targets(logits[0], [(*item.shared, *item.last) for item in batch])
        found = []
        for item, row in zip(batch, logits, strict=True):
            known = row.log_softmax(dim=-1)
            shared = sum(float(known[i, token]) for i, token in enumerate(item.shared))
            found.append([shared + float(known[-1, token]) for token in item.last])
        return found

    @torch.no_grad()
    def generate(self, batch: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """See `evaluation.Decoder`; a repetition penalty and the like of the model's own are left out."""
        from transformers import GenerationConfig

        check_tokens(self.model, batch)
        length = max(len(ids) for ids in batch)
        ids, mask = torch.zeros(2, len(batch), length, dtype=torch.long).unbind()
        for i, row in enumerate(batch):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        ends = self.prompts.stop_ids_with(end_tokens(self.model))
        greedy = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=0
        )
        own = self.model.generation_config
        self.model.generation_config = greedy
        try:
            with (
                torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast),
                readable(self.model, length + max_tokens),
            ):
                output = self.model.generate(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device)
                )
        finally:
            self.model.generation_config = own
        return [_before_end(row[length:].tolist(), ends) for row in output]


@dataclass(frozen=True)
class TorchClassifier:
    """An encoder of transformers and an adapter with a head; `torch_classifier` makes one."""

    encoder: Any
    interventions: Interventions
    tokens: TextTokens
    labels: tuple[str, ...]
    device: torch.device
    autocast: bool

    @torch.no_grad()
    def probabilities(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """See `evaluation.Classifier`."""
        rows = [self.tokens(text) for text in texts]
        check_tokens(self.encoder, [row.ids for row in rows])
        scores = class_scores(self.encoder, self.interventions, rows, self.device, self.autocast)
        return [dict(zip(self.labels, row, strict=True)) for row in scores.softmax(dim=-1).tolist()]


@contextmanager
def torch_decoder(
    model: Any,
    prompts: Prompts,
    prompt_format: str,
    adapters: Sequence[tuple[Adapter, float]],
    device: torch.device,
    autocast: bool = False,
) -> Iterator[TorchDecoder]:
    """A decoder with adapters, each scaled, for the length of a block.

    Raises BaseMismatchError for an adapter of another model, ReftEdgeError for one that classifies.
    """
    check_bases(model, adapters)
    if any(adapter.config.labels for adapter, _ in adapters):
        raise ReftEdgeError(
            "an adapter with a classification head needs its encoder; this model continues text"
        )
    parts = [(Interventions.from_adapter(adapter).to(device).eval(), scale) for adapter, scale in adapters]
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    with steered(model.to(device).eval(), *parts) as steering:
        yield TorchDecoder(model, steering, prompts, prompt_format, limit, device, autocast)


@contextmanager
def torch_classifier(
    encoder: Any,
    tokens: TextTokens,
    adapter: Adapter,
    scale: float,
    device: torch.device,
    autocast: bool = False,
) -> Iterator[TorchClassifier]:
    """An encoder with one adapter, its edits scaled, for the length of a block.

    Raises BaseMismatchError for an adapter of another encoder, ReftEdgeError for one without a head.
    """
    check_bases(encoder, [(adapter, scale)])
    if not adapter.config.labels:
        raise ReftEdgeError("the adapter has no classification head; train one with --task classification")
    interventions = Interventions.from_adapter(adapter).to(device).eval()
    with steered(encoder.to(device).eval(), (interventions, scale)):
        yield TorchClassifier(encoder, interventions, tokens, adapter.config.labels, device, autocast)


def end_tokens(model: Any) -> list[int]:
    """Tokens that end an answer, by the model's generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = model.config.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]


def _before_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    first = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:first]
