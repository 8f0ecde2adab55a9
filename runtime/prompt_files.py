"""Prompts on disk: what long prompts left in the KV cache, so that it need not be computed again after a restart.

A file is one prompt under one choice of adapters: a safetensors file with the tensor `ids` and the keys and values of every
layer, in the cache's own type. Its metadata names the model and the adapters by fingerprints, and it is used with these only.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Edit
from reft_edge.errors import AdapterFileError, ReftEdgeError
from reft_edge.files import check_place, open_regular, write_atomically
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.onnx_runtime import import_onnxruntime
from reft_edge.runtime.prefix import Prefix, shared
from reft_edge.runtime.session import GraphSession
from reft_edge.strict_json import parse_json

BUDGET = 2 << 30
"""Bytes of all files in a folder."""
LEAST_NEW = 128
"""Tokens that a prompt has beyond all files before it is written to one."""
_FORMAT, _VERSION = "reft-edge prompt", "1"
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_MAX_HEADER = 1 << 20
_WRITES = 2
"""Prompts that wait for the disk at most; others are not written."""
_PIECES, _PIECE = 1024, 1024
"""Of a large file, evenly spaced, and bytes of each: what its fingerprint is made of."""
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8"}
_IDS = np.dtype("<i8")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """A file that was looked at."""

    ids: NDArray[np.int64]
    adapters: str


class PromptFiles:
    """A folder of prompts for one model. Any number of threads and processes may use it."""

    def __init__(
        self,
        folder: Path,
        model: str,
        shapes: Mapping[str, tuple[int, int]],
        dtype: Any,
        context: int,
        budget: int = BUDGET,
    ) -> None:
        """`model`: `fingerprint_of` it; `shapes`: heads and size of a head, by the names of the cache's inputs; `context`: most
        tokens of a prompt; `budget`: bytes of all files in the folder, beyond which those that were not used for longest are
        removed.

        Files that are not of this model are left alone, and one warning says so. Raises ReftEdgeError if the folder cannot
        be made or written.
        """
        self.folder, self.budget, self._context = folder, budget, context
        self._model, self._shapes, self._dtype = model, dict(sorted(shapes.items())), np.dtype(dtype)
        self._known: dict[str, _Known] = {}
        self._waiting: dict[str, _Known] = {}
        self._said: set[str] = set()
        self._lock = threading.Lock()
        """Of the three above; never held while a file is read or written."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ReftEdgeError(
                f"cannot make the folder {folder} for prompts: {error.strerror}; choose another place"
            ) from error
        check_place(folder / "prompt.safetensors")
        self._look()
        self._writer = ThreadPoolExecutor(1, "reft-edge prompts")

    def find(self, ids: Sequence[int], edit: Edit | None, beyond: int, most: int) -> Prefix | None:
        """The prompt that shares most tokens with this one under the same adapters, read from its file. None if none shares
        LEAST_NEW more than `beyond`, or takes `most` bytes or less."""
        count, name = self._best(ids, edit, most)
        if name is None or count < beyond + LEAST_NEW:
            return None
        try:
            with open_regular(self.folder / name, follow=False) as file:
                known = self._checked(file)
                prefix = Prefix(tuple(known.ids.tolist()), edit, self._read(file, len(known.ids)))
            os.utime(self.folder / name)
        except (OSError, ReftEdgeError) as error:
            self._drop(name)
            if not isinstance(error, FileNotFoundError):
                self._say(f"prompt cache: {self.folder / name} is not used: {_reason(error)}")
            return None
        return prefix if known.adapters == _adapters(edit) else None

    def save(self, prefix: Prefix) -> None:
        """Have a prompt written, in another thread, unless the files have nearly all of it already."""
        if prefix.size > self.budget:
            return
        if len(prefix.ids) - self._best(prefix.ids, prefix.edit, self.budget, waiting=True)[0] < LEAST_NEW:
            return
        name = self._name(prefix)
        with self._lock:
            if len(self._waiting) >= _WRITES:
                return
            self._waiting[name] = _Known(np.array(prefix.ids, _IDS), _adapters(prefix.edit))
        try:
            self._writer.submit(self._write, name, prefix)
        except RuntimeError:  # it was closed
            del self._waiting[name]

    def close(self) -> None:
        """Wait until everything is written; nothing more is."""
        self._writer.shutdown()

    def _best(
        self, ids: Sequence[int], edit: Edit | None, most: int, waiting: bool = False
    ) -> tuple[int, str | None]:
        """How many first tokens of a prompt a file has, or one that is `waiting` to be written, and which."""
        adapters = _adapters(edit)
        with self._lock:
            known = {**self._known, **(self._waiting if waiting else {})}
        found = [
            (shared(entry.ids, ids, edit), name)
            for name, entry in known.items()
            if entry.adapters == adapters and self._bytes(len(entry.ids)) <= most
        ]
        return max(found, default=(0, None))

    def _look(self) -> None:
        """Look at every file's header."""
        refused: list[tuple[str, str]] = []
        for name in self._names():
            try:
                with open_regular(self.folder / name, follow=False) as file:
                    self._known[name] = self._checked(file)
            except (OSError, ReftEdgeError) as error:
                refused.append((name, _reason(error)))
        if refused:
            name, reason = refused[0]
            others = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            self._say(f"prompt cache: not used in {self.folder}: {name} ({reason}){others}")

    def _names(self) -> list[str]:
        with suppress(OSError), os.scandir(self.folder) as entries:
            return sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name))
        return []

    def _header(self, tokens: int, adapters: str) -> dict[str, Any]:
        """What the header of a file with so many tokens says."""
        kind, at = _DTYPES[self._dtype.name], tokens * _IDS.itemsize
        header: dict[str, Any] = {
            "__metadata__": {
                "format": _FORMAT,
                "version": _VERSION,
                "model": self._model,
                "adapters": adapters,
            },
            "ids": {"dtype": "I64", "shape": [tokens], "data_offsets": [0, at]},
        }
        for name, (heads, size) in self._shapes.items():
            end = at + heads * tokens * size * self._dtype.itemsize
            header[name] = {"dtype": kind, "shape": [heads, tokens, size], "data_offsets": [at, end]}
            at = end
        return header

    def _bytes(self, tokens: int) -> int:
        """Of the keys and values of so many tokens."""
        each: int = sum(heads * size for heads, size in self._shapes.values()) * self._dtype.itemsize
        return tokens * each

    def _checked(self, file: BinaryIO) -> _Known:
        """An open file's prompt, once its header is known to be what this model writes; the file is then at its keys and
        values. Raises OSError or ReftEdgeError."""
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise ReftEdgeError("it is no file of a prompt")
        try:
            header = parse_json(file.read(length).decode(), "header")
        except (UnicodeDecodeError, AdapterFileError) as error:
            raise ReftEdgeError("it is no file of a prompt") from error
        said = header.get("__metadata__")
        if not isinstance(said, dict) or (said.get("format"), said.get("version")) != (_FORMAT, _VERSION):
            raise ReftEdgeError("it is no file of a prompt, or of another version of reft-edge")
        if said.get("model") != self._model:
            raise ReftEdgeError("it is of another model, or of this one before it changed")
        entry = header.get("ids")
        tokens = entry["shape"][0] if isinstance(entry, dict) and _is_row(entry.get("shape")) else 0
        tokens = min(tokens, self._context)
        size = os.fstat(file.fileno()).st_size
        whole = 8 + length + tokens * _IDS.itemsize + self._bytes(tokens)
        if header != self._header(tokens, str(said.get("adapters"))) or size != whole:
            raise ReftEdgeError("its tensors are not those of this model, or it was cut")
        ids = np.frombuffer(_exactly(file, tokens * _IDS.itemsize), _IDS)
        return _Known(ids, said["adapters"])

    def _read(self, file: BinaryIO, tokens: int) -> dict[str, NDArray[np.generic]]:
        found: dict[str, NDArray[np.generic]] = {}
        for name, (heads, size) in self._shapes.items():
            content = _exactly(file, heads * tokens * size * self._dtype.itemsize)
            found[name] = np.frombuffer(content, self._dtype).reshape(heads, tokens, size)
        return found

    def _name(self, prefix: Prefix) -> str:
        digest = hashlib.sha256(f"{self._model} {_adapters(prefix.edit)} ".encode())
        digest.update(np.array(prefix.ids, _IDS).tobytes())
        return f"{digest.hexdigest()[:32]}.safetensors"

    def _write(self, name: str, prefix: Prefix) -> None:
        try:
            pieces = self._pieces(prefix)
            self._make_room(sum(map(len, pieces)))
            write_atomically(self.folder / name, pieces, mode=0o600)
        except (OSError, ReftEdgeError, MemoryError) as error:
            self._say(f"prompt cache: {_reason(error)}")
        else:
            self._replace(name, self._waiting[name], prefix.edit)
        finally:
            with self._lock:
                del self._waiting[name]

    def _pieces(self, prefix: Prefix) -> list[bytes | memoryview]:
        """A file's content."""
        header = json.dumps(self._header(len(prefix.ids), _adapters(prefix.edit))).encode()
        header += b" " * (-len(header) % 8)
        start = len(header).to_bytes(8, "little") + header + np.array(prefix.ids, _IDS).tobytes()
        arrays = [np.ascontiguousarray(prefix.content[name]) for name in self._shapes]
        return [start, *(array.data.cast("B") for array in arrays)]

    def _make_room(self, more: int) -> None:
        """Remove what was not used for longest until `more` bytes fit. Raises OSError."""
        found = []
        for name in self._names():
            with suppress(FileNotFoundError):
                stat = os.stat(self.folder / name, follow_symlinks=False)
                found.append((stat.st_mtime_ns, stat.st_size, name))
        size = sum(size for _, size, _ in found)
        for _, taken, name in sorted(found):
            if size + more <= self.budget:
                return
            self._remove(name)
            size -= taken

    def _replace(self, name: str, new: _Known, edit: Edit | None) -> None:
        """Know a new file, and remove those that it makes needless."""
        with self._lock:
            needless = [
                other
                for other, old in self._known.items()
                if other != name
                and old.adapters == new.adapters
                and shared(new.ids, old.ids, edit) >= len(old.ids) - 1
            ]
            self._known[name] = new
        for other in needless:
            self._remove(other)

    def _remove(self, name: str) -> None:
        self._drop(name)
        with suppress(FileNotFoundError):
            (self.folder / name).unlink()

    def _drop(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)

    def _say(self, message: str) -> None:
        """A warning, once."""
        with self._lock:
            new = message not in self._said
            self._said.add(message)
        if new:
            _log.warning(message)


