"""From an edit to the inputs of a graph's ports."""

import numpy as np
from numpy.typing import NDArray

from reft_edge.algebra import Edit
from reft_edge.errors import ReftEdgeError
from reft_edge.manifest import Manifest

PortInputs = dict[str, NDArray[np.generic]]


def port_inputs(edit: Edit, manifest: Manifest, dtype: np.dtype[np.generic]) -> PortInputs:
    """The edit as port inputs with adapter_batch 1, floats in the graph's `dtype`.

    Raises ReftEdgeError if the edit is for another hidden size or a place without a port.
    """
    if edit.hidden_size != manifest.hidden_size:
        raise ReftEdgeError(
            f"the adapter edits hidden states of size {edit.hidden_size}; "
            f"this model's have {manifest.hidden_size}"
        )
    if unported := sorted(edit.places.keys() - set(manifest.places)):
        raise ReftEdgeError(
            f"the adapter edits layers {', '.join(map(str, unported))}, which have no port in this folder; "
            "export the model again with --layers and --components that cover them"
        )

    def per_gate(numbers: list[float], kind: np.dtype[np.generic]) -> NDArray[np.generic]:
        return np.array(numbers, kind).reshape(1, 1, -1)

    int64 = np.dtype(np.int64)
    inputs: PortInputs = {
        "reft.first": per_gate([gate.span.first for gate in edit.gates], int64),
        "reft.last": per_gate([gate.span.last for gate in edit.gates], int64),
        "reft.after": per_gate([gate.span.after for gate in edit.gates], int64),
        "reft.scale": per_gate([gate.scale for gate in edit.gates], dtype),
    }
    for place, part in edit.places.items():
        name = place.port
        inputs[f"{name}.A"] = np.ascontiguousarray(part.A[None], dtype)
        inputs[f"{name}.b"] = np.ascontiguousarray(part.b[None, None], dtype)
        inputs[f"{name}.B"] = np.ascontiguousarray(part.B[None], dtype)
        inputs[f"{name}.columns"] = np.ascontiguousarray(part.gates, np.int64)
    return inputs
