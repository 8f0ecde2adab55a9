"""Exporting an encoder: PyTorch's own ONNX exporter, with a port after every block."""

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.export.check_encoder import EncoderVerification, HiddenStates, compare, run_graphs
from reft_edge.export.checks import TEXTS
from reft_edge.export.recipe import GRAPH, PLAIN, Places, Report, export_graph
from reft_edge.export.residual import Site, Use
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.encoders import context_length, has_token_types, load_encoder, read_config
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model_prompts
from reft_edge.model.manifest import Manifest, package_versions
from reft_edge.model.places import Place, parse_layers
from reft_edge.model.source import ModelFolder
from reft_edge.model.texts import TextTokens, Tokens

_OUTPUT = "last_hidden_state"


class _Blocks(nn.Module):
    """The encoder as a function of its graph inputs to every block's output."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **types
        )
        return tuple(output.hidden_states[1:])


def export_encoder(
    model: ModelFolder,
    output: Path,
    precision: str,
    layers: str,
    report: Report,
    port_kinds: tuple[str, ...] = ("affine",),
) -> Manifest:
    """Export an encoder to the folder `output`, as `export_model` says.

    Raises ReftEdgeError if the model cannot be built, ported or verified, or for a precision other than fp32.
    """
    if precision != "fp32":
        raise ReftEdgeError(f"encoders are exported in fp32 only, not {precision}")
    length = context_length(read_config(model))
    report("loading the PyTorch model")
    encoder = load_encoder(model)
    chosen = parse_layers(layers, len(decoder_layers(encoder)))
    tokenizer = load_model_prompts(model).tokenizer

    def build(folder: Path) -> _Encoder:
        report("building the frozen graph")
        graph = build_encoder(encoder)
        blocks = keep_last_output(graph.graph)
        ir.save(graph, folder / PLAIN, external_data=f"{GRAPH}.data")
        tokenizer.save(str(folder / "tokenizer.json"))
        tokens = TextTokens.of(tokenizer, length)
        manifest = replace(_describe(model, encoder, length), layers=chosen, port_kinds=port_kinds)
        return _Encoder(encoder, manifest, blocks, [tokens(text) for text in (*TEXTS, TEXTS[:2])])

    return export_graph(output, build, report)[1]


@dataclass(frozen=True)
class _Encoder:
    """A graph of PyTorch's exporter; see `recipe.Draft`."""

    encoder: Any
    manifest: Manifest
    blocks: Sequence[str]
    """The value in the graph that is each block's output."""
    rows: Sequence[Tokens]
    """What the graphs are run on."""

    def place(self, graph: ir.Graph) -> Places:
        return Places(block_sites(graph, self.blocks, self.manifest.layers), ir.DataType.FLOAT)

    def run(self, folder: Path, manifest: Manifest) -> HiddenStates:
        return run_graphs(folder, manifest, self.rows)

    def load(self, report: Report) -> tuple[Any, str]:
        return self.encoder, fingerprint(self.encoder)

    def compare(
        self, said: HiddenStates, folder: Path, manifest: Manifest, model: Any
    ) -> EncoderVerification:
        return compare(said, manifest, model, self.rows)


def _describe(model: ModelFolder, encoder: Any, length: int) -> Manifest:
    return Manifest(
        base_name=model.name,
        base_fingerprint="",
        architecture=type(encoder).__name__,
        precision="fp32",
        hidden_size=encoder.config.hidden_size,
        num_layers=len(decoder_layers(encoder)),
        layers=(),
        head_size=encoder.config.hidden_size // encoder.config.num_attention_heads,
        context_length=length,
        eos_token_ids=(),
        ports={},
        versions=package_versions(
            "reft-edge", "onnxruntime", "onnxscript", "onnx-ir", "torch", "transformers"
        ),
        kind="encoder",
    )


def build_encoder(encoder: Any) -> ir.Model:
    """The encoder as an ONNX graph whose outputs are the blocks'; batch and sequence are free.

    Raises ReftEdgeError if PyTorch cannot export it.
    """
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if has_token_types(encoder) else [])
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Blocks(encoder).eval(),
                tuple(torch.ones(2, 7, dtype=torch.long) for _ in names),
                dynamo=True,
                verbose=False,
                input_names=names,
                dynamic_shapes=tuple(free for _ in names),
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the exporter raises many kinds
        raise ReftEdgeError(
            f"PyTorch could not export {type(encoder).__name__}: {str(error).splitlines()[0]}"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    return model


def keep_last_output(graph: ir.Graph) -> list[str]:
    """Leave the last block's output as the graph's only one, in place; the names of the values that are blocks' outputs.

    The output becomes a copy of the block's, so that a port has a reader to give the edited value to.
    """
    blocks = [_origin(value) for value in graph.outputs]
    copy = ir.node("Identity", [blocks[-1]], outputs=[ir.Value(name=_OUTPUT)], name="/output/Identity")
    blocks[-1].name = "/output/block"
    copy.outputs[0].type, copy.outputs[0].shape = blocks[-1].type, blocks[-1].shape
    graph.outputs.clear()
    graph.append(copy)
    graph.outputs.append(copy.outputs[0])
    for node in reversed(list(graph)):
        if node is not copy and not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    return [str(block.name) for block in blocks]


def block_sites(graph: ir.Graph, blocks: Sequence[str], layers: Sequence[int]) -> list[Site]:
    """Where `layers` get their ports; `blocks` names every block's output."""
    values = {value.name: value for node in graph for value in node.outputs}
    return [
        Site(Place(layer), tuple(Use(use.node, use.idx) for use in values[blocks[layer]].uses()))
        for layer in layers
    ]


def _origin(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type == "Identity":
        source = node.inputs[0]
        assert source is not None
        value = source
    return value
