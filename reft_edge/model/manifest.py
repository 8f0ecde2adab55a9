"""The manifest of an exported folder, `reft_edge.json`: which base it is, its ports, and how it was verified."""

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.files import decode_text
from reft_edge.folders import restore_folder
from reft_edge.model.places import COMPONENTS, PORT_KINDS, Place

MANIFEST = "reft_edge.json"
VERSION = 1
_TUPLES = ("layers", "eos_token_ids", "components", "port_kinds")
CACHES = ("shared", "growing", "none")
FLOAT_TYPES = ("fp32", "fp16", "bf16")
_MAX_SIZE = 8 << 20
_TEXTS = ("base_name", "base_fingerprint", "architecture", "precision", "device", "kind", "source", "graph")


@dataclass(frozen=True)
class Manifest:
    """What a runtime needs to know of an exported folder before it binds an adapter."""

    base_name: str
    base_fingerprint: str
    architecture: str
    precision: str
    hidden_size: int
    num_layers: int
    """Layers of the base model."""
    layers: tuple[int, ...]
    """Layers that have a port."""
    head_size: int
    context_length: int
    """Tokens."""
    eos_token_ids: tuple[int, ...]
    ports: dict[str, list[str | int]]
    """Port inputs of the graph and their shapes, for people and other runtimes; names stand for any size."""
    verification: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    float_type: str = "fp32"
    """Of the residual stream, and so of the ports' inputs: fp32, fp16 or bf16."""
    device: str = "cpu"
    """What the graph was built for: cpu or cuda."""
    quantisation: dict[str, Any] = field(default_factory=dict)
    """How weights were rounded: algorithm, block_size, accuracy_level; empty where they were not."""
    kind: str = "decoder"
    """`decoder`: the graph continues text; `encoder`: its output is the last block's hidden states."""
    cache: str = "shared"
    """How the graph keeps keys and values: shared (past and present are one buffer, as in onnxruntime-genai's graphs),
    growing (each run gives back longer ones), or none (it can score text but not generate)."""
    source: str = "export"
    """What wrote the folder: export, or add-ports, for a graph that came from elsewhere."""
    components: tuple[str, ...] = ("block",)
    """What of each of `layers` has a port."""
    port_kinds: tuple[str, ...] = ("affine",)
    """What ports can add, of PORT_KINDS."""
    graph: str = "model.onnx"
    version: int = VERSION

    @property
    def places(self) -> tuple[Place, ...]:
        """Every place that has a port."""
        return tuple(Place(layer, component) for layer in self.layers for component in self.components)

    def check_kind(self, kind: str, folder: Path) -> None:
        """Raise ReftEdgeError unless the folder holds that kind of model."""
        if self.kind != kind:
            use = {"decoder": "SteeredModel", "encoder": "SteeredEncoder"}.get(self.kind, "a newer reft-edge")
            raise ReftEdgeError(f"{folder} holds the {self.kind} {self.base_name}; use {use} for it")

    def check_base(self, fingerprint: str, adapter: str, base_name: str) -> None:
        """Raise BaseMismatchError unless the adapter was trained on this base."""
        if fingerprint != self.base_fingerprint:
            raise BaseMismatchError(
                f"{adapter} was trained on another base model: on {base_name} with fingerprint {fingerprint}, "
                f"while this folder holds {self.base_name} with fingerprint {self.base_fingerprint}; "
                "export that base, or train the adapter on this one"
            )


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `reft_edge.json` into a folder that is still being made."""
    (folder / MANIFEST).write_text(
        json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8"
    )


def load_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest. Raises ReftEdgeError if it is missing, malformed or of another version."""
    restore_folder(folder)
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_SIZE + 1)
        if len(content) > _MAX_SIZE:
            raise ReftEdgeError(f"{path} is larger than {_MAX_SIZE:,} bytes; it is no manifest")
        fields = json.loads(decode_text(content, path))
    except FileNotFoundError as error:
        raise ReftEdgeError(
            f"{folder} is not an exported model: it has no {MANIFEST}; "
            f"make one with `reft-edge export MODEL -o {folder}`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ReftEdgeError(f"cannot read {path}: {error}") from error
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        found = fields.get("version") if isinstance(fields, dict) else None
        raise ReftEdgeError(
            f"{path} has version {found!r:.50}; this reft-edge reads {VERSION}: export the model again"
        )
    try:
        if unknown := sorted(fields.keys() - {known.name for known in dataclasses.fields(Manifest)}):
            raise ReftEdgeError(f"it has unknown fields {unknown[:8]!r:.300}")
        lists = {name: _listed(name, value) for name, value in fields.items() if name in _TUPLES}
        manifest = Manifest(**{**fields, **lists})
        _check(manifest)
    except (TypeError, ReftEdgeError) as error:
        raise ReftEdgeError(f"{path} is malformed ({error!s:.500}); export the model again") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ReftEdgeError for a field of another type, or with a value that no export writes."""
    for name in _TEXTS:
        value = getattr(manifest, name)
        if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
            raise ReftEdgeError(f"{name} is not plain text of at most 200 characters")
    for name in ("hidden_size", "num_layers", "head_size", "context_length"):
        if not _is_count(getattr(manifest, name), 1):
            raise ReftEdgeError(f"{name} is {getattr(manifest, name)!r:.50}; expected a whole number from 1")
    for name in ("layers", "eos_token_ids"):
        if not all(_is_count(value, 0) for value in getattr(manifest, name)):
            raise ReftEdgeError(f"{name} is not a list of whole numbers")
    if any(layer >= manifest.num_layers for layer in manifest.layers):
        raise ReftEdgeError(f"layers go beyond a model of {manifest.num_layers}")
    for name in ("ports", "verification", "versions", "quantisation"):
        if not isinstance(getattr(manifest, name), dict):
            raise ReftEdgeError(f"{name} is not a JSON object")
    for name, known in (
        ("components", COMPONENTS),
        ("port_kinds", PORT_KINDS),
        ("cache", CACHES),
        ("float_type", FLOAT_TYPES),
    ):
        values = getattr(manifest, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value not in known:
                raise ReftEdgeError(f"{name}: {value!r:.50} is unknown; expected of {', '.join(known)}")
    if Path(manifest.graph).name != manifest.graph or manifest.graph in ("", ".."):
        raise ReftEdgeError(f"it names a graph outside its folder: {manifest.graph!r}")


def _listed(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise ReftEdgeError(f"{name} is {value!r:.50}; expected a list")
    return tuple(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 40


def package_versions(*packages: str) -> dict[str, str]:
    """What wrote a folder: the installed version of each package."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
