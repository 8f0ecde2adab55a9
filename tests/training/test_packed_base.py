"""A base whose matrices stay as an exported folder, or a checkpoint, has them: the same losses as of a float32 copy."""

import copy

import pytest
import torch

from reft_edge.errors import ReftEdgeError
from reft_edge.export import Quantisation, export_model
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.loading import load_model
from reft_edge.model.packed import PackedEmbedding, PackedLinear, count_parameters
from reft_edge.model.packed_base import load_exported, load_halved, use_exported_weights
from reft_edge.model.source import ModelFolder, resolve_model
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.description import adapter_config
from reft_edge.training.frozen_base import checkpointed, frozen
from reft_edge.training.objectives import batch_loss
from reft_edge.training.settings import TrainSettings
from reft_edge.training.turns import Example
from tests.helpers.tiny import make_model
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.torch_reference import take_graph_weights

CPU = torch.device("cpu")
ROWS = [
    Example((5, 17, 33, 4, 90, 211, 8), (7, 9, 12)),
    Example((300, 2, 2, 64), (1,)),
    Example((11, 12, 13, 14, 15, 16), (17, 18, 19, 20, 21)),
]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def loss_and_gradients(model, autocast=False, **changes):
    """Of the rows at the start of a training, all layers edited."""
    settings = TrainSettings(positions="f3+l3+gen", rank=2, **changes)
    interventions = Interventions(adapter_config(model, "tiny", settings), seed=3)
    with frozen(model, autocast), steered(model, (interventions, 1.0)) as steering:
        loss = batch_loss(model, steering, ROWS, CPU, autocast)
        loss.backward()
    return float(loss.detach()), {name: value.grad for name, value in interventions.named_parameters()}


def assert_same(found, expected, rtol=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-3, atol=rtol * float(gradient.abs().max())
        )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """`llama(tied)`: a tiny model's folder."""
    folder = tmp_path_factory.mktemp("base")
    return {tied: make_model(folder / str(tied), tie_word_embeddings=tied, **WIDE) for tied in (True, False)}


def gguf_source(folder, model, patch):
    file = folder / "tiny.gguf"
    kinds = {"token_embd.weight": "Q5_1", "output.weight": "Q4_K"}
    turns = ["Q4_K", "Q8_0", "Q6_K", "Q5_0", "F16"]

    def choose(name):
        return kinds.setdefault(name, turns[len(kinds) % len(turns)])

    write_gguf(file, model, choose)
    patch.setenv("REFT_EDGE_CACHE", str(folder / "cache"))
    return resolve_model(str(file))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("how", ["int4", "int8", "fp16", "fp32", "gguf"])
def test_losses_are_those_of_a_float32_copy(llama, tmp_path, monkeypatch, how, tied):
    source = ModelFolder(llama[tied], "tiny")
    if how == "gguf":
        source = gguf_source(tmp_path, load_model(source), monkeypatch)
    exported = tmp_path / "exported"
    quantisation = Quantisation("gguf" if how == "gguf" else "auto", accuracy_level=1)
    export_model(source, exported, "int4" if how == "gguf" else how, quantisation=quantisation)
    packed, plain = load_exported(source, exported), load_model(source)
    stored = fingerprint(plain)
    assert_same(loss_and_gradients(packed), loss_and_gradients(take_graph_weights(plain, exported)))
    assert fingerprint(packed) == stored
    assert count_parameters(packed) == plain.num_parameters() or not tied
    if how != "fp32":
        assert isinstance(packed.lm_head, PackedLinear)
        assert isinstance(packed.model.embed_tokens, PackedEmbedding)
        assert all(parameter.ndim == 1 for parameter in packed.parameters())


@pytest.mark.parametrize("architecture", ["phi3", "gemma3_text", "qwen2"])
def test_fused_scaled_and_biased_layers(tmp_path, architecture):
    """Rows of one product in several layers and the other way around; embeddings that scale; biases."""
    source = ModelFolder(make_model(tmp_path / "hf", architecture), "tiny")
    exported = tmp_path / "exported"
    export_model(source, exported, "int4", quantisation=Quantisation("rtn", accuracy_level=1))
    expected = loss_and_gradients(take_graph_weights(load_model(source), exported))
    assert_same(loss_and_gradients(load_exported(source, exported)), expected)
    loaded = load_model(source)
    use_exported_weights(loaded, exported, fingerprint(loaded))
    assert_same(loss_and_gradients(loaded), expected)


def test_blocks_that_compute_again(llama, tmp_path):
    source, exported = ModelFolder(llama[True], "tiny"), tmp_path / "exported"
    export_model(source, exported, "int4", quantisation=Quantisation("rtn"))
    model = load_exported(source, exported)
    expected = loss_and_gradients(model)
    with checkpointed(model):
        assert_same(loss_and_gradients(model), expected)


def test_a_model_takes_the_weights_of_one_folder(llama, tmp_path):
    source = ModelFolder(llama[True], "tiny")
    for name in ("one", "other"):
        export_model(source, tmp_path / name, "int4", quantisation=Quantisation("rtn"))
    model = load_exported(source, tmp_path / "one")
    kept = loss_and_gradients(model)
    use_exported_weights(model, tmp_path / "one", fingerprint(model))
    assert_same(loss_and_gradients(model), kept)
    with pytest.raises(ReftEdgeError, match=r"was given the weights of .*one already; load it again"):
        use_exported_weights(model, tmp_path / "other", fingerprint(model))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_has_the_losses_of_one_rounded_later(llama, tmp_path, stored, tied):
    model = load_model(ModelFolder(llama[tied], "tiny"))
    expected = copy.deepcopy(model).to(stored)
    expected.save_pretrained(tmp_path / "stored")
    source = ModelFolder(tmp_path / "stored", "tiny")
    halved, plain = load_halved(source), load_model(source)
    assert fingerprint(halved) == fingerprint(plain)
    assert loss_and_gradients(halved, autocast=True)[0] == loss_and_gradients(plain, autocast=True)[0]
    wide = [
        name for name, value in halved.named_parameters() if value.ndim > 1 and value.dtype == torch.float32
    ]
    assert wide == ([] if stored != torch.float32 else wide)
    if stored == torch.float32:
        assert all("embed" in name or "lm_head" in name for name in wide)


def test_an_unknown_token_is_refused_as_before(llama, tmp_path):
    source, exported = ModelFolder(llama[True], "tiny"), tmp_path / "exported"
    export_model(source, exported, "int4", quantisation=Quantisation("rtn"))
    model = load_exported(source, exported)
    with pytest.raises(IndexError), torch.no_grad():
        model(input_ids=torch.tensor([[5, 320]]))
