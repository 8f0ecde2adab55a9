"""A model's weights read one at a time: the same model, the same fingerprint, and never the whole of it in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.checkpoint import Checkpoint, Whole, open_model
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

    def change(name, values):
        assert values.dtype == torch.float32
        names.append(name)
        if name == "model.norm.weight":
            values.zero_()

    with found.filled(change) as model:
        assert not model(input_ids=ROW).logits.any()
    assert set(names) == dict(found.model.named_parameters(remove_duplicate=False)).keys()


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
