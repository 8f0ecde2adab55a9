"""A GGUF converted block by block holds what transformers makes of the whole file."""

import json
from contextlib import redirect_stderr
from io import StringIO

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from reft_edge.errors import ReftEdgeError
from reft_edge.model import gguf_conversion
from reft_edge.model.checkpoint import open_model
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.gguf_conversion import write_model
from reft_edge.model.gguf_header import MAX_GGUF_HEADER, read_gguf_header
from reft_edge.model.gguf_pieces import piece_of_block, piece_with_first, write_piece
from reft_edge.model.source import ModelFolder
from tests.helpers.any_gguf import BLOCKS, write_any_gguf

BY_BLOCKS = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "gpt2", "nemotron", "stablelm", "lfm2",
    "qwen3moe",
)  # fmt: skip
ALWAYS_TIED = ("gemma2", "starcoder2", "lfm2")


def stored(folder):
    """Each tensor of a folder, by its name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def converted(path, folder):
    folder.mkdir()
    write_model(path, read_gguf_header(path, MAX_GGUF_HEADER), folder)
    return folder


def whole(path, folder):
    """What the model is when transformers reads the file at once, saved."""
    with redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=str(path), dtype=torch.float32, local_files_only=True
        )
    known = fingerprint(model)
    gguf_conversion._save(model, folder, model.state_dict())
    return known


@pytest.mark.parametrize(
    ("architecture", "untied"),
    [(name, False) for name in BY_BLOCKS] + [(name, True) for name in BY_BLOCKS if name not in ALWAYS_TIED],
)
def test_a_model_is_what_transformers_makes_of_the_whole_file(tmp_path, monkeypatch, architecture, untied):
    path = tmp_path / "model.gguf"
    write_any_gguf(path, architecture, untied=untied)
    known = whole(path, tmp_path / "expected")
    monkeypatch.setattr(gguf_conversion, "_write_whole", lambda *arguments: pytest.fail("it was read whole"))
    folder = converted(path, tmp_path / "found")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads(
            (tmp_path / "expected" / name).read_text()
        )
    found, expected = stored(folder), stored(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert open_model(ModelFolder(folder, "tiny")).base_fingerprint == known


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "F16", "BF16"])
def test_tables_of_every_kind_are_dequantised_some_rows_at_a_time(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(gguf_conversion, "_AT_ONCE", 64 * 7)
    path = tmp_path / "model.gguf"
    write_any_gguf(path, "llama", kind, untied=True)
    whole(path, tmp_path / "expected")
    found, expected = stored(converted(path, tmp_path / "found")), stored(tmp_path / "expected")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], expected[name])


def test_a_model_whose_blocks_cannot_be_read_alone_is_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_any_gguf(path, "gemma3")
    whole(path, tmp_path / "expected")
    plain = gguf_conversion.piece_of_block

    def last_is_broken(header, block):
        piece = plain(header, block)
        if block == BLOCKS - 1:
            del piece.tensors["blk.0.ffn_up.weight"]
        return piece

    monkeypatch.setattr(gguf_conversion, "piece_of_block", last_is_broken)
    folder = converted(path, tmp_path / "found")
    assert [part.name for part in folder.glob("*.safetensors*")] == ["model.safetensors"]
    found, expected = stored(folder), stored(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_without_some_of_its_weights_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_any_gguf(path, "llama", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(
        ReftEdgeError, match=r"lacks 1 of its weights, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        converted(path, tmp_path / "found")


def test_a_piece_is_a_file_that_the_library_reads(tmp_path):
    path = tmp_path / "model.gguf"
    write_any_gguf(path, "lfm2")
    header = read_gguf_header(path, MAX_GGUF_HEADER)
    original = {part.name: part for part in gguf.GGUFReader(path).tensors}
    for block, piece in ((1, piece_of_block(header, 1)), (0, piece_with_first(header, 8))):
        write_piece(path, header, piece, tmp_path / "piece.gguf")
        read = gguf.GGUFReader(tmp_path / "piece.gguf")
        assert read.fields["lfm2.block_count"].contents() == 1
        assert read.fields["lfm2.attention.head_count_kv"].contents() == [[0, 2, 0][block]]
        assert read.fields["general.name"].contents() == "tiny lfm2"
        for part in read.tensors:
            whole_part = original[part.name.replace("blk.0.", f"blk.{block}.")]
            rows = len(part.data)
            assert rows == (8 if part.name == "token_embd.weight" else len(whole_part.data))
            assert np.array_equal(part.data, whole_part.data[:rows])
