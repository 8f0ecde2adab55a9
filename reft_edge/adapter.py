"""The adapter and its file: one `.safetensors` with the unfolded parameters and a described header.

Header metadata: `format` is "reft-edge", `version` is "1" where every tensor is float32 and "2" where some are stored in
fewer bits (`reft_edge.storage` says how), `adapter` is a JSON object with the fields of `AdapterConfig`, and `signature`,
if there is one, is described in `reft_edge.signing`. Every tensor is stacked over layers (in the order of `layers`) and
position groups (one if tied, one a part of the position spec if not, one a group where `|` sets them apart), so that L layers
and G groups of rank r on a hidden size d are:

    loreft, direft     R [L, G, r, d]   W [L, G, r, d]   b [L, G, r]
    noreft             W1 [L, G, r, d]  W2 [L, G, r, d]  b [L, G, r]   b2 [L, G, r] with add_bias
    nodireft           W1 [L, G, r, d]  W2 [L, G, r, d]  b [L, G, r]
    consreft, lobireft R [L, G, r, d]   b [L, G, r]
    steering           v [L, G, 1, d]   alpha [L, G, 1]

An adapter for classification also holds its head, for K labels: head.weight [K, d], head.bias [K].

Formulas: Wu et al. 2024 (arXiv 2404.03592, section 3.2) for LoReFT and DiReFT, pyreft 0.1.0's
`interventions.py` for the others.
"""

import dataclasses
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from reft_edge.algebra import Array, Edit, Gate, LayerEdit
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.files import open_regular, write_atomically
from reft_edge.places import COMPONENTS, Place
from reft_edge.positions import Span, parse_positions
from reft_edge.storage import ROWS, STORES, data_bytes, declared, decode, encode, serialise

FORMAT = "reft-edge"
VERSIONS = ("1", "2")
INTERVENTIONS = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "steering")
LINEAR_ONLY = ("consreft", "lobireft", "steering")
POOLINGS = ("cls", "mean")
HEAD = ("head.weight", "head.bias")

_MAX_HEADER = 1 << 20
_MAX_DATA = 1 << 30
_MAX_LABELS, _MAX_LABEL = 1000, 200
_LIMITS = {"hidden_size": 1 << 20, "num_layers": 1 << 12, "rank": 1 << 12}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is and which base model it belongs to."""

    intervention: str
    """One of INTERVENTIONS."""
    base_name: str
    """The base model's name, for people."""
    base_fingerprint: str
    """The base model's fingerprint (`reft_edge.fingerprint`), for machines."""
    hidden_size: int
    num_layers: int
    """Layers of the base model."""
    layers: tuple[int, ...]
    """Layers that the adapter edits, ascending."""
    rank: int
    positions: str = "f7+l7"
    tied: bool = False
    act_fn: str = "linear"
    add_bias: bool = False
    """NoReFT only: W2 has a bias of its own."""
    prompt_format: str = "chat"
    """"chat": prompts went through the base model's chat template; "raw": they did not."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained: data digest, steps, learning rate, seed, versions, loss."""
    labels: tuple[str, ...] = ()
    """What the classification head tells apart; empty where there is no head."""
    pooling: str = ""
    """The vector that the head reads: `cls`, the first token's, or `mean`, the mean over a row's tokens."""
    component: str = "block"
    """What of each layer is edited: the output of its whole `block`, of its `attention`, or of its `mlp`."""

    def __post_init__(self) -> None:
        _check_config(self)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it acts, in the order of `layers`."""
        return tuple(Place(layer, self.component) for layer in self.layers)

    @property
    def spans(self) -> tuple[Span, ...]:
        """One gate a position group."""
        return parse_positions(self.positions, self.tied)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the file must hold."""
        if not self.labels:
            return self.edit_shapes()
        count = len(self.labels)
        return {**self.edit_shapes(), "head.weight": (count, self.hidden_size), "head.bias": (count,)}

    def edit_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same without the classification head."""
        groups = (len(self.layers), len(self.spans))
        matrix, vector = (*groups, self.rank, self.hidden_size), (*groups, self.rank)
        if self.intervention in ("loreft", "direft"):
            return {"R": matrix, "W": matrix, "b": vector}
        if self.intervention in ("noreft", "nodireft"):
            bias = {"b2": vector} if self.add_bias else {}
            return {"W1": matrix, "W2": matrix, "b": vector, **bias}
        if self.intervention == "steering":
            return {"v": matrix, "alpha": vector}
        return {"R": matrix, "b": vector}


@dataclass(frozen=True)
class Adapter:
    """An adapter's description and its unfolded parameters, shaped as `config.shapes()` says."""

    config: AdapterConfig
    tensors: dict[str, Array]

    def __post_init__(self) -> None:
        expected = self.config.shapes()
        _check_names(self.config.intervention, set(self.tensors), set(expected))
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != shape or tensor.dtype != np.float32:
                raise AdapterFileError(
                    f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; expected float32 {list(shape)}"
                )
            if not np.isfinite(tensor).all():
                raise AdapterFileError(f"tensor {name} holds NaN or infinity; train the adapter again")
        _check_folds(self.config, self.tensors)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())


