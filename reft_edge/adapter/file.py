"""The adapter and its file: one `.safetensors` with the unfolded parameters and a described header.

Header metadata: `format` is "reft-edge", `version` is "1" where every tensor is float32 and "2" where some are stored in
fewer bits (`reft_edge.adapter.storage` says how), `adapter` is a JSON object with the fields of `AdapterConfig`, and `signature`,
if there is one, is described in `reft_edge.signing`. Every tensor is stacked over layers (in the order of `layers`) and
position groups (one if tied, one a part of the position spec if not, one a group where `|` sets them apart), so that L layers
and G groups of rank r on a hidden size d are:

    loreft, direft     R [L, G, r, d]   W [L, G, r, d]   b [L, G, r]
    noreft             W1 [L, G, r, d]  W2 [L, G, r, d]  b [L, G, r]   b2 [L, G, r] with add_bias
    nodireft           W1 [L, G, r, d]  W2 [L, G, r, d]  b [L, G, r]
    consreft, lobireft R [L, G, r, d]   b [L, G, r]
    steering           v [L, G, 1, d]   alpha [L, G, 1]
    red                s [L, G, 1, d]   v [L, G, 1, d]

An adapter for classification also holds its head, for K labels: head.weight [K, d], head.bias [K].

`positions` is a spec as `reft_edge.adapter.positions` reads it; a trigger in it has its token ids, as in
`from:"<tool>"[27,14506,29]`.

Formulas: Wu et al. 2024 (arXiv 2404.03592, section 3.2) for LoReFT and DiReFT, pyreft 0.1.0's
`interventions.py` for the others. RED (Wu et al. 2024, arXiv 2402.15179) is h + s ⊙ h + v: the paper's factor is 1 + s.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from reft_edge.adapter.config import Adapter, AdapterConfig, check_names, check_size
from reft_edge.adapter.storage import PRECISIONS, ROWS, data_bytes, declared, decode, encode, serialise
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.files import open_regular, write_atomically
from reft_edge.strict_json import parse_json

FORMAT = "reft-edge"
VERSIONS = ("1", "2")


_MAX_HEADER = 1 << 20


def save_adapter(adapter: Adapter, path: Path | str, precision: str = "fp32") -> None:
    """Write the file atomically, its tensors stored as `reft_edge.adapter.storage.PRECISIONS` tells; the same adapter gives the same bytes.

    Raises ReftEdgeError if it cannot be written, or fp16 cannot hold a value.
    """
    if precision not in PRECISIONS:
        raise ReftEdgeError(f"there is no precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[precision != "fp32"],
        "adapter": json.dumps(dataclasses.asdict(adapter.config), allow_nan=False, separators=(",", ":")),
    }
    write_atomically(Path(path), serialise(encode(adapter.tensors, precision), metadata))


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter file holds, from one reading of it: the header's metadata, and the tensors as they are stored."""

    name: str
    """The file's, for messages."""
    config: AdapterConfig
    metadata: dict[str, str]
    tensors: dict[str, NDArray[np.generic]]

    @property
    def precision(self) -> str:
        """fp32, fp16 or int8."""
        kinds = {np.dtype(np.float16): "fp16", np.dtype(np.int8): "int8"}
        return next(
            (kinds[tensor.dtype] for tensor in self.tensors.values() if tensor.dtype in kinds), "fp32"
        )

    def adapter(self) -> Adapter:
        """The adapter, in float32. Raises AdapterFileError if a tensor is not finite."""
        with _about(self.name):
            return Adapter(self.config, decode(self.tensors))


@dataclass(frozen=True)
class OpenedFile:
    """An adapter file that is open already: what is read is this file, whatever its name has become since."""

    path: Path
    """The name that it was opened by, for messages."""
    file: BinaryIO

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)


AdapterSource = Path | str | OpenedFile
"""A file by its name, or one that is open."""


def is_adapter_name(name: str) -> bool:
    """Whether a file's name without its ending can be an adapter's: macOS writes `._NAME` beside each NAME on foreign disks."""
    return (
        0 < len(name) <= 255
        and name not in (".", "..")
        and not name.startswith("._")
        and not any(mark in name for mark in "/\\\0")
        and name.encode(errors="replace").decode() == name
    )


def load_adapter(path: Path | str) -> Adapter:
    """Read and check an adapter file. Raises AdapterFileError that names the file and what is wrong with it."""
    return read_stored(path).adapter()


def read_stored(path: AdapterSource) -> StoredAdapter:
    """Read an adapter file, once. Raises AdapterFileError that names the file and what is wrong with it.

    The header is checked, against itself and against the file's size, before tensor data is read.
    """
    with _about(path), _opened(path) as file:
        return _read_stored(file, os.fstat(file.fileno()).st_size, str(path))


@contextmanager
def _opened(source: AdapterSource) -> Iterator[BinaryIO]:
    if isinstance(source, OpenedFile):
        yield source.file
        return
    with open_regular(Path(source)) as file:
        yield file


