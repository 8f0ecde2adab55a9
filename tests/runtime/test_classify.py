"""An exported encoder on a device. Runs without torch: what PyTorch said comes from `device_folder`."""

import json

import numpy as np
import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredEncoder, SteeredModel
from tests.helpers.tiny import CLASSIFIED


@pytest.fixture(scope="module")
def encoder(device_folder):
    model = SteeredEncoder(device_folder / "encoder", "cpu")
    assert model.load_adapter(device_folder / "labels.safetensors") == "labels"
    return model


def shares(found):
    return np.array([list(answer.probabilities.values()) for answer in found])


def test_probabilities_are_pytorchs(encoder, device_folder):
    expected = np.array(json.loads((device_folder / "probabilities.json").read_text()))
    found = encoder.classify(CLASSIFIED, "labels")
    assert np.abs(shares(found) - expected).max() <= 1e-4
    assert [answer.label for answer in found] == [("no", "yes", "?")[i] for i in expected.argmax(1)]
    assert np.abs(shares(encoder.classify(CLASSIFIED, "labels", factor=0)) - expected).max() > 1e-2


def test_a_batch_is_its_rows_alone(encoder):
    together = shares(encoder.classify(CLASSIFIED, "labels", batch_size=2))
    alone = np.concatenate([shares(encoder.classify([text], "labels")) for text in CLASSIFIED])
    assert np.abs(together - alone).max() <= 1e-5


def test_an_encoder_is_not_a_decoder(device_folder):
    with pytest.raises(ReftEdgeError, match="use SteeredEncoder"):
        SteeredModel(device_folder / "encoder")
    with pytest.raises(ReftEdgeError, match="use SteeredModel"):
        SteeredEncoder(device_folder / "export")


def test_what_cannot_be_classified_is_refused(encoder, device_folder):
    with pytest.raises(ReftEdgeError, match="no adapter 'other' is loaded; loaded: labels"):
        encoder.classify(["A"], "other")
    with pytest.raises(ReftEdgeError, match="is one text; give a list"):
        encoder.classify("A", "labels")
    with pytest.raises(ReftEdgeError, match="another base"):
        encoder.load_adapter(device_folder / "first.safetensors")
