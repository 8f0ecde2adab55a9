"""One session over an exported graph, its KV cache and its bound inputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.binding import GATES
from reft_edge.runtime.devices import choose
from reft_edge.runtime.onnx_runtime import (
    ELEMENT_TYPES,
    HOST_TYPES,
    ONNX_BFLOAT16,
    OWN_KEEP,
    check_cpu,
    import_onnxruntime,
    open_graph,
    ort_value,
    plain_failure,
    zero_value,
)
from reft_edge.runtime.required_ports import require_ports
from reft_edge.runtime.rounding import check_steps, rows_alike, steps_alike
from reft_edge.runtime.step_inputs import Ids, Ones, StepInputs

PREFILL_CHUNK = 512
_CACHE_STEP = 256
_MOST_TOKENS = 1 << 31
"""ONNX Runtime counts the tokens of a cache in 32 bits."""
_MOST_HEAD = 1 << 16
_MOST_STATE = 1 << 28

Logits = NDArray[np.float32]


@dataclass
class KVCache:
    """Keys and values of one running batch, by the names of the graph's inputs.

    In a shared cache, past and present of each layer are one buffer of `capacity` tokens; in a growing one, a step
    replaces each value by a longer one.
    """

    values: dict[str, Any]
    batch: int
    capacity: int
    length: int = 0
    """Tokens that every row has been given, padding included."""


class GraphSession:
    """An exported graph, ready to prefill and decode."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: str = "auto",
        threads: int | None = None,
        prepack: bool = True,
        provider_options: Mapping[str, str] | None = None,
        changed: bytes | None = None,
        spare: bool = False,
    ) -> None:
        """As `open_graph`, of which it raises the errors."""
        self._ort = import_onnxruntime()
        chosen = choose(device, self._ort)
        accelerator = chosen.accelerator
        if accelerator.name == "cpu":
            check_cpu(manifest)
        self.session = open_graph(
            folder / manifest.graph,
            device,
            threads,
            prepack,
            provider_options=provider_options,
            changed=changed,
            spare=spare,
        )
        started = accelerator.provider in self.session.get_providers()
        self.device = accelerator.name if started else "cpu"
        """What computes, by its name for `--device`."""
        self.memory = "cuda" if self.device == "cuda" else "cpu"
        """Where the cache and the ports lie; other accelerators take them from the CPU's memory."""
        self._defaults = require_ports(folder / manifest.graph)[1] if chosen.needs_all_inputs else {}
        """Of ports, for providers that need every input."""
        self.shares_cache = manifest.cache == "shared"
        """Whether past and present of a layer are one buffer."""
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.cache_shapes = _cache_shapes(
            {name: value for name, value in inputs.items() if name.startswith("past_key_values.")}, manifest
        )
        """Heads and size of a head, by the names of the cache's inputs."""
        self._states = {name: _state(value) for name, value in inputs.items() if name.startswith("past.")}
        """Of layers that keep a state in place of keys and values: zeros, before the first token."""
        self.context_length = manifest.context_length
        """Tokens."""
        self._has_positions = "position_ids" in inputs
        self._axes = 3 if self._has_positions and len(inputs["position_ids"].shape) == 3 else 1
        """For which a model has positions: time, height and width, which are the same in text."""
        self._own_keep = [1] * len(inputs[OWN_KEEP].shape) if OWN_KEEP in inputs else None
        self._kept: dict[int, tuple[Any, Ids]] = {}
        self._keeps_logits = "reft.logits_to_keep" in manifest.ports
        self.dtype = HOST_TYPES[manifest.float_type]
        """Of float arrays given to this session; where the graph has bf16, which numpy lacks, they are converted."""
        self._bf16 = manifest.float_type == "bf16"
        self.cache_dtype = next((ELEMENT_TYPES[inputs[name].type] for name in self.cache_shapes), np.float32)
        self.cache_in_numpy = self.cache_dtype != ONNX_BFLOAT16
        """Whether the cache's numbers are of a type that numpy has."""
        self.cuts_cache = self.cache_in_numpy and not self._states
        """Whether the first tokens of a cache are the cache of these tokens."""
        self.steps_back = self.shares_cache and not self._states
        """Whether a cache's last tokens can be taken back."""
        logits = next(value for value in self.session.get_outputs() if value.name == "logits")
        self._logits_dtype = ELEMENT_TYPES[logits.type]
        self._vocabulary = logits.shape[2]
        self._default_values = self.to_device(self._defaults)
        self._spare: list[KVCache] = []
        self.ones = Ones()
        if chosen.needs_all_inputs:
            check_steps(self)

    def to_device(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
        """Arrays as values that can be bound again and again without a copy."""
        return {name: self._to_device(array) for name, array in arrays.items()}

    def check_cache(self) -> None:
        """Raise ReftEdgeError if the graph has no KV cache."""
        if not self.cache_shapes:
            raise ReftEdgeError(
                "this folder's graph has no KV cache, so it can score text (SteeredModel.logits) but not generate; "
                "export the model again with past_key_values inputs and add ports to that"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        each = 2 if self.cache_dtype == ONNX_BFLOAT16 else np.dtype(self.cache_dtype).itemsize
        return each * sum(heads * size for heads, size in self.cache_shapes.values())

    @cached_property
    def rounds_rows_alike(self) -> bool:
        """Whether a row that is decoded alone has, bit for bit, the numbers that it has beside another."""
        return rows_alike(self)

    @cached_property
    def rounds_steps_alike(self) -> bool:
        """Whether a token that runs with those before it has, bit for bit, the numbers that it has by itself."""
        return steps_alike(self)

    def take_cache(self, batch: int, tokens: int) -> KVCache:
        """An empty cache for at least `tokens` tokens; give it back with `return_cache` when done."""
        while self._spare:
            cache = self._spare.pop()
            if cache.batch == batch and cache.capacity >= tokens:
                cache.length = 0
                return cache
        if not self.shares_cache:
            return KVCache(self._empty_pasts(batch, 0, self.memory), batch, tokens)
        capacity = -(-tokens // _CACHE_STEP) * _CACHE_STEP
        return KVCache(self._empty_pasts(batch, capacity, self.memory), batch, capacity)

    def return_cache(self, cache: KVCache) -> None:
        """Keep a shared cache's buffers for the next request."""
        if self.shares_cache:
            self._spare = [cache]

    def bind(self, cache: KVCache, ports: Mapping[str, Any]) -> "BoundSession":
        """Bind cache and ports once; the result runs any number of steps."""
        return BoundSession(self, cache, ports)

    def new_binding(self, ports: Mapping[str, Any]) -> Any:
        """An I/O binding with port inputs, and only the last token's logits asked for.

        ONNX Runtime reads arrays where they lie: whoever keeps the binding keeps `ports`, too.
        """
        binding = self.session.io_binding()
        ports = {**self._default_values, **ports}
        for name, value in ports.items():
            binding.bind_ortvalue_input(name, value)
        self._keep(binding, 1)
        return binding

    def bind_logits(self, binding: Any, rows: int, tokens: int = 1) -> Any:
        """Memory for the logits of the last `tokens` tokens of every run with this binding, or None where the graph gives
        them for all tokens."""
        if not self._keeps_logits and self._own_keep is None:
            binding.bind_output("logits", "cpu")
            return None
        self._keep(binding, tokens)
        shape = [rows, tokens, self._vocabulary]
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, self._logits_dtype, "cpu")
        binding.bind_ortvalue_output("logits", value)
        return value

    def _keep(self, binding: Any, tokens: int) -> None:
        """Ask for the logits of the last `tokens` tokens, where the graph can be asked."""
        if tokens not in self._kept:
            own = np.full(self._own_keep or [1], tokens, np.int64)
            self._kept[tokens] = self._to_device(np.array(tokens, np.int64)), own
        kept, own = self._kept[tokens]
        if self._keeps_logits:
            binding.bind_ortvalue_input("reft.logits_to_keep", kept)
        if self._own_keep is not None:
            binding.bind_cpu_input(OWN_KEEP, own)

    def step_inputs(self, binding: Any) -> StepInputs:
        """The tokens, mask and positions of runs with this binding."""
        return StepInputs(binding, self.device == "cpu")

    def run_bound(self, inputs: StepInputs, ids: Ids, mask: Ids, starts: Sequence[int]) -> None:
        """Run with what is bound and these tokens `[rows, tokens]`, mask `[rows, past and tokens]`, and each row's tokens
        before them."""
        inputs.give("input_ids", ids)
        inputs.give_mask(mask)
        if self._has_positions:
            positions = np.array(starts, np.int64)[:, None] + np.arange(ids.shape[1])
            inputs.give("position_ids", self._on_axes(positions))
        with plain_failure():
            self.session.run_with_iobinding(inputs.binding)

    def score(self, rows: Sequence[Sequence[int]], ports: Mapping[str, NDArray[np.generic]]) -> list[Logits]:
        """Logits of every token, `[tokens, vocabulary]` a row, from one right-padded batch without a cache.

        `ports`: for all rows, or with one value a row.
        """
        if self._states and len(rows) > 1:  # padding would count
            return [self.score([row], _of_row(ports, i, len(rows)))[0] for i, row in enumerate(rows)]
        length = max(len(row) for row in rows)
        ids, mask = np.zeros((2, len(rows), length), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": ids,
            "attention_mask": mask,
            **self._defaults,
            **ports,
        }
        if self._has_positions:
            feeds["position_ids"] = self._on_axes(np.tile(np.arange(length), (len(rows), 1)))
        if self._own_keep is not None:
            feeds[OWN_KEEP] = np.zeros(self._own_keep, np.int64)
        values = {name: ort_value(array, self._bf16) for name, array in feeds.items()}
        values.update(self._empty_pasts(len(rows), 0, "cpu"))
        with plain_failure():
            logits = self.session.run_with_ort_values(["logits"], values)[0].numpy()
        logits = logits.astype(np.float32, copy=False)
        return [logits[i, : len(row)] for i, row in enumerate(rows)]

    def _empty_pasts(self, batch: int, capacity: int, device: str) -> dict[str, Any]:
        """Zeros: CUDA's kernels multiply what lies behind a row's last token by 0, and memory that held something else may
        hold what is no number."""
        with plain_failure():
            return {
                name: zero_value([batch, heads, capacity, size], self.cache_dtype, device)
                for name, (heads, size) in self.cache_shapes.items()
            } | {
                name: self._ort.OrtValue.ortvalue_from_numpy(np.repeat(state, batch, axis=0), device)
                for name, state in self._states.items()
            }

    def _on_axes(self, positions: Ids) -> Ids:
        return positions if self._axes == 1 else np.tile(positions, (self._axes, 1, 1))

    def _to_device(self, array: NDArray[np.generic]) -> Any:
        return ort_value(array, self._bf16, self.memory)


class BoundSession:
    """A cache and a set of port inputs, bound to the session through I/O binding."""

    def __init__(self, graph: GraphSession, cache: KVCache, ports: Mapping[str, Any]) -> None:
        self._graph, self._cache, self._ports = graph, cache, ports
        self._binding = graph.new_binding(ports)
        self._inputs = graph.step_inputs(self._binding)
        if not graph.shares_cache:
            return
        for name, value in cache.values.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(present_name(name), value)
        self._logits, self._kept = graph.bind_logits(self._binding, cache.batch), 1

    def step(self, ids: Ids) -> Logits:
        """Run `ids [batch, tokens]` after what the cache holds; logits of the last token, `[batch, vocabulary]`."""
        return self._run(ids, 1)[:, -1]

    def step_all(self, ids: Ids, length: int) -> Logits:
        """Run `ids [batch, tokens]` after the first `length` tokens of a shared cache; logits of each,
        `[batch, tokens, vocabulary]`."""
        self._cache.length = length
        return self._run(ids, ids.shape[1])

    def _run(self, ids: Ids, kept: int) -> Logits:
        cache = self._cache
        total = cache.length + ids.shape[1]
        if total > cache.capacity:
            raise ReftEdgeError(f"the KV cache holds {cache.capacity} tokens; {total} were asked for")
        if not self._graph.shares_cache:
            self._bind_grown()
        elif kept != self._kept:
            self._logits, self._kept = self._graph.bind_logits(self._binding, cache.batch, kept), kept
        mask = self._graph.ones(cache.batch, total)
        self._graph.run_bound(self._inputs, ids, mask, [cache.length] * cache.batch)
        cache.length = total
        if self._graph.shares_cache and self._logits is not None:
            logits = self._logits
        else:
            *presents, logits = self._binding.get_outputs()
            cache.values = dict(zip(cache.values, presents, strict=True))
        found: Logits = logits.numpy()[:, -kept:].astype(np.float32, copy=False)
        return found

    def _bind_grown(self) -> None:
        """The last run's outputs become the cache; this run's are made anew."""
        self._binding.clear_binding_outputs()
        for name, value in self._cache.values.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_output(present_name(name), self._graph.memory)
        self._binding.bind_output("logits", "cpu")

    def prefill(self, ids: Ids, chunk: int = PREFILL_CHUNK) -> Logits:
        """Run a whole prompt in chunks, which bounds memory on long ones; logits of its last token."""
        for start in range(0, ids.shape[1], chunk):
            logits = self.step(ids[:, start : start + chunk])
        return logits


def _cache_shapes(inputs: Mapping[str, Any], manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Heads and size of a head of every cache's input; layers may have sizes of their own. Raises ReftEdgeError where the
    graph and the manifest do not agree, or for a context or a head that no runtime can have."""
    sizes = {value.shape[3] for value in inputs.values() if isinstance(value.shape[3], int)}
    for value in inputs.values():
        if not isinstance(value.shape[1], int) or (sizes and manifest.head_size not in sizes):
            raise ReftEdgeError(
                f"the graph's {value.name} has the shape {value.shape}, and the manifest says head_size {manifest.head_size}; "
                "export the model again"
            )
    if manifest.context_length >= _MOST_TOKENS or max(sizes | {manifest.head_size}) > _MOST_HEAD:
        raise ReftEdgeError(
            f"the manifest says context_length {manifest.context_length} and head_size {manifest.head_size}; expected fewer than "
            f"{_MOST_TOKENS} and at most {_MOST_HEAD}: export the model again"
        )
    return {
        name: (value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else manifest.head_size)
        for name, value in inputs.items()
    }


def _state(value: Any) -> NDArray[np.generic]:
    """The state of one row before its first token. Raises ReftEdgeError for a shape or a type that no export writes."""
    _, *sizes = value.shape
    kind = ELEMENT_TYPES.get(value.type)
    if kind not in (np.float32, np.float16) or not all(isinstance(size, int) for size in sizes):
        raise ReftEdgeError(
            f"the graph's {value.name} has the shape {value.shape} and the type {value.type}; expected fixed sizes and 32-bit "
            "or 16-bit floats: export the model again"
        )
    if math.prod(sizes) > _MOST_STATE:
        raise ReftEdgeError(f"the graph's {value.name} has the shape {value.shape}, too large for a state")
    return np.zeros((1, *sizes), kind)


def _of_row(ports: Mapping[str, NDArray[np.generic]], row: int, rows: int) -> dict[str, NDArray[np.generic]]:
    """What of a batch's port inputs is for one row."""
    own = [name for name in ("reft.prompt_len", *GATES) if name in ports and len(ports[name]) == rows]
    return {**ports, **{name: ports[name][row : row + 1] for name in own}}


def present_name(past: str) -> str:
    """The output that goes with a cache's input."""
    return past.replace("past_key_values", "present").replace("past.", "present.")
