"""How like two texts are: the cosine of their sentence vectors by all-MiniLM-L6-v2, with no judge model of size at hand."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from minilm import packaged_minilm
from sst2_encoder import pooled_vectors

from reft_edge.model.encoders import default_pooling, load_encoder, load_text_tokens
from reft_edge.model.source import resolve_model
from reft_edge.model.texts import TextTokens


def likeness(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Of each text to its reference, -1 to 1."""
    encoder, tokens, pooling = _encoder(packaged_minilm())
    one, other = (
        pooled_vectors(encoder, [tokens(text) for text in found], pooling) for found in (texts, references)
    )
    cosines: list[float] = torch.nn.functional.cosine_similarity(one, other).tolist()
    return cosines


@cache
def _encoder(folder: str) -> tuple[Any, TextTokens, str]:
    model = resolve_model(folder)
    return load_encoder(model), load_text_tokens(model), default_pooling(model)
