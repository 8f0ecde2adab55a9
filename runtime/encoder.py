"""`SteeredEncoder`: one exported encoder, many classification adapters, each with its head and labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Edit, scale
from reft_edge.adapter.config import AdapterConfig
from reft_edge.adapter.file import AdapterSource
from reft_edge.adapter.linear import fold
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest, load_manifest
from reft_edge.model.prompts import load_prompts
from reft_edge.model.texts import Text, TextTokens, Tokens
from reft_edge.runtime.binding import PortInputs, port_inputs
from reft_edge.runtime.devices import choose
from reft_edge.runtime.onnx_runtime import import_onnxruntime, open_graph, plain_failure
from reft_edge.runtime.required_ports import require_ports
from reft_edge.signing.keys import TrustedKeys
from reft_edge.signing.signatures import Signature, load_verified

Floats = NDArray[np.float32]
Input = Text | list[int]
"""A text, a pair of texts, or the tokens of a text with its special tokens."""
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class Classification:
    """What a classifier says of one text."""

    label: str
    """The likeliest."""
    probabilities: dict[str, float]
    """Of every label, in the adapter's order; they sum to 1."""


class EncoderSession:
    """An exported encoder graph in one onnxruntime session."""

    def __init__(
        self, graph: Path, device: str = "auto", threads: int | None = None, fuse: bool = True
    ) -> None:
        self.session = open_graph(graph, device, threads, fuse=fuse)
        chosen = choose(device, import_onnxruntime())
        self._defaults = require_ports(graph)[1] if chosen.needs_all_inputs else {}
        self._types = any(value.name == "token_type_ids" for value in self.session.get_inputs())

    def hidden_states(self, rows: Sequence[Tokens], ports: PortInputs) -> list[Floats]:
        """The last block's output for every row, `[tokens, d]`, from one right-padded batch."""
        length = max(len(row.ids) for row in rows)
        ids, types, mask = np.zeros((3, len(rows), length), np.int64)
        for i, row in enumerate(rows):
            count = len(row.ids)
            ids[i, :count], types[i, :count], mask[i, :count] = row.ids, row.types, 1
        feeds = {"input_ids": ids, "attention_mask": mask, **self._defaults, **ports}
        if self._types:
            feeds["token_type_ids"] = types
        with plain_failure():
            hidden = self.session.run(["last_hidden_state"], feeds)[0]
        return [hidden[i, : len(row.ids)] for i, row in enumerate(rows)]


@dataclass(frozen=True)
class _Loaded:
    config: AdapterConfig
    edit: Edit
    weight: Floats
    bias: Floats
    signature: Signature | None


