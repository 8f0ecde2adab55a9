"""Control vectors in GGUF, as llama.cpp and repeng read and write them, and steering adapters.

`direction.N` (float32, one a layer) is added to the output of block N, counted from 0, at every token of
prompt and answer. Both libraries agree: llama.cpp's `common_control_vector_load_one` puts `direction.N` at
offset (N − 1) · n_embd, from which `llama_adapter_cvec::apply` (src/llama-adapter.cpp) fills the vector of
block N, added where the graph's `l_out-N` arises; repeng's `ControlModel` adds `directions[N]` to the output
of `model.layers[N]`. So N here is the layer of an adapter, and block 0 cannot be steered by llama.cpp, which
refuses `direction.0`.
"""

import re
import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from reft_edge.adapter import Adapter, AdapterConfig, fold
from reft_edge.algebra import Array
from reft_edge.base import Base
from reft_edge.errors import ReftEdgeError
from reft_edge.files import name_to_store, write_atomically
from reft_edge.folded import grouped
from reft_edge.places import Place
from reft_edge.positions import UNLIMITED

ARCHITECTURE = "controlvector"
EVERY_TOKEN = "all+gen"
_F32 = 0
_MAX_HEADER = 1 << 20
_MAX_PAIRS, _MAX_TENSORS = 1 << 10, 1 << 12
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's metadata types of fixed size."""
_STRING, _ARRAY = 8, 9


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
    if any(part.A.any() for part in edit.places.values()):
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
                if gate.span.first or gate.span.last not in (0, UNLIMITED):
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
        with path.open("rb") as file:
            size = path.stat().st_size
            offsets, start = _read_header(path, file, hidden_size, num_layers)
            directions: dict[int, Array] = {}
            for layer, offset in offsets.items():
                if start + offset + 4 * hidden_size > size:
                    raise ReftEdgeError(f"{path} ends before direction.{layer}; the file is truncated")
                file.seek(start + offset)
                directions[layer] = np.frombuffer(file.read(4 * hidden_size), "<f4").astype(np.float32)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    if bad := [layer for layer, vector in directions.items() if not np.isfinite(vector).all()]:
        raise ReftEdgeError(f"{path}: direction.{bad[0]} holds NaN or infinity")
    return directions


class _Header:
    """The first bytes of a file, taken piece by piece."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._content) - self.at:
            raise ReftEdgeError(
                f"{self._path}: its header runs past the file's end or past {_MAX_HEADER:,} bytes; it is malformed"
            )
        self.at += count
        return self._content[self.at - count : self.at]

    def number(self, kind: str) -> int:
        found: int = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]
        return found

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def skip(self, kind: int) -> None:
        """Skip one metadata value."""
        if kind in _FIXED:
            self.take(_FIXED[kind])
        elif kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _FIXED:
                self.take(count * _FIXED[inner])
            elif inner == _STRING:
                for _ in range(count):
                    self.text()
            else:
                raise ReftEdgeError(
                    f"{self._path}: its metadata has an array of type {inner}; it is malformed"
                )
        else:
            raise ReftEdgeError(f"{self._path}: its metadata has an unknown type {kind}; it is malformed")


def _read_header(path: Path, file: BinaryIO, hidden_size: int, num_layers: int) -> tuple[dict[int, int], int]:
    """Where each direction's data begin, and what these offsets count from."""
    header = _Header(path, file.read(_MAX_HEADER))
    if header.take(4) != b"GGUF":
        raise ReftEdgeError(f"{path} is not a GGUF file")
    version = header.number("I")
    if version not in (2, 3):
        raise ReftEdgeError(f"{path} has version {version} of GGUF; expected 2 or 3, little-endian")
    tensors, pairs = header.number("Q"), header.number("Q")
    if tensors > _MAX_TENSORS or pairs > _MAX_PAIRS:
        raise ReftEdgeError(
            f"{path} claims {tensors:,} tensors and {pairs:,} metadata entries; a control vector has "
            f"{_MAX_TENSORS:,} and {_MAX_PAIRS:,} at most"
        )
    architecture, alignment = b"", 32
    for _ in range(pairs):
        name, kind = header.text(), header.number("I")
        if name == b"general.architecture" and kind == _STRING:
            architecture = header.text()
        elif name == b"general.alignment" and kind == 4:
            alignment = header.number("I")
        else:
            header.skip(kind)
    if architecture != ARCHITECTURE.encode():
        raise ReftEdgeError(
            f"{path} has architecture {architecture[:60]!r}; a control vector says {ARCHITECTURE!r}"
        )
    if alignment == 0 or alignment % 8:
        raise ReftEdgeError(f"{path} aligns tensors to {alignment} bytes; expected a multiple of 8")
    offsets: dict[int, int] = {}
    for _ in range(tensors):
        name, dimensions = header.text(), header.number("I")
        if dimensions > 4:
            raise ReftEdgeError(f"{path}: tensor {name[:60]!r} has {dimensions} dimensions; expected 1")
        shape = [header.number("Q") for _ in range(dimensions)]
        kind, offset = header.number("I"), header.number("Q")
        match = re.fullmatch(rb"direction\.(\d{1,5})", name)
        if match is None:
            raise ReftEdgeError(f"{path} holds a tensor {name[:60]!r}; a control vector holds direction.N")
        layer = int(match[1])
        if shape != [hidden_size] or kind != _F32:
            raise ReftEdgeError(
                f"{path}: direction.{layer} has shape {shape} and GGML type {kind}; expected [{hidden_size}] "
                f"float32 (type {_F32}) for this base"
            )
        if layer in offsets:
            raise ReftEdgeError(f"{path} has direction.{layer} twice")
        if layer >= num_layers:
            raise ReftEdgeError(f"{path} steers block {layer}; the base has blocks 0 to {num_layers - 1}")
        offsets[layer] = offset
    if not offsets:
        raise ReftEdgeError(f"{path} holds no direction")
    return offsets, -(-header.at // alignment) * alignment
