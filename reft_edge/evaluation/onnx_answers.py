"""Answering evaluation questions with an exported folder; needs ONNX Runtime, not torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reft_edge.evaluation.answering import Continuations
from reft_edge.model.prompts import Prompts
from reft_edge.model.texts import Text
from reft_edge.runtime.encoder import SteeredEncoder
from reft_edge.runtime.model import SteeredModel


@dataclass(frozen=True)
class OnnxDecoder:
    """An exported decoder with loaded adapters, by name, and the scale of each."""

    model: SteeredModel
    adapters: Mapping[str, float]
    prompt_format: str

    @property
    def prompts(self) -> Prompts:
        return self.model.prompts

    @property
    def context_length(self) -> int:
        """Tokens."""
        return self.model.manifest.context_length

    def log_likelihoods(self, batch: Sequence[Continuations]) -> list[list[float]]:
        """See `evaluation.Decoder`."""
        prompt_tokens = [len(item.prompt) for item in batch]
        logits = self.model.logits([item.ids for item in batch], self.adapters, prompt_tokens)
        found = []
        for item, row in zip(batch, logits, strict=True):
            behind = row[len(item.prompt) - 1 :]
            highest = behind.max(axis=1, keepdims=True)
            known = behind - highest - np.log(np.exp(behind - highest).sum(axis=1, keepdims=True))
            shared = sum(float(known[i, token]) for i, token in enumerate(item.shared))
            found.append([shared + float(known[-1, token]) for token in item.last])
        return found

    def generate(self, batch: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """See `evaluation.Decoder`."""
        return self.model.generate_tokens(batch, self.adapters, max_tokens)


@dataclass(frozen=True)
class OnnxClassifier:
    """An exported encoder with one loaded adapter."""

    model: SteeredEncoder
    adapter: str
    scale: float

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.adapters[self.adapter].labels

    def probabilities(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """See `evaluation.Classifier`."""
        return [found.probabilities for found in self.model.classify(texts, self.adapter, self.scale)]