def read_whole(file: BinaryIO, name: str) -> tuple[bytes, StoredAdapter]:
    """All bytes of an open file and what they hold; they are read once its header is known to be sound.

    `name` stands for it in messages. Raises AdapterFileError.
    """
    with _about(name):
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        _read_header(file, size)
        file.seek(0)
        content = file.read(size)
    return content, parse_stored(content, name)


def parse_stored(content: bytes, name: str) -> StoredAdapter:
    """The same from a file's bytes; `name` stands for it in messages."""
    with _about(name):
        return _read_stored(io.BytesIO(content), len(content), name)


def read_config(path: Path | str) -> AdapterConfig:
    """Read and check an adapter file's header only. Raises AdapterFileError."""
    with _about(path), _opened(path) as file:
        return _read_header(file, os.fstat(file.fileno()).st_size).config


@contextmanager
def _about(path: AdapterSource) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterFileError(f"cannot read adapter {path}: {error.strerror}") from error
    except (ReftEdgeError, SafetensorError) as error:
        raise AdapterFileError(f"{path} is not a usable adapter: {error}") from error


@dataclass(frozen=True)
class _Header:
    content: bytes
    """The file as far as the header reaches."""
    metadata: dict[str, str]
    config: AdapterConfig


def _read_stored(file: BinaryIO, size: int, name: str) -> StoredAdapter:
    header = _read_header(file, size)
    content = header.content + file.read(size - len(header.content))
    return StoredAdapter(name, header.config, header.metadata, load(content))


def _read_header(file: BinaryIO, size: int) -> _Header:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterFileError(
            "it is shorter than a safetensors header; the file is truncated or of another kind"
        )
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER or length > size - 8:
        raise AdapterFileError(
            f"its header claims {length:,} bytes of a file of {size:,} (at most {_MAX_HEADER:,} "
            "are accepted); the file is truncated or not a safetensors file"
        )
    text = file.read(length)
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise AdapterFileError("its header is not a JSON object, padded with spaces only")
    header = parse_json(_decoded(text), "header")
    metadata = header.pop("__metadata__", None)
    config = _config_from_metadata(metadata)
    _check_layout(header, config, metadata["version"], size - 8 - length)
    return _Header(prefix + text, metadata, config)


def _config_from_metadata(metadata: Any) -> AdapterConfig:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"its metadata does not say format {FORMAT!r}; train one with `reft-edge train`"
        )
    if metadata.get("version") not in VERSIONS:
        raise AdapterFileError(
            f"it has version {metadata.get('version')!r} of the format; this reft-edge reads "
            f"versions {' and '.join(VERSIONS)}: upgrade reft-edge, or train the adapter again"
        )
    described = metadata.get("adapter")
    if not isinstance(described, str):
        raise AdapterFileError("its metadata has no `adapter` description")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFileError("its metadata holds something other than text")
    fields = parse_json(described, "adapter description")
    known = {f.name: f for f in dataclasses.fields(AdapterConfig)}
    required = {
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if unknown := sorted(fields.keys() - known):
        raise AdapterFileError(f"its description has unknown fields {unknown}")
    if missing := sorted(required - fields.keys()):
        raise AdapterFileError(f"its description lacks {missing}")
    for name in ("layers", "labels"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    return AdapterConfig(**fields)


def _check_layout(header: dict[str, Any], config: AdapterConfig, version: str, data_size: int) -> None:
    """The header's tensors against what the description and one way to store them ask for."""
    shapes = config.shapes()
    expected = declared(shapes, _store(header) if version != "1" else "fp32")
    check_names(config.intervention, set(header), set(expected))
    needed = data_bytes(expected)
    if needed != data_size:
        raise AdapterFileError(
            f"its description needs {needed:,} bytes of tensors, the file holds {data_size:,}; "
            "the file is truncated or its description is wrong"
        )
    check_size(config)
    for name, (dtype, shape) in expected.items():
        entry = header[name]
        if not isinstance(entry, dict) or entry.get("dtype") != dtype or entry.get("shape") != list(shape):
            found = (
                f"{entry.get('dtype')!r} {entry.get('shape')!r}" if isinstance(entry, dict) else repr(entry)
            )
            raise AdapterFileError(
                f"tensor {name} is declared as {found:.200}; expected {dtype} {list(shape)}"
            )
        if unknown := sorted(entry.keys() - {"dtype", "shape", "data_offsets"}):
            raise AdapterFileError(f"tensor {name} is declared with unknown fields {unknown}")


def _store(header: dict[str, Any]) -> str:
    """How the tensors of a header are stored, by the first that is a row of the hidden size."""
    for name in ROWS:
        entry = header.get(name)
        if isinstance(entry, dict):
            return {"F16": "fp16", "I8": "int8"}.get(str(entry.get("dtype")), "fp32")
    return "fp32"


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise AdapterFileError("its header is not UTF-8") from error
