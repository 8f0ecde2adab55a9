"""What EasySteer reads, against its own code, by logits. Run with `pytest -m peers`.

EasySteer runs inside its own vLLM on a GPU. So $REFT_EDGE_EASYSTEER names a checkout of that vLLM, whose steering code runs here as
it is: reading a spec, choosing tokens, conflicts, algorithms, and hooks on the layers of a tiny model of transformers.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from reft_edge.convert.formats import Given, convert
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.peers import TOLERANCE, largest, peer, run
from tests.helpers.torch_reference import logits, random_adapter

pytestmark = pytest.mark.peers
ADAPTERS = {
    "loreft": {"intervention": "loreft", "positions": "f3+l2"},
    "loreft tied": {"intervention": "loreft", "positions": "f2+l3", "tied": True},
    "loreft of some layers": {"intervention": "loreft", "positions": "l4+gen", "layers": (0, 2)},
    "direft": {"intervention": "direft", "positions": "f4+gen2"},
    "noreft": {"intervention": "noreft", "positions": "all"},
    "nodireft tied": {"intervention": "nodireft", "positions": "all+gen-f1", "tied": True},
    "nodireft": {"intervention": "nodireft", "positions": "f4-f1+gen"},
    "both ends left out": {"intervention": "loreft", "positions": "all-f2-l3+gen", "tied": True},
    "consreft": {"intervention": "consreft", "positions": "f1+l1"},
    "lobireft": {"intervention": "lobireft", "positions": "l3+gen", "tied": True},
    "steering": {"intervention": "steering", "positions": "all+gen", "tied": True},
    "steering untied": {"intervention": "steering", "positions": "f2+gen3"},
    "red": {"intervention": "red", "positions": "f2+l2+gen", "tied": True},
}
ROWS = [(20, 6), (9, 4), (8, 1), (4, 0)]
"""Tokens of each prompt and answer: with room for all positions above, but for the last one."""


@pytest.fixture(scope="module")
def computed(device_folder, tiny_model, tmp_path_factory):
    """Adapters, and EasySteer's logits with what they were converted to."""
    sources = os.environ.get("REFT_EDGE_EASYSTEER")
    if not sources or not (Path(sources) / "vllm/steer_vectors/api.py").is_file():
        pytest.skip(
            "set REFT_EDGE_EASYSTEER to a checkout of EasySteer's vLLM, with vllm/steer_vectors in it"
        )
    python = peer("easysteer", tmp_path_factory.mktemp("peers"))
    folder = tmp_path_factory.mktemp("easysteer")
    random = np.random.default_rng(0)
    rows = [[random.integers(5, 300, count).tolist() for count in counts] for counts in ROWS]
    (folder / "rows.json").write_text(json.dumps(rows))
    adapters = {}
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        path = folder / f"{name}.safetensors"
        adapters[name] = random_adapter(tiny_model, seed=seed, path=path, strength=2, **fields)
        convert(str(path), folder / f"{name}.json", Given())
    path = folder / "a control vector.safetensors"
    adapters[path.stem] = random_adapter(
        tiny_model, "steering", "all+gen", tied=True, layers=(1, 2), path=path, strength=2
    )
    convert(str(path), folder / "vector.gguf", Given())
    vector = {"source": str(folder / "vector.gguf"), "apply": {"prompt": "all", "generation": "all"}}
    (folder / f"{path.stem}.json").write_text(json.dumps({"vectors": [vector]}))
    run(python, "easysteer_side.py", sources, device_folder / "hf", folder)
    return rows, adapters, folder


def test_prompts_without_room_for_the_positions_differ(computed, tiny_model):
    """EasySteer's counts are limited to the prompt, ours to half of it."""
    rows, adapters, folder = computed
    theirs, prompt = np.load(folder / "loreft.npz"), rows[-1][0]
    assert len(prompt) == 4
    with steered(tiny_model, (Interventions.from_adapter(adapters["loreft"]), 1.0)):
        ours = logits(tiny_model, prompt).numpy()
    assert largest([theirs[f"whole{len(rows) - 1}"][:4]], [ours]) > 0.05


@pytest.mark.parametrize("name", [*ADAPTERS, "a control vector"])
def test_easysteer_gives_the_same_logits(computed, tiny_model, name):
    rows, adapters, folder = computed
    theirs = np.load(folder / f"{name}.npz")
    for number, (prompt, answer) in enumerate(rows[:-1]):
        row = prompt + answer
        with (
            steered(tiny_model, (Interventions.from_adapter(adapters[name]), 1.0)) as steering,
            steering.prompts(torch.tensor([len(prompt)])),
        ):
            ours = logits(tiny_model, row).numpy()
        assert largest([theirs[f"whole{number}"]], [ours]) <= TOLERANCE
        assert largest([theirs[f"parts{number}"]], [ours]) <= TOLERANCE
        assert largest([ours], [logits(tiny_model, row).numpy()]) > 0.05
