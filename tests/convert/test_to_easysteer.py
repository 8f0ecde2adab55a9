"""EasySteer's specs as they are written. tests/convert/test_easysteer_peers.py has EasySteer read and run them."""

import hashlib
import json
from base64 import b64decode

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reft_edge.adapter.algebra import apply
from reft_edge.adapter.config import INTERVENTIONS, Adapter, AdapterConfig
from reft_edge.adapter.file import save_adapter
from reft_edge.adapter.linear import fold
from reft_edge.cli import app
from reft_edge.convert.to_easysteer import steering_vectors, to_easysteer
from reft_edge.errors import ReftEdgeError
from reft_edge.model.places import Place

D, LAYERS = 12, 3


def adapter_of(intervention: str, positions: str = "f3+l2", tied: bool = False, **fields) -> Adapter:
    rank = 1 if intervention in ("steering", "red") else 2
    size = fields.pop("hidden_size", D)
    settings = {"layers": (0, 2), "rank": rank, "positions": positions, "tied": tied} | fields
    config = AdapterConfig(intervention, "tiny", "0" * 16, size, LAYERS, **settings)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in config.shapes().items()}
    if "R" in tensors:
        tensors["R"] = np.linalg.qr(tensors["R"].swapaxes(-1, -2))[0].swapaxes(-1, -2).copy()
    return Adapter(config, tensors)


def tensors_of(data: dict) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(b64decode(stored["data"]), "<f4").reshape(stored["shape"])
        for name, stored in data["tensors"].items()
    }


def edited(vector: dict, layer: int, h: np.ndarray) -> np.ndarray:
    """What EasySteer's documentation says of its algorithms."""
    part = tensors_of(vector["data"])
    if vector["algorithm"] == "direct":
        return h + part[f"layer.{layer}"]
    if vector["algorithm"] == "linear":
        return h @ part["weight"].T + part["bias"]
    source = h @ part["learned_source_weight"].T + part["learned_source_bias"]
    return h + (source - h @ part["rotate_layer"]) @ part["rotate_layer"].T


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_every_intervention_is_one_of_its_algorithms(intervention):
    adapter = adapter_of(intervention, "all", tied=True)
    vectors = steering_vectors(adapter)
    algorithm = {"lobireft": "direct", "steering": "direct", "red": "linear"}.get(intervention, "loreft")
    assert {vector["algorithm"] for vector in vectors} == {algorithm}
    assert len(vectors) == (1 if algorithm == "direct" else 2)
    h = np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)
    for layer in (0, 2):
        vector = vectors[0] if layer == 0 or algorithm == "direct" else vectors[1]
        assert (vector["apply"], vector["scale"]) == ({"prompt": "all"}, 1)
        if algorithm == "loreft":
            assert vector["data"]["extra"] == {"layer": layer}
        if algorithm == "linear":
            assert vector["layers"] == [layer]
        expected = apply(fold(adapter), Place(layer), h, np.arange(5), 5)
        np.testing.assert_allclose(edited(vector, layer, h), expected, atol=1e-5)


