"""A model's weights read one at a time: the same model, the same fingerprint, and never the whole of it in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reft_edge.errors import ReftEdgeError
from reft_edge.export import export_model
from reft_edge.model import checkpoint
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.checkpoint import Checkpoint, Whole, open_model
from reft_edge.model.exported_weights import GraphWeights
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.source import ModelFolder
from tests.helpers.tiny import make_model

ROW = torch.tensor([[5, 17, 33, 4, 90, 211, 8]])


def make(folder, *choices, **changes):
    return ModelFolder(make_model(folder / "hf", *choices, **changes), "tiny")


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_it_is_the_model_that_is_loaded_whole(tmp_path, architecture):
    folder = make(tmp_path, architecture)
    found, whole = open_model(folder), load_model(folder)
    assert isinstance(found, Checkpoint)
    assert fingerprint(found) == found.base_fingerprint == fingerprint(whole)
    with found.filled() as model:
        assert torch.equal(model(input_ids=ROW).logits, whole(input_ids=ROW).logits)
    assert fingerprint(found) == fingerprint(whole)


@torch.no_grad()
def test_one_block_has_weights_at_a_time(tmp_path):
    found = open_model(make(tmp_path))
    blocks = decoder_layers(found.model)
    held = []

    def note(*_):
        held.append([number for number, block in enumerate(blocks) if not is_empty(block)])

    with found.filled() as model:
        for block in blocks:
            block.mlp.register_forward_hook(note)
        model(input_ids=ROW)
    assert held == [[0], [1], [2]]
    assert is_empty(found.model)


def is_empty(module: nn.Module) -> bool:
    return all(parameter.device.type == "meta" for parameter in module.parameters())


@torch.no_grad()
def test_bfloat16_is_widened_and_changes_are_seen(tmp_path):
    folder = make(tmp_path)
    file = folder.path / "model.safetensors"
    save_file({name: stored.bfloat16() for name, stored in load_file(file).items()}, file, {"format": "pt"})
    found, names = open_model(folder), []

    def change(name, values, first):
        assert values.dtype == torch.float32
        names.append(name)
        if name == "model.norm.weight":
            values.zero_()

    with found.filled(change) as model:
        assert not model(input_ids=ROW).logits.any()
    assert set(names) == dict(found.model.named_parameters(remove_duplicate=False)).keys()


@pytest.mark.parametrize("choice", ["gemma3_text", "phi"])
@torch.no_grad()
def test_tables_and_heads_are_read_some_rows_at_a_time(tmp_path, monkeypatch, choice):
    """gemma3_text: tied, and scaled; phi: a head of its own, with a bias."""
    folder = make(tmp_path, choice)
    found, whole = open_model(folder), load_model(folder)
    table = whole.get_input_embeddings().weight
    monkeypatch.setattr(checkpoint, "_AT_ONCE", 50 * table.shape[1])
    pieces = {}

    def change(name, values, first):
        pieces.setdefault(name, []).append((first, values.clone()))

    with found.filled(change) as model:
        logits = model(input_ids=ROW).logits
    assert (logits - whole(input_ids=ROW).logits).abs().max() <= 1e-5 * logits.abs().max()
    assert is_empty(found.model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert [first for first, _ in pieces[name]] == [*range(0, len(table), 50)]
        assert torch.equal(torch.cat([values for _, values in pieces[name]]), whole.get_parameter(name))


@torch.no_grad()
def test_a_graphs_rows_are_given_a_few_at_a_time(tmp_path):
    folder = make(tmp_path, hidden_size=128)
    export_model(folder, tmp_path / "e", "int4")
    at_once, in_pieces = load_model(folder), load_model(folder)
    expected, found = (GraphWeights(model, tmp_path / "e/model.onnx") for model in (at_once, in_pieces))
    for name, parameter in at_once.named_parameters():
        expected.change(name, parameter.data, 0)
        other = in_pieces.get_parameter(name).data
        for first in range(0, len(other), 7):
            found.change(name, other[first : first + 7], first)
        assert torch.equal(other, parameter.data), name
    assert found.largest_change == pytest.approx(expected.largest_change)


def test_other_names_than_the_model_has_are_left_to_transformers(tmp_path):
    folder = make(tmp_path)
    expected = fingerprint(load_model(folder))
    file = folder.path / "model.safetensors"
    bare = {name.removeprefix("model."): stored for name, stored in load_file(file).items()}
    save_file(bare, file, {"format": "pt"})
    found = open_model(folder)
    assert isinstance(found, Whole)
    assert fingerprint(found) == expected


def test_a_broken_file_is_named(tmp_path):
    folder = make(tmp_path)
    (folder.path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ReftEdgeError, match=r"cannot load tiny: model\.safetensors: "):
        open_model(folder)