def open_prompts(
    folder: Path, export: Path, manifest: Manifest, graph: GraphSession, budget: int = BUDGET
) -> PromptFiles:
    """A folder of prompts for an exported model that is loaded. Raises ReftEdgeError as `PromptFiles` does, and for a model
    whose cache cannot be cut where prompts begin to differ."""
    if not graph.cuts_cache:
        raise ReftEdgeError(
            "prompts of this model cannot be kept: its layers hold a state in place of keys and values, or its cache is of a "
            "type that numpy lacks; leave out the prompt cache"
        )
    return PromptFiles(
        folder,
        fingerprint_of(export, manifest, graph),
        graph.cache_shapes,
        graph.cache_dtype,
        graph.context_length,
        budget,
    )


def fingerprint_of(export: Path, manifest: Manifest, graph: GraphSession) -> str:
    """Hex SHA-256 of what an exported model's keys and values depend on: the manifest, samples of the graph's files and of its
    weights, what runs it, and the cache's type."""
    ran_by = [import_onnxruntime().__version__, graph.device, np.dtype(graph.cache_dtype).name]
    digest = hashlib.sha256(json.dumps([asdict(manifest), *ran_by], sort_keys=True).encode())
    for path in sorted(export.glob(f"{manifest.graph}*")):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}\n".encode())
            step = max(_PIECE, size // _PIECES)
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _adapters(edit: Edit | None) -> str:
    return "none" if edit is None else edit.digest


def _is_row(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 < shape[0] < 1 << 31


def _exactly(file: BinaryIO, size: int) -> bytearray:
    """So many bytes. Raises OSError if there are fewer."""
    content = bytearray(size)
    if file.readinto(content) != size:  # type: ignore[attr-defined]
        raise OSError(5, "it was cut")
    return content


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