class SteeredEncoder:
    """An exported encoder; classification adapters are loaded by name and chosen per request.

    >>> encoder = reft_edge.SteeredEncoder("minilm")
    >>> name = encoder.load_adapter("labels.safetensors")
    >>> [found] = encoder.classify(["I loved it."], name)
    >>> found.label in found.probabilities
    True
    """

    def __init__(
        self,
        folder: Path | str,
        device: str = "auto",
        threads: int | None = None,
        trusted: TrustedKeys | None = None,
    ) -> None:
        """`device`: auto (cuda or cpu) or a name that `reft-edge devices` lists. `trusted`: only adapters that one of these keys signed are loaded, and run while
        the signature is in time. Raises ReftEdgeError if the folder is not an encoder's export."""
        path = Path(folder)
        self.manifest: Manifest = load_manifest(path)
        self.manifest.check_kind("encoder", path)
        self._tokens = TextTokens.of(load_prompts(path).tokenizer, self.manifest.context_length)
        self._graph = EncoderSession(path / self.manifest.graph, device, threads)
        self._adapters: dict[str, _Loaded] = {}
        self.trusted = trusted

    @property
    def adapters(self) -> dict[str, AdapterConfig]:
        """Descriptions of the loaded adapters by name."""
        return {name: loaded.config for name, loaded in self._adapters.items()}

    @property
    def signatures(self) -> dict[str, Signature]:
        """Who signed the loaded adapters, by name; empty unless `trusted` keys were given."""
        return {name: loaded.signature for name, loaded in self._adapters.items() if loaded.signature}

    def load_adapter(self, path: AdapterSource, name: str | None = None) -> str:
        """Read, check and fold an adapter file; returns its name (by default the file's, without its ending).

        A name that is loaded already is replaced. Raises AdapterFileError for a malformed file, BaseMismatchError
        for another base model, SignatureError for one that no trusted key signed where that is asked for, ReftEdgeError
        for a layer without a port, an act_fn that no port carries, or an adapter without a head.
        """
        adapter, signature = load_verified(path, self.trusted)
        config = adapter.config
        self.manifest.check_base(config.base_fingerprint, str(path), config.base_name)
        if not config.labels:
            raise ReftEdgeError(
                f"{path} has no classification head; train one with `reft-edge train --task classification`"
            )
        edit = fold(adapter)
        port_inputs(edit, self.manifest, _FLOAT)
        name = name or Path(path).name.removesuffix(".safetensors")
        tensors = adapter.tensors
        self._adapters[name] = _Loaded(config, edit, tensors["head.weight"], tensors["head.bias"], signature)
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; nothing happens if there is none of that name."""
        self._adapters.pop(name, None)

    def adapter_size(self, name: str) -> int:
        """Bytes that a loaded adapter's weights take."""
        loaded = self._adapters[name]
        return loaded.edit.nbytes + loaded.weight.nbytes + loaded.bias.nbytes

    def embed(
        self, inputs: Sequence[Input], adapter: str | None = None, batch_size: int = 32
    ) -> tuple[list[Floats], int]:
        """Unit vectors `[d]` of texts or their tokens, pooled as the adapter's head does (mean without one), and how many
        tokens were read. Raises ReftEdgeError for an unknown adapter, an empty text, tokens that the encoder does not have,
        or an adapter under which its numbers are not finite."""
        loaded = self._loaded(adapter) if adapter is not None else None
        ports = port_inputs(loaded.edit, self.manifest, _FLOAT) if loaded else {}
        pooling = loaded.config.pooling if loaded else "mean"
        rows = self._rows(inputs)
        vectors = []
        for pooled in self._pooled(rows, ports, pooling, batch_size):
            vectors.append(pooled / max(float(np.linalg.norm(pooled)), 1e-12))
        return vectors, sum(len(row.ids) for row in rows)

    def _rows(self, inputs: Sequence[Input]) -> list[Tokens]:
        rows = [self._given(item) if isinstance(item, list) else None for item in inputs]
        texts = iter(self._tokens.batch([item for item in inputs if not isinstance(item, list)]))
        return [row if row is not None else next(texts) for row in rows]

    def _given(self, ids: list[int]) -> Tokens:
        limit, context = self._tokens.token_limit, self.manifest.context_length
        if not 0 < len(ids) <= context:
            raise ReftEdgeError(f"{len(ids)} tokens were given; this encoder reads 1 to {context}")
        if not all(0 <= token < limit for token in ids):
            raise ReftEdgeError(f"a token id is not from 0 to {limit - 1}")
        return Tokens(tuple(ids), (0,) * len(ids))

    def classify(
        self, texts: Sequence[Text], adapter: str, factor: float = 1.0, batch_size: int = 32
    ) -> list[Classification]:
        """Classify texts, or pairs of texts, of any lengths; what the encoder cannot read is cut off.

        `factor` scales the adapter's edits, not its head. Raises ReftEdgeError for an unknown adapter, a factor that
        is not finite, an empty text, or an adapter under which the encoder's numbers are not finite.
        """
        loaded = self._loaded(adapter)
        if isinstance(texts, str):
            raise ReftEdgeError("texts is one text; give a list of texts")
        if not np.isfinite(factor):
            raise ReftEdgeError(f"the scale of adapter {adapter!r} is {factor}; expected a finite number")
        return list(self._classify(self._tokens.batch(texts), loaded, factor, batch_size))

    def _loaded(self, name: str) -> _Loaded:
        if name not in self._adapters:
            raise ReftEdgeError(
                f"no adapter {name!r} is loaded; loaded: {', '.join(self._adapters) or 'none'}"
            )
        loaded = self._adapters[name]
        if loaded.signature is not None:
            loaded.signature.check_time(about=f"adapter {name!r}")
        return loaded

    def _classify(
        self, rows: list[Tokens], loaded: _Loaded, factor: float, batch_size: int
    ) -> Iterator[Classification]:
        ports = port_inputs(scale(loaded.edit, factor), self.manifest, _FLOAT) if factor else {}
        labels = loaded.config.labels
        for pooled in self._pooled(rows, ports, loaded.config.pooling, batch_size):
            shares = _softmax(loaded.weight @ pooled + loaded.bias)
            yield Classification(
                labels[int(shares.argmax())], dict(zip(labels, map(float, shares), strict=True))
            )

    def _pooled(
        self, rows: list[Tokens], ports: PortInputs, pooling: str, batch_size: int
    ) -> Iterator[Floats]:
        """One vector `[d]` a row."""
        for start in range(0, len(rows), batch_size):
            for hidden in self._graph.hidden_states(rows[start : start + batch_size], ports):
                pooled = hidden[0] if pooling == "cls" else hidden.mean(axis=0)
                if not np.isfinite(pooled).all():
                    raise ReftEdgeError(
                        "the encoder's numbers are not finite with this adapter; train it again"
                    )
                yield pooled


def _softmax(scores: Floats) -> NDArray[np.float64]:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares
