"""Control vectors in GGUF, as llama.cpp and repeng read and write them, and steering adapters.

`direction.N` (float32, one a layer) is added to the output of block N, counted from 0, at every token of
prompt and answer. Both libraries agree: llama.cpp's `common_control_vector_load_one` puts `direction.N` at
offset (N − 1) · n_embd, from which `llama_adapter_cvec::apply` (src/llama-adapter.cpp) fills the vector of
block N, added where the graph's `l_out-N` arises; repeng's `ControlModel` adds `directions[N]` to the output
of `model.layers[N]`. So N here is the layer of an adapter, and block 0 cannot be steered by llama.cpp, which
refuses `direction.0`.
"""

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from reft_edge.adapter.algebra import Array
from reft_edge.adapter.base import Base
from reft_edge.adapter.config import Adapter, AdapterConfig
from reft_edge.adapter.linear import fold, grouped
from reft_edge.adapter.positions import UNLIMITED, Span
from reft_edge.errors import ReftEdgeError
from reft_edge.files import name_to_store, open_regular, write_atomically
from reft_edge.model.gguf_header import GgufHeader, parse_gguf_header
from reft_edge.model.places import Place

ARCHITECTURE = "controlvector"
EVERY_TOKEN = "all+gen"
_F32 = 0
_MAX_HEADER = 1 << 20


def from_control_vector(path: Path, base: Base, raw: bool, positions: str = EVERY_TOKEN) -> Adapter:
    """A steering adapter of a control vector. Raises ReftEdgeError for a malformed file, or one that does not
    fit the base.
    """
    directions = read_control_vector(path, base.hidden_size, base.num_layers)
    config = AdapterConfig(
        "steering",
        base.name,
        base.fingerprint,
        base.hidden_size,
        base.num_layers,
        tuple(sorted(directions)),
        1,
        positions,
        tied="+" in positions and "|" not in positions,
        prompt_format="raw" if raw else "chat",
        training={"converted": {"from": "gguf", "name": name_to_store(path)}},
    )
    groups = len(config.spans)
    vectors = np.stack([directions[layer] for layer in config.layers])[:, None, None]
    tensors = {
        "v": np.repeat(vectors, groups, axis=1),
        "alpha": np.ones((len(config.layers), groups, 1), np.float32),
    }
    return Adapter(config, tensors)


def to_control_vector(adapter: Adapter, output: Path) -> None:
    """Write an adapter that adds a constant at every token: steering, LoBiReFT, and merges of these.

    `controlvector.model_hint` is the base's name. Raises ReftEdgeError by name for an edit that depends on
    the hidden state, other positions, other components than the block, and layer 0.
    """
    write_control_vector(output, constant_edit(adapter), adapter.config.base_name)


def constant_edit(adapter: Adapter) -> dict[int, Array]:
    """The vector `[d]` that the adapter adds at each layer. Raises ReftEdgeError if that is not what it does."""
    config = adapter.config
    if config.labels:
        raise ReftEdgeError("a control vector has no classification head")
    if config.component != "block":
        raise ReftEdgeError(
            f"the adapter edits the {config.component} of layers; a control vector edits whole blocks"
        )
    edit = grouped(fold(adapter))
    if any(part.A.any() or part.acts.any() or part.s.any() for part in edit.places.values()):
        raise ReftEdgeError(
            f"the edit of this {config.intervention} depends on the hidden state; a control vector is a constant"
        )
    vectors: dict[int, Array] = {}
    for place in config.places:
        sums: dict[str, Array] = {}
        for at in ("prompt", "generated"):
            part = edit.places.get(place)
            total = np.zeros(config.hidden_size, np.float32)
            for number, gate in enumerate(edit.gates):
                if replace(gate.span, last=0, after=0) != Span() or (
                    not {gate.span.last, gate.span.after} <= {0, UNLIMITED}
                ):
                    raise ReftEdgeError(
                        f"the adapter acts at {config.positions}; a control vector acts at every token ({EVERY_TOKEN})"
                    )
                if part is not None and (gate.span.on_prompt if at == "prompt" else gate.span.on_generated):
                    columns = part.gates == number
                    total += part.b[columns] @ part.B[columns]
            sums[at] = total
        if not np.array_equal(sums["prompt"], sums["generated"]):
            raise ReftEdgeError(
                f"the adapter ({config.positions}) adds one vector to the prompt and another to generated tokens at layer "
                f"{place}; a control vector adds the same at every token ({EVERY_TOKEN}, tied)"
            )
        vectors[place.layer] = sums["prompt"]
    if Place(0) in config.places and vectors[0].any():
        raise ReftEdgeError(
            "the adapter edits layer 0, which no control vector can: llama.cpp refuses direction.0"
        )
    vectors.pop(0, None)
    if not vectors:
        raise ReftEdgeError("the adapter adds nothing at any layer that a control vector can steer")
    return vectors


def write_control_vector(path: Path, directions: dict[int, Array], hint: str) -> None:
    """Write the GGUF file atomically. `hint` is repeng's `model_type`, for people."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, vector in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(path, temporary.read_bytes())


def read_control_vector(path: Path, hidden_size: int, num_layers: int) -> dict[int, Array]:
    """The directions `[hidden_size]` by layer.

    Sizes are checked against the file's before anything is read, and at most 1 MB of header is. Raises
    ReftEdgeError for a malformed file, another architecture, tensors that are no directions, and layers that
    a model of `num_layers` does not have.
    """
    try:
        with open_regular(path) as file:
            header = parse_gguf_header(file, os.fstat(file.fileno()).st_size, _MAX_HEADER)
            directions: dict[int, Array] = {}
            for layer, start in _directions(header, hidden_size, num_layers).items():
                file.seek(start)
                directions[layer] = np.frombuffer(file.read(4 * hidden_size), "<f4").astype(np.float32)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    except ReftEdgeError as error:
        raise ReftEdgeError(f"{path} is not a usable control vector: {error}") from error
    if bad := [layer for layer, vector in directions.items() if not np.isfinite(vector).all()]:
        raise ReftEdgeError(f"{path}: direction.{bad[0]} holds NaN or infinity")
    return directions


def _directions(header: GgufHeader, hidden_size: int, num_layers: int) -> dict[int, int]:
    """Where each layer's direction begins in the file."""
    if header.architecture != ARCHITECTURE:
        raise ReftEdgeError(
            f"it has architecture {header.architecture!r:.60}; a control vector says {ARCHITECTURE!r}"
        )
    starts: dict[int, int] = {}
    for tensor in header.tensors:
        match = re.fullmatch(r"direction\.([0-9]{1,5})", tensor.name)
        if match is None:
            raise ReftEdgeError(f"it holds a tensor {tensor.name!r:.60}; a control vector holds direction.N")
        layer = int(match[1])
        if tensor.shape != (hidden_size,) or tensor.kind != _F32:
            raise ReftEdgeError(
                f"direction.{layer} has shape {list(tensor.shape)} and GGML type {tensor.kind}; expected [{hidden_size}] "
                f"float32 (type {_F32}) for this base"
            )
        if layer in starts:
            raise ReftEdgeError(f"it has direction.{layer} twice")
        if layer >= num_layers:
            raise ReftEdgeError(f"it steers block {layer}; the base has blocks 0 to {num_layers - 1}")
        starts[layer] = tensor.start
    if not starts:
        raise ReftEdgeError("it holds no direction")
    return starts