def test_a_weak_edit_keeps_its_digits_in_bfloat16():
    """vLLM mostly computes in bfloat16, where hR would drown an edit that is weak beside it."""
    adapter = adapter_of("direft", "all", hidden_size=256)
    for name in ("W", "b"):
        adapter.tensors[name][:] *= 1e-3
    part = tensors_of(steering_vectors(adapter)[0]["data"])
    h = torch.randn(50, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation, weight, bias = (
        torch.from_numpy(part[name].copy()).bfloat16()
        for name in ("rotate_layer", "learned_source_weight", "learned_source_bias")
    )
    found = ((h @ weight.T + bias - h @ rotation) @ rotation.T).float().numpy()
    exact = apply(fold(adapter), Place(0), h.float().numpy(), np.arange(50), 50) - h.float().numpy()
    assert np.linalg.norm(found - exact) <= 0.02 * np.linalg.norm(exact)


POSITIONS = {
    ("f3", False): [{"prompt_window": [0, 3]}],
    ("l2", False): [{"prompt_window": [-2, None]}],
    ("f3+l2", False): [{"prompt_window": [0, 3]}, {"prompt_window": [-2, None]}],
    ("f3+l2", True): [{"prompt_window": [0, 3], "prompt_positions": [-2, -1]}],
    ("all+gen", True): [{"prompt": "all", "generation": "all"}],
    ("f3+gen5", False): [{"prompt_window": [0, 3]}, {"generation_window": [0, 5]}],
    ("all-f1", False): [{"prompt": "all", "exclude_prompt_window": [0, 1]}],
    ("all-f1-l2+gen", True): [
        {"prompt": "all", "generation": "all", "exclude_prompt_window": [0, 1], "exclude_prompt_positions": [-2, -1]}
    ],
    ("f3|gen", False): [{"prompt_window": [0, 3]}, {"generation": "all"}],
}  # fmt: skip


@pytest.mark.parametrize(("positions", "tied"), POSITIONS)
def test_positions_are_its_where_clauses(positions, tied):
    vectors = steering_vectors(adapter_of("steering", positions, tied))
    assert [vector["apply"] for vector in vectors] == POSITIONS[positions, tied]


def test_the_digest_tells_weights_layers_and_kinds_apart():
    data = steering_vectors(adapter_of("loreft", "all"))[0]["data"]
    digest = hashlib.sha256(b"reft:1")
    for name in ("learned_source_bias", "learned_source_weight", "rotate_layer"):
        array = tensors_of(data)[name]
        digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
    digest.update(b"layer=0")
    assert data["sha256"] == digest.hexdigest()
    every = [vector["data"]["sha256"] for vector in steering_vectors(adapter_of("loreft", "f3+l2"))]
    assert len(set(every)) == 4


def test_the_command_writes_a_file_and_says_how_to_use_it(tmp_path):
    save_adapter(adapter_of("direft"), tmp_path / "task.safetensors")
    out = tmp_path / "task.json"
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "task.safetensors"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    spec = json.loads(out.read_text())
    assert spec["conflict"] == "priority"
    assert [vector["name"] for vector in spec["vectors"]] == [
        f"layer {layer} at {part}" for part in ("f3", "l2") for layer in (0, 2)
    ]
    for said in (
        "(easysteer)",
        'steer_algorithms=["loreft"], steer_multi_vector=True',
        "through the chat template",
        "fewer than 6 tokens",
        "direft is written as loreft, the same edit",
    ):
        assert said in done.output


REFUSED = {
    "head": (
        {"intervention": "loreft", "labels": ("no", "yes"), "pooling": "cls"},
        "no classification heads",
    ),
    "attention": ({"intervention": "loreft", "component": "attention"}, "outputs of whole blocks"),
    "activation": ({"intervention": "nodireft", "act_fn": "relu"}, "act_fn is relu"),
    "activation without a port": ({"intervention": "nodireft", "act_fn": "gelu_new"}, "act_fn is gelu_new"),
    "trigger": ({"intervention": "loreft", "positions": 'from:"<tool>"[27,14506,29]'}, "has no triggers"),
    "overlap": ({"intervention": "loreft", "positions": "f3|all+gen"}, "overlap"),
    "long ends": ({"intervention": "loreft", "positions": "f3+l5000", "tied": True}, "at most 4,096"),
    "large red": ({"intervention": "red", "hidden_size": 5120}, "at most 268,435,456"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_easysteer_cannot_do_is_refused_by_name(tmp_path, name):
    fields, message = REFUSED[name]
    with pytest.raises(ReftEdgeError, match=message):
        to_easysteer(adapter_of(**fields), tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    adapter = adapter_of("steering")
    adapter.tensors["alpha"][:] = 0
    with pytest.raises(ReftEdgeError, match="changes nothing"):
        to_easysteer(adapter, tmp_path / "x.json")