def fold(adapter: Adapter) -> Edit:
    """The adapter as one linear edit (A, b, B) a place.

    Raises ReftEdgeError if its act_fn is not linear: such an edit is not affine in h.
    """
    config = adapter.config
    if config.act_fn != "linear":
        raise ReftEdgeError(
            f"the adapter's act_fn is {config.act_fn!r}, which no linear port can carry; "
            "train it with act_fn `linear` to run it on an exported model"
        )
    rows_a, bias, rows_b = folded_rows(config.intervention, adapter.tensors)
    if rows_a is None:
        rows_a = np.zeros_like(rows_b)
    gates = tuple(Gate(span) for span in config.spans)
    columns = np.repeat(np.arange(len(gates)), config.rank)
    places = {
        place: LayerEdit(
            A=np.ascontiguousarray(rows_a[i].reshape(-1, config.hidden_size).T),
            b=bias[i].reshape(-1),
            B=rows_b[i].reshape(-1, config.hidden_size),
            gates=columns,
        )
        for i, place in enumerate(config.places)
    }
    return Edit(config.hidden_size, gates, places)


def folded_rows(intervention: str, t: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Aᵀ (None where it is zero), b and B of the edit h + (hA + b)B, stacked as the tensors are; numpy or torch."""
    if intervention == "loreft":
        return t["W"] - t["R"], t["b"], t["R"]
    if intervention == "direft":
        return t["W"], t["b"], t["R"]
    if intervention == "noreft":
        return t["W1"] - t["W2"], t["b"] - t["b2"] if "b2" in t else t["b"], t["W2"]
    if intervention == "nodireft":
        return t["W1"], t["b"], t["W2"]
    if intervention == "consreft":
        return -t["R"], t["b"], t["R"]
    if intervention == "lobireft":
        return None, t["b"], t["R"]
    return None, t["alpha"], t["v"]


def _check_folds(config: AdapterConfig, tensors: Mapping[str, Array]) -> None:
    """Raise AdapterFileError if a difference that folding takes of finite numbers is beyond float32."""
    if config.act_fn != "linear":
        return
    with np.errstate(over="ignore"):
        rows_a, bias, _ = folded_rows(config.intervention, tensors)
    for name, folded in (("A", rows_a), ("b", bias)):
        given = folded is None or any(folded is tensor for tensor in tensors.values())
        if not given and not np.isfinite(folded).all():
            raise AdapterFileError(
                f"its tensors are finite, but not the {name} of h + (hA + b)B that they fold to: they hold values up to "
                f"{max(float(np.abs(tensor).max()) for tensor in tensors.values()):.3g}; train the adapter again"
            )


def save_adapter(adapter: Adapter, path: Path | str, store: str = "fp32") -> None:
    """Write the file atomically, its tensors stored as `reft_edge.storage.STORES` tells; the same adapter gives the same bytes.

    Raises ReftEdgeError if it cannot be written, or fp16 cannot hold a value.
    """
    if store not in STORES:
        raise ReftEdgeError(f"there is no storage {store!r}; expected one of {', '.join(STORES)}")
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[store != "fp32"],
        "adapter": json.dumps(dataclasses.asdict(adapter.config), allow_nan=False, separators=(",", ":")),
    }
    write_atomically(Path(path), serialise(encode(adapter.tensors, store), metadata))


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter file holds, from one reading of it: the header's metadata, and the tensors as they are stored."""

    name: str
    """The file's, for messages."""
    config: AdapterConfig
    metadata: dict[str, str]
    tensors: dict[str, NDArray[np.generic]]

    @property
    def store(self) -> str:
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
    _check_names(config.intervention, set(header), set(expected))
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


def check_size(config: AdapterConfig) -> None:
    """Raise AdapterFileError for tensors that no reader of adapter files would accept."""
    if (taken := data_bytes(declared(config.shapes(), "fp32"))) > _MAX_DATA:
        raise AdapterFileError(f"it takes {taken:,} bytes as float32; at most {_MAX_DATA:,} are accepted")


def _store(header: dict[str, Any]) -> str:
    """How the tensors of a header are stored, by the first that is a row of the hidden size."""
    for name in ROWS:
        entry = header.get(name)
        if isinstance(entry, dict):
            return {"F16": "fp16", "I8": "int8"}.get(str(entry.get("dtype")), "fp32")
    return "fp32"


def _check_names(intervention: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise AdapterFileError(
            f"a {intervention} adapter has tensors {sorted(expected)}; "
            f"missing: {missing or 'none'}, unexpected: {extra[:8] or 'none'}"
        )


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise AdapterFileError("its header is not UTF-8") from error


def parse_json(text: str, what: str) -> dict[str, Any]:
    """A stranger's JSON object, without repeated names or numbers that are not finite. Raises AdapterFileError."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if repeated := [name for name, count in counts.most_common(3) if count > 1]:
            raise AdapterFileError(f"its {what} names {repeated} twice")
        return dict(pairs)

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise AdapterFileError(f"its {what} holds {text}, which is not a finite number")
        return number

    try:
        parsed = json.loads(
            text, object_pairs_hook=without_repeats, parse_constant=finite, parse_float=finite
        )
        json.dumps(parsed, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"its {what} is not valid JSON") from error
    if not isinstance(parsed, dict):
        raise AdapterFileError(f"its {what} is not a JSON object")
    return parsed


def _check_config(config: AdapterConfig) -> None:
    def is_int(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for name in ("intervention", "base_name", "base_fingerprint", "positions", "act_fn", "prompt_format"):
        if not isinstance(getattr(config, name), str):
            raise AdapterFileError(f"{name} is {getattr(config, name)!r}; expected text")
    for name in ("base_name", "base_fingerprint"):
        if len(getattr(config, name)) > 200 or not getattr(config, name).isprintable():
            raise AdapterFileError(f"{name} is not plain text of at most 200 characters")
    for name in ("tied", "add_bias"):
        if not isinstance(getattr(config, name), bool):
            raise AdapterFileError(f"{name} is {getattr(config, name)!r}; expected true or false")
    for name, limit in _LIMITS.items():
        value = getattr(config, name)
        if not is_int(value) or not 1 <= value <= limit:
            raise AdapterFileError(f"{name} is {value!r}; expected a whole number from 1 to {limit:,}")
    if config.intervention not in INTERVENTIONS:
        raise AdapterFileError(
            f"unknown intervention {config.intervention!r}; known: {', '.join(INTERVENTIONS)}"
        )
    if config.intervention == "steering" and config.rank != 1:
        raise AdapterFileError(f"a steering vector has rank 1, not {config.rank}")
    if config.rank > config.hidden_size:
        raise AdapterFileError(f"rank {config.rank} is larger than the hidden size {config.hidden_size}")
    layers = config.layers
    if not isinstance(layers, tuple) or not layers or not all(is_int(layer) for layer in layers):
        raise AdapterFileError(f"layers are {layers!r}; expected a list of whole numbers")
    if list(layers) != sorted(set(layers)):
        raise AdapterFileError(f"layers {list(layers)} are not ascending without repeats")
    if layers[0] < 0 or layers[-1] >= config.num_layers:
        raise AdapterFileError(
            f"layers {list(layers)} go beyond a model of {config.num_layers} layers "
            f"(0 to {config.num_layers - 1})"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", config.act_fn):
        raise AdapterFileError(f"act_fn {config.act_fn!r} is not an activation's name")
    if config.intervention in LINEAR_ONLY and config.act_fn != "linear":
        raise AdapterFileError(f"{config.intervention} has no activation function; act_fn must be `linear`")
    if config.component not in COMPONENTS:
        raise AdapterFileError(f"component is {config.component!r}; expected one of {', '.join(COMPONENTS)}")
    if config.add_bias and config.intervention != "noreft":
        raise AdapterFileError("add_bias is only for noreft")
    if config.prompt_format not in ("chat", "raw"):
        raise AdapterFileError(f"prompt_format is {config.prompt_format!r}; expected `chat` or `raw`")
    if not isinstance(config.training, dict):
        raise AdapterFileError("training is not a JSON object")
    spans = parse_positions(config.positions, config.tied)
    _check_head(config)
    if config.labels and any(span.on_generated for span in spans):
        raise AdapterFileError(
            f"positions {config.positions!r}: a classifier generates no tokens; drop the part `gen`"
        )


def _check_head(config: AdapterConfig) -> None:
    labels = config.labels
    if not isinstance(labels, tuple) or not all(isinstance(label, str) for label in labels):
        raise AdapterFileError(f"labels are {labels!r:.200}; expected a list of texts")
    if not labels:
        if config.pooling != "":
            raise AdapterFileError(f"pooling is {config.pooling!r}, but there are no labels to tell apart")
        return
    if not 2 <= len(labels) <= _MAX_LABELS:
        raise AdapterFileError(f"there are {len(labels)} labels; expected 2 to {_MAX_LABELS:,}")
    if len(set(labels)) != len(labels):
        raise AdapterFileError("a label is named twice")
    for label in labels:
        if not label or len(label) > _MAX_LABEL or not label.isprintable():
            raise AdapterFileError(f"label {label[:50]!r} is not plain text of 1 to {_MAX_LABEL} characters")
    if config.pooling not in POOLINGS:
        raise AdapterFileError(f"pooling is {config.pooling!r}; expected one of {', '.join(POOLINGS)}")
