"""Checking an exported encoder against the PyTorch model it was made from, before anybody runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reft_edge.export.checks import (
    TOLERANCE,
    all_at_once,
    largest_difference,
    off_ports,
    off_pytorch,
    random_adapters,
)
from reft_edge.export.recipe import GRAPH, PLAIN
from reft_edge.model.encoders import has_token_types
from reft_edge.model.manifest import Manifest
from reft_edge.model.texts import Tokens
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.encoder import EncoderSession, Floats
from reft_edge.steering.hooks import steered


@dataclass(frozen=True)
class EncoderVerification:
    """Figures of one export; hidden states are compared at every token of a few texts."""

    base_error: float
    """max |ONNX Runtime − PyTorch| of the last block's output, without an adapter."""
    steered_error: float
    """The same with a random LoReFT adapter active at every port."""
    effect: float
    """max |with − without that adapter| in PyTorch: what the error is to be seen against."""
    batch_error: float
    """max |in a padded batch − alone| of the same rows with that adapter, in ONNX Runtime."""
    rank0_bitwise: bool
    """Whether the graph with unused ports equals the graph before ports, bit for bit, both run as they are written.

    ONNX Runtime's fusions differ where there is a port; what that changes is within `base_error`.
    """

    def failures(self) -> list[str]:
        """What is off, in words; empty if the export can be trusted."""
        found = off_ports(self.rank0_bitwise)
        found += off_pytorch("hidden states", max(self.base_error, self.steered_error))
        if not self.batch_error <= TOLERANCE:
            found.append(f"rows in a batch differ from rows alone by {self.batch_error:.2g}")
        return found


@dataclass(frozen=True)
class HiddenStates:
    """The last block's output for the same rows from the graphs of one export, `[tokens, d]` a row."""

    shipped: list[Floats]
    """The graph with ports, no adapter bound."""
    alone: list[Floats]
    """With a random adapter at every port."""
    together: list[Floats]
    """The same, of all rows in one padded batch."""
    rank0_bitwise: bool
    """Whether unused ports change no bit, each node run as it is written."""


def run_graphs(folder: Path, manifest: Manifest, rows: Sequence[Tokens]) -> HiddenStates:
    """Run `rows` through the graph with ports and the one without."""
    ports = port_inputs(all_at_once(random_adapters(manifest)), manifest, np.dtype(np.float32))
    graph = EncoderSession(folder / GRAPH, "cpu")
    written, without = (EncoderSession(folder / name, "cpu", fuse=False) for name in (GRAPH, PLAIN))
    same = [
        np.array_equal(written.hidden_states([row], {})[0], without.hidden_states([row], {})[0])
        for row in rows
    ]
    return HiddenStates(
        shipped=[graph.hidden_states([row], {})[0] for row in rows],
        alone=[graph.hidden_states([row], ports)[0] for row in rows],
        together=graph.hidden_states(rows, ports),
        rank0_bitwise=all(same),
    )


def compare(
    said: HiddenStates, manifest: Manifest, encoder: Any, rows: Sequence[Tokens]
) -> EncoderVerification:
    """Hold what the graphs gave against the PyTorch encoder."""
    base = [torch_hidden_states(encoder, row) for row in rows]
    with steered(encoder, *((part, 1.0) for part in random_adapters(manifest))):
        steered_base = [torch_hidden_states(encoder, row) for row in rows]
    return EncoderVerification(
        base_error=largest_difference(said.shipped, base),
        steered_error=largest_difference(said.alone, steered_base),
        effect=largest_difference(steered_base, base),
        batch_error=largest_difference(said.together, said.alone),
        rank0_bitwise=said.rank0_bitwise,
    )


@torch.no_grad()
def torch_hidden_states(encoder: Any, row: Tokens) -> Floats:
    """PyTorch's last hidden states for one row, `[tokens, d]`."""
    ids = torch.tensor([row.ids])
    types = {"token_type_ids": torch.tensor([row.types])} if has_token_types(encoder) else {}
    output = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), **types)
    hidden: Floats = output.last_hidden_state[0].numpy()
    return hidden
