"""`SteeredModel`: one exported model, many adapters, text in and out."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reft_edge.adapter.algebra import Edit, concat, scale
from reft_edge.adapter.config import AdapterConfig
from reft_edge.adapter.file import AdapterSource
from reft_edge.adapter.linear import fold
from reft_edge.adapter.triggers import check_ids
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import load_manifest
from reft_edge.model.prompts import Message, Prompts, choose_format, load_prompts
from reft_edge.runtime.batch import Batch
from reft_edge.runtime.binding import Bound, PortInputs, gate_inputs, port_inputs
from reft_edge.runtime.constraints import Constraint, Constraints
from reft_edge.runtime.generation import Generation
from reft_edge.runtime.int8_cache import open_session
from reft_edge.runtime.mixes import BUDGET, Mixes
from reft_edge.runtime.prefix import PrefixCache
from reft_edge.runtime.prompt_files import BUDGET as PROMPT_BUDGET
from reft_edge.runtime.prompt_files import open_prompts
from reft_edge.runtime.request import Piece, Request, Row
from reft_edge.runtime.room import PREFIX_SHARE, usual_budget
from reft_edge.runtime.sampling import Sampling
from reft_edge.runtime.session import Logits
from reft_edge.runtime.speculation import StepCosts, speculation_for
from reft_edge.signing.keys import TrustedKeys
from reft_edge.signing.signatures import Signature, load_verified

AdapterChoice = str | Sequence[str] | Mapping[str, float] | None
"""No adapter, one by name, several by name, or several with a scale each."""


@dataclass(frozen=True)
class _Loaded:
    config: AdapterConfig
    edit: Edit
    signature: Signature | None


class SteeredModel:
    """An exported folder in one onnxruntime session; adapters are loaded by name and chosen per request.

    Swapping adapters binds other inputs and needs no new session.

    >>> model = reft_edge.SteeredModel("smol")
    >>> name = model.load_adapter("pirate.safetensors")
    >>> for piece in model.stream("Who are you?", name, max_tokens=8):
    ...     text = piece
    >>> answer = model.generate("Who are you?", {"pirate": 0.5}, max_tokens=8)
    """

    def __init__(
        self,
        folder: Path | str,
        device: str = "auto",
        threads: int | None = None,
        trusted: TrustedKeys | None = None,
        provider_options: Mapping[str, str] | None = None,
        mix_budget: int = BUDGET,
        cache_type: str = "auto",
    ) -> None:
        """`device`: auto (cuda or cpu) or a name that `reft-edge devices` lists. `trusted`: only adapters that one of these keys signed are loaded, and run while
        the signature is in time. `provider_options`: of the device's execution provider. `mix_budget`: bytes of one mix of
        adapters at most, and of all mixes that are kept. `cache_type`: auto, what the graph has, or int8, a quarter of the
        memory. Raises ReftEdgeError if the folder is not an export or cannot be loaded."""
        self.folder = path = Path(folder)
        self.manifest = load_manifest(path)
        self.manifest.check_kind("decoder", path)
        self.prompts: Prompts = load_prompts(path)
        self.trusted = trusted
        self.graph = open_session(
            path, self.manifest, self.prompts, cache_type, device, threads, provider_options
        )
        self._prefixes: PrefixCache | None = None
        self._lock = threading.Lock()
        self._adapters: dict[str, _Loaded] = {}
        self._mixes = Mixes(self.graph, self.manifest, mix_budget)
        self._constraints = Constraints(self.prompts.tokenizer, self.manifest.eos_token_ids)
        self._costs = StepCosts()

    @property
    def adapters(self) -> dict[str, AdapterConfig]:
        """Descriptions of the loaded adapters by name."""
        return {name: loaded.config for name, loaded in self._adapters.items()}

    @property
    def signatures(self) -> dict[str, Signature]:
        """Who signed the loaded adapters, by name; empty unless `trusted` keys were given."""
        return {name: loaded.signature for name, loaded in self._adapters.items() if loaded.signature}

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the graph runs."""
        return self.graph.device

    def keep_prompts(self, folder: Path | str | None = None, size: int = PROMPT_BUDGET) -> None:
        """From now on, `stream` remembers prompts for those that begin alike, such as the next turn of a conversation. With a
        `folder`, long ones outlast the process, in files of at most `size` bytes together.

        Raises ReftEdgeError for a folder that cannot be used, or a model whose prompts cannot be kept in one.
        """
        files = None
        if folder is not None:
            files = open_prompts(Path(folder), self.folder, self.manifest, self.graph, size)
        budget = usual_budget(self.graph) // PREFIX_SHARE if self.graph.cuts_cache else 0
        self._prefixes = PrefixCache(budget, files)

    def load_adapter(self, path: AdapterSource, name: str | None = None) -> str:
        """Read, check and fold an adapter file; returns its name (by default the file's, without its ending).

        A name that is loaded already is replaced. Raises AdapterFileError for a malformed file, BaseMismatchError
        for another base model, SignatureError for one that no trusted key signed where that is asked for, ReftEdgeError
        for a layer without a port, an act_fn that no port carries, or a trigger of tokens that the model lacks.
        """
        adapter, signature = load_verified(path, self.trusted)
        self.manifest.check_base(adapter.config.base_fingerprint, str(path), adapter.config.base_name)
        if adapter.config.labels:
            raise ReftEdgeError(f"{path} classifies texts with a head of its own; this model continues text")
        edit = fold(adapter)
        port_inputs(edit, self.manifest, self.graph.dtype)
        for trigger in edit.triggers:
            check_ids(trigger, self.prompts.token_limit)
        name = name or Path(path).name.removesuffix(".safetensors")
        with self._lock:
            self._forget(name)
            self._adapters[name] = _Loaded(adapter.config, edit, signature)
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; nothing happens if there is none of that name."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._adapters.pop(name, None)
        self._mixes.forget(name)

    def generate(self, prompt: str | list[Message], adapter: AdapterChoice = None, **options: Any) -> str:
        """The whole answer; options as for `stream`."""
        return self.stream(prompt, adapter, **options).text()

    def stream(
        self,
        prompt: str | list[Message],
        adapter: AdapterChoice = None,
        *,
        raw: bool | None = None,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        schema: Mapping[str, Any] | None = None,
        constraint: Constraint | None = None,
        speculate: bool | None = None,
    ) -> Generation:
        """The answer piece by piece.

        `prompt`: a user message or a list of {"role", "content"}. `raw`: True takes the prompt as it stands, False
        puts it through the chat template, None does what the adapters were trained with (without an adapter: the
        template, if there is one). `max_tokens`: at most that many new tokens. `stop`: strings that end the answer
        and are left out of it. `schema`: a JSON schema that the answer is valid under; `constraint`: any form that it
        must have. Both need the extra `structured`. An answer that `max_tokens` cuts has the finish_reason `length`.
        `speculate`: guess tokens from the prompt and the answer, as `batch` says.

        Raises ReftEdgeError for an unknown adapter, a prompt that leaves no room in the context, or bad options.
        """
        form = _form(schema, constraint)
        chosen = self._chosen(adapter)
        ids = tuple(self.encode(prompt, chosen, raw))
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        batch = self.batch(1, speculate=speculate)
        if self._prefixes is not None:
            batch.prefixes = self._prefixes
        return Generation(
            batch,
            lambda deliver: self.row(
                Request(ids, chosen, max_tokens, stops, sampling or Sampling(), constraint=form), deliver
            ),
        )

    def generate_batch(
        self,
        prompts: Sequence[str | list[Message]],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        raw: bool | None = None,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        constraints: Sequence[Constraint | None] | None = None,
        batch_size: int = 8,
        speculate: bool | None = None,
    ) -> list[str]:
        """Whole answers to several prompts, up to `batch_size` of them run together, each with its own adapters.

        `adapters`: one choice a prompt, or None for no adapter; `constraints`: one a prompt, or None for none; other options
        as for `stream`. Every answer is what
        `generate` gives for its prompt alone. Rows run as one batch on the CPU where the graph shares its KV caches (what
        `reft-edge export` makes does), else in turn. Raises ReftEdgeError as `stream` does, and for different numbers of
        prompts and choices or constraints.
        """
        choices = [None] * len(prompts) if adapters is None else list(adapters)
        if len(choices) != len(prompts):
            raise ReftEdgeError(
                f"there are {len(prompts)} prompts and {len(choices)} adapter choices; give one each"
            )
        forms = [None] * len(prompts) if constraints is None else list(constraints)
        if len(forms) != len(prompts):
            raise ReftEdgeError(
                f"there are {len(prompts)} prompts and {len(forms)} constraints; give one each"
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        requests = []
        for prompt, choice, form in zip(prompts, choices, forms, strict=True):
            chosen = self._chosen(choice)
            ids = tuple(self.encode(prompt, chosen, raw))
            request = Request(ids, chosen, max_tokens, stops, sampling or Sampling(), constraint=form)
            requests.append(request)
        return [text for _, text in self._run_together(requests, batch_size, speculate)]

    def prepare(self, adapter: AdapterChoice) -> Bound:
        """An adapter choice as values that any number of runs can bind. Raises ReftEdgeError for an unknown adapter."""
        with self._lock:
            chosen = self._chosen(adapter)
            return self._mixes.bind({name: self._adapters[name].edit for name in chosen}, chosen)

    def batch(
        self,
        slots: int,
        prefix_budget: int = 0,
        cache_budget: int | None = None,
        speculate: bool | None = None,
    ) -> Batch:
        """An empty batch of this model's rows.

        `speculate`: guess tokens that stood in the prompt or the answer before, and run several at once where that is
        faster; None does so where answers are the same: in folders of fp32, and where this machine's kernels round several
        tokens as they round one. Raises ReftEdgeError as `Batch` does, and where this is asked for and the model cannot take
        tokens back.
        """
        ahead = speculation_for(self.graph, self.manifest, self._costs, speculate)
        return Batch(self.graph, self.manifest.eos_token_ids, slots, prefix_budget, cache_budget, ahead)

    def row(self, request: Request, deliver: Callable[[Piece], None], room: int | None = None) -> Row:
        """A request made ready for a batch of so much `room`; adapters are taken as they are now. Raises ReftEdgeError as
        `Row` does, and for unknown adapters and constraints that are not valid."""
        form = request.constraint
        return Row(
            request,
            self.prepare(request.adapters),
            self.manifest.context_length,
            self.prompts.tokenizer,
            deliver,
            None if form is None else self._constraints.begin(form),
            room,
        )

    def check_constraint(self, form: Constraint) -> None:
        """Raise ReftEdgeError for a constraint that is not valid, or where llguidance is not installed."""
        self._constraints.begin(form)

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        adapter: AdapterChoice = None,
        prompt_tokens: Sequence[int] | None = None,
    ) -> list[Logits]:
        """Logits `[tokens, vocabulary]` of every row of tokens, run as one right-padded batch.

        The first `prompt_tokens` of each row are its prompt, the others count as generated; by default all are prompt.
        Raises ReftEdgeError for an empty row, or a prompt length that a row does not have.
        """
        if not rows or not all(rows):
            raise ReftEdgeError("there are no tokens to run; give at least one row of at least one token")
        lengths = [len(row) for row in rows] if prompt_tokens is None else list(prompt_tokens)
        if len(lengths) != len(rows) or not all(
            0 < n <= len(row) for n, row in zip(lengths, rows, strict=True)
        ):
            raise ReftEdgeError(
                f"prompt_tokens are {lengths}; expected one number a row, from 1 to the row's {[len(row) for row in rows]}"
            )
        chosen = self._chosen(adapter)
        inputs: PortInputs = {}
        if chosen:
            edit = self._edit(chosen)
            inputs = port_inputs(edit, self.manifest, self.graph.dtype)
            if edit.triggers:
                prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
                inputs |= gate_inputs([[gate.span.in_prompt(ids) for gate in edit.gates] for ids in prompts])
            inputs["reft.prompt_len"] = np.array(lengths, np.int64)
        return self.graph.score(rows, inputs)

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], adapter: AdapterChoice = None, max_tokens: int = 256
    ) -> list[list[int]]:
        """Greedy answers to prompts of tokens, run together, end-of-sequence tokens left out.

        Raises ReftEdgeError for no prompts, an empty one, or one that leaves no room for `max_tokens` in the context.
        """
        if not prompts:
            raise ReftEdgeError("there are no prompts; give one or more")
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_tokens > self.manifest.context_length:
            raise ReftEdgeError(
                f"{longest} prompt tokens and {max_tokens} more do not fit this model's context of "
                f"{self.manifest.context_length}"
            )
        chosen = self._chosen(adapter)
        requests = [Request(tuple(prompt), chosen, max_tokens) for prompt in prompts]
        return [tokens for tokens, _ in self._run_together(requests, len(requests))]

    def _run_together(
        self, requests: Sequence[Request], slots: int, speculate: bool | None = False
    ) -> list[tuple[list[int], str]]:
        """Tokens and text of every answer."""
        batch = self.batch(max(1, min(slots, len(requests))), speculate=speculate)
        pieces: list[list[Piece]] = [[] for _ in requests]
        rows = [self.row(request, found.append) for request, found in zip(requests, pieces, strict=True)]
        for row in rows:
            batch.add(row)
        while not batch.idle:
            batch.step()
        for found in pieces:
            if found[-1].error is not None:
                raise found[-1].error
        return [
            (row.tokens, "".join(piece.text for piece in found))
            for row, found in zip(rows, pieces, strict=True)
        ]

    def adapter_size(self, name: str) -> int:
        """Bytes that a loaded adapter's weights take."""
        return self._adapters[name].edit.nbytes

    def encode(
        self, prompt: str | list[Message], chosen: Mapping[str, float], raw: bool | None = None
    ) -> list[int]:
        """A prompt's tokens, as `stream` makes them for these adapters. Raises ReftEdgeError as `stream` does."""
        formats = [self._adapters[name].config.prompt_format for name in chosen]
        prompt_format = choose_format(raw, formats, self.prompts.template is not None)
        if isinstance(prompt, str):
            ids = self.prompts.encode_prompt(prompt, prompt_format)
        elif prompt_format == "raw":
            raise ReftEdgeError("a list of messages needs the chat template; give raw prompts as one string")
        else:
            ids = self.prompts.encode_chat(prompt)
        if not ids:
            raise ReftEdgeError("the prompt is empty; give at least one token")
        return ids

    def _chosen(self, adapter: AdapterChoice) -> dict[str, float]:
        if adapter is None:
            return {}
        if isinstance(adapter, str):
            adapter = [adapter]
        scales = dict(adapter) if isinstance(adapter, Mapping) else dict.fromkeys(adapter, 1.0)
        for name, factor in scales.items():
            if name not in self._adapters:
                raise ReftEdgeError(
                    f"no adapter {name!r} is loaded; loaded: {', '.join(self._adapters) or 'none'}"
                )
            if not np.isfinite(factor):
                raise ReftEdgeError(f"the scale of adapter {name!r} is {factor}; expected a finite number")
            if (signature := self._adapters[name].signature) is not None:
                signature.check_time(about=f"adapter {name!r}")
        return {name: float(factor) for name, factor in scales.items()}

    def _edit(self, chosen: Mapping[str, float]) -> Edit:
        return concat([scale(self._adapters[name].edit, factor) for name, factor in chosen.items()])


def _form(schema: Mapping[str, Any] | None, constraint: Constraint | None) -> Constraint | None:
    if schema is None:
        return constraint
    if constraint is not None:
        raise ReftEdgeError("schema and constraint were both given; give one")
    return Constraint.json_schema(schema)
