"""AdapterHub's ReFT adapters: its folders are written here as `adapters` 1.3.0 writes them, its units computed as its own code does."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from reft_edge.adapter.algebra import apply
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import load_adapter
from reft_edge.adapter.linear import fold
from reft_edge.cli import app
from reft_edge.convert.formats import Given, convert
from reft_edge.convert.from_adapterhub import from_adapterhub, is_adapterhub
from reft_edge.convert.from_pyreft import Asked
from reft_edge.errors import ReftEdgeError
from reft_edge.model.loading import load_model
from reft_edge.model.places import Place
from reft_edge.model.source import ModelFolder
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions

D, LAYERS, RANK = 12, 3, 2
BASE = Base("tiny", "0" * 16, D, LAYERS)
ASKED = Asked(raw=True)


class Unit(torch.nn.Module):
    """`ReftUnit` of methods/reft.py."""

    def __init__(self, orthogonal: bool, subtract: bool, size: int = D) -> None:
        super().__init__()
        self.learned_source = torch.nn.Linear(size, RANK)
        projection = torch.nn.Linear(size, RANK, bias=False)
        self.projection = torch.nn.utils.parametrizations.orthogonal(projection) if orthogonal else projection
        if orthogonal:
            with torch.no_grad():  # off the chart's origin, as training moves it
                original = projection.parametrizations.weight.original
                original += torch.randn_like(original).triu(1)
        self.subtract = subtract

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source = self.learned_source(x)
        if self.subtract:
            source = source - self.projection(x)
        return x + source @ self.projection.weight


CONFIG = {
    "architecture": "reft", "dropout": 0.05, "dtype": None, "init_weights_seed": None, "layers": "all", "non_linearity": None,
    "orthogonality": True, "output_reft": True, "prefix_positions": 3, "r": RANK, "suffix_positions": 0, "tied_weights": False,
}  # fmt: skip


def write(
    folder: Path, subtract: bool = True, plain: bool = False, layers=range(LAYERS), size: int = D, **changes
) -> dict[tuple[int, int], Unit]:
    torch.manual_seed(0)
    config = CONFIG | changes | ({} if isinstance(layers, range) else {"layers": list(layers)})
    units = {
        (layer, unit): Unit(config["orthogonality"], subtract, size)
        for layer in layers
        for unit in range(1 if config["tied_weights"] else 2)
    }
    state = {
        f"model.layers.{layer}.reft_layer.refts.lo.units.{unit}.{name}": tensor.contiguous()
        for (layer, unit), module in units.items()
        for name, tensor in module.state_dict().items()
    }
    folder.mkdir(parents=True)
    described = {
        "config": config,
        "hidden_size": size,
        "model_type": "llama",
        "name": "lo",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    if plain:
        save_file(state, folder / "adapter.safetensors")
    else:
        torch.save(state, folder / "pytorch_adapter.bin")
    return units


def edited(adapter: Adapter, layer: int, h: np.ndarray) -> np.ndarray:
    return apply(fold(adapter), Place(layer), h, np.arange(len(h)), len(h))


KINDS = {
    "LoReft": ({}, None, "loreft"),
    "LoReft with an end": ({"suffix_positions": 2}, None, "loreft"),
    "only an end": ({"prefix_positions": 0, "suffix_positions": 2}, None, "loreft"),
    "tied": ({"suffix_positions": 2, "tied_weights": True}, None, "loreft"),
    "NoReft": ({"orthogonality": False, "suffix_positions": 1}, "noreft", "noreft"),
    "DiReft": ({"orthogonality": False, "subtract": False}, "nodireft", "nodireft"),
    "safetensors": ({"plain": True}, None, "loreft"),
    "some layers": ({"layers": [0, 2]}, None, "loreft"),
}


@pytest.mark.parametrize("name", KINDS)
def test_its_units_are_carried(tmp_path, name):
    changes, given, kind = KINDS[name]
    units = write(tmp_path / "ad", **changes)
    notes: list[str] = []
    adapter = from_adapterhub(
        tmp_path / "ad", lambda: BASE, Asked(raw=True, intervention=given), notes.append
    )
    config = CONFIG | changes
    first, last, tied = config["prefix_positions"], config["suffix_positions"], config["tied_weights"]
    assert adapter.config.intervention == kind
    assert adapter.config.positions == "+".join([f"f{first}"] * (first > 0) + [f"l{last}"] * (last > 0))
    assert adapter.config.layers == tuple(sorted({layer for layer, _ in units}))
    assert "generated token" in notes[0]
    h = torch.randn(10, D)
    for layer in adapter.config.layers:
        expected = h.clone()
        with torch.no_grad():
            expected[:first] = units[layer, 0](h[:first])
            if last:
                expected[-last:] = units[layer, 0 if tied else 1](h[-last:])
        np.testing.assert_allclose(edited(adapter, layer, h.numpy()), expected.numpy(), atol=1e-5)


def test_the_command_and_a_model(device_folder, tmp_path, tiny_model):
    units = write(tmp_path / "ad", size=64, non_linearity="leakyrelu", suffix_positions=2)
    (tmp_path / "ad/pytorch_model_head.bin").write_bytes(b"not looked at")
    out = tmp_path / "x.safetensors"
    arguments = [
        "convert",
        str(tmp_path / "ad"),
        "--model",
        str(device_folder / "hf"),
        "--raw",
        "-o",
        str(out),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    adapter = load_adapter(out)
    assert adapter.config.act_fn == "leaky_relu"
    model = load_model(ModelFolder(device_folder / "hf", "tiny"))
    ids = torch.arange(12)[None] + 5

    def hook(layer: int):
        def edit(module, args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for unit, part in ((0, slice(0, 3)), (1, slice(-2, None))):
                x, module_of = hidden[:, part], units[layer, unit]
                source = torch.nn.functional.leaky_relu(module_of.learned_source(x)) - module_of.projection(x)
                hidden[:, part] = x + source @ module_of.projection.weight
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return edit

    with torch.no_grad():
        with steered(model, (Interventions.from_adapter(adapter), 1.0)):
            found = model(input_ids=ids).logits
        handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(model.model.layers)]
        expected = model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        assert (expected - model(input_ids=ids).logits).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_generated_tokens_are_edited_where_asked(tmp_path):
    units = write(tmp_path / "ad")
    notes: list[str] = []
    from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED, notes.append)
    assert "give --positions f3+gen for that" in notes[0]
    asked = Asked("f3+gen", raw=True)
    adapter = from_adapterhub(tmp_path / "ad", lambda: BASE, asked, notes.append)
    assert (adapter.config.positions, adapter.config.tied) == ("f3+gen", True)
    h = torch.randn(10, D)
    expected = h.clone()
    with torch.no_grad():
        for part in (slice(0, 3), slice(7, 10)):
            expected[part] = units[0, 0](h[part])
    found = apply(fold(adapter), Place(0), h.numpy(), np.arange(10), 7)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_with_a_suffix_the_library_cannot_decode_with_a_cache(tmp_path):
    write(tmp_path / "ad", suffix_positions=2)
    notes: list[str] = []
    from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED, notes.append)
    assert "cannot generate where there are suffix positions" in notes[0]
    with pytest.raises(ReftEdgeError, match=r"--positions is f3\+gen, but .* says f3\+l2"):
        from_adapterhub(tmp_path / "ad", lambda: BASE, Asked("f3+gen", raw=True))


def test_the_file_that_the_library_reads_is_read(tmp_path):
    units = write(tmp_path / "ad")
    (tmp_path / "ad/adapter.safetensors").write_bytes(b"another adapter, or none")
    notes: list[str] = []
    adapter = from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED, notes.append)
    assert notes[1].startswith("pytorch_adapter.bin is read")
    np.testing.assert_array_equal(adapter.tensors["W"][0, 0], units[0, 0].learned_source.weight.detach())


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("adapter_fusion_config.json", "is a fusion of adapters"),
        ("adapter_config.json", "but neither pytorch_adapter.bin nor adapter.safetensors .* of PEFT cannot"),
        ("pytorch_adapter.bin", "has pytorch_adapter.bin but no adapter_config.json; expected both"),
        ("notes.txt", r"give one of them, such as .*/all/lo$"),
    ],
)
def test_folders_that_are_not_one_adapter_are_refused(tmp_path, beside, message):
    write(tmp_path / "all/lo")
    (tmp_path / "all" / beside).write_text("{}")
    with pytest.raises(ReftEdgeError, match=message):
        convert(str(tmp_path / "all"), tmp_path / "x.safetensors", Given(raw=True))


@pytest.mark.parametrize(
    ("size", "message"),
    [("12", "hidden_size is '12'; expected a whole number"), (13, "of size 13; tiny has 12")],
)
def test_another_hidden_size_is_refused(tmp_path, size, message):
    write(tmp_path / "ad")
    path = tmp_path / "ad/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": size}))
    with pytest.raises(ReftEdgeError, match=message):
        from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)


def test_a_missing_tensor_and_a_link_out_of_the_folder_are_refused(tmp_path):
    write(tmp_path / "ad")
    weights = tmp_path / "ad/pytorch_adapter.bin"
    state = torch.load(weights, weights_only=True)
    missing = next(name for name in state if name.endswith("learned_source.bias"))
    torch.save({name: tensor for name, tensor in state.items() if name != missing}, weights)
    with pytest.raises(ReftEdgeError, match=r"a loreft unit has tensors .* expected .*learned_source\.bias"):
        from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)
    weights.rename(tmp_path / "elsewhere.bin")
    weights.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ReftEdgeError, match="it is a link"):
        from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)


def test_an_encoder_is_a_base(device_folder, tmp_path):
    write(tmp_path / "ad", size=64)
    given = Given(model=str(device_folder / "encoder-hf"), raw=True)
    done = convert(str(tmp_path / "ad"), tmp_path / "x.safetensors", given)
    assert (done.source, done.adapter.config.num_layers) == ("adapterhub", LAYERS)


BAD = {
    "lora": ({"architecture": "lora"}, ASKED, "of the kind 'lora'"),
    "no positions": ({"prefix_positions": 0}, ASKED, "changes nothing"),
    "a union of configs": ({"architecture": "union"}, ASKED, "of the kind 'union'"),
    "another rank": ({}, ASKED, "expected {"),
    "rank": ({"r": "4"}, ASKED, "r is '4'"),
    "huge rank": ({"r": 10**9}, ASKED, "expected a whole number from 1"),
    "rank of all": ({"r": D}, ASKED, "less than the hidden size"),
    "positions differ": ({}, Asked("f4", raw=True), "--positions is f4, but .* says f3"),
    "act_fn differs": ({}, Asked(act_fn="relu", raw=True), "--act-fn is relu, but .* says linear"),
    "an unknown act_fn": ({"non_linearity": "nothing"}, ASKED, "unknown act_fn"),
    "no prompt format": ({}, Asked(), "--chat .* or --raw"),
    "no intervention": ({"orthogonality": False}, ASKED, "give --intervention noreft"),
    "another intervention": ({}, Asked(raw=True, intervention="noreft"), "loreft or direft"),
    "layers differ": ({"layers": [0]}, ASKED, r"holds layers \[0, 1, 2\]"),
    "layers of a kind": ({"layers": {"a": 1}}, ASKED, "holds layers"),
    "tied differs": ({"tied_weights": True}, ASKED, "does not have the units"),
    "other outputs": ({"output_reft": False}, ASKED, "output_reft"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path, name):
    changes, asked, message = BAD[name]
    write(tmp_path / "ad", orthogonality=changes.get("orthogonality", True))
    path = tmp_path / "ad/adapter_config.json"
    described = json.loads(path.read_text())
    described["config"] |= changes if name != "another rank" else {"r": RANK + 1}
    path.write_text(json.dumps(described))
    with pytest.raises(ReftEdgeError, match=message):
        from_adapterhub(tmp_path / "ad", lambda: BASE, asked)


def test_damaged_folders_are_refused(tmp_path):
    write(tmp_path / "ad")
    path = tmp_path / "ad/adapter_config.json"
    good = path.read_text()
    for content, message in (
        ("[" * 100_000, "too deeply"),
        ("[]", "not a JSON object"),
        ('{"config": 3}', "kind"),
    ):
        path.write_text(content)
        with pytest.raises(ReftEdgeError, match=message):
            from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)
    path.write_text("\ufeff" + good)
    from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)
    weights = tmp_path / "ad/pytorch_adapter.bin"
    state = torch.load(weights, weights_only=True)
    for changed, message in (
        (state | {"model.layers.0.other": torch.zeros(1)}, "which no ReFT adapter"),
        (state | {next(iter(state)): torch.full((RANK, D), float("nan"))}, "NaN"),
        ({name.replace("layers.2", "layers.7"): tensor for name, tensor in state.items()}, "edits layer 7"),
        (state | {f"x.{name}": tensor for name, tensor in state.items()}, "2 adapters"),
        ({}, "0 adapters"),
    ):
        torch.save(changed, weights)
        with pytest.raises(ReftEdgeError, match=message):
            from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)
    weights.unlink()
    (tmp_path / "ad/adapter.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ReftEdgeError, match="not a usable safetensors"):
        from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_adapter.bin"])
def test_what_is_no_file_is_named(tmp_path, name):
    write(tmp_path / "ad")
    (tmp_path / "ad" / name).unlink()
    os.mkfifo(tmp_path / "ad" / name)
    assert is_adapterhub(tmp_path / "ad")
    with pytest.raises(ReftEdgeError, match=rf"cannot read .*{name}: it is not a regular file"):
        from_adapterhub(tmp_path / "ad", lambda: BASE, ASKED)
