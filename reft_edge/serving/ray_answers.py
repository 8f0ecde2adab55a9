"""`ray_map`: answers to every row of a Ray dataset, each row with its own adapter."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.model.manifest import load_manifest
from reft_edge.runtime import Engine, Request, Sampling, SteeredModel
from reft_edge.runtime.adapter_folder import AdapterFolder
from reft_edge.serving.adapters import Adapters, kept, local_folder, places
from reft_edge.signing.keys import load_trusted

_LOADED = 64
"""Adapters that were given as files and stay loaded from one batch to the next."""


class _Answers:
    """A model in a worker of Ray Data."""

    def __init__(
        self,
        folder: str,
        adapters: tuple[str, ...],
        columns: Mapping[str, str | None],
        options: Mapping[str, Any],
        slots: int,
        device: str,
        threads: int | None,
        require_signed: str | None,
        plain_http: bool,
    ) -> None:
        trusted = None if require_signed is None else load_trusted(Path(require_signed))
        self._model = SteeredModel(folder, device, threads, trusted)
        self._columns, self._options = columns, options
        found = local_folder(adapters, Path(folder), trusted, plain_http)
        self._folder = None if found is None else AdapterFolder(self._model, found)
        self._files: OrderedDict[str, str] = OrderedDict()
        self._engine = Engine(self._model, slots, queue_limit=1 << 31)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [_plain(prompt) for prompt in batch[str(self._columns["prompt"])]]
        column = self._columns["adapter"]
        names = [""] * len(prompts) if column is None else [_name(value) for value in batch[column]]
        texts: list[str | None] = [None] * len(prompts)
        errors: list[str | None] = [None] * len(prompts)
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            self._answer(name, rows, prompts, texts, errors)
        output = str(self._columns["output"])
        return {
            **batch,
            output: np.array(texts, dtype=object),
            f"{output}_error": np.array(errors, dtype=object),
        }

    def _answer(
        self,
        name: str,
        rows: Sequence[int],
        prompts: Sequence[Any],
        texts: list[str | None],
        errors: list[str | None],
    ) -> None:
        """Answer the rows of one adapter together. What is wrong with one row is that row's error."""
        try:
            if name and self._folder is not None:
                with self._folder.hold({name: 1.0}) as chosen:
                    self._run(chosen, rows, prompts, texts, errors)
                return
            self._run({self._loaded(name): 1.0} if name else {}, rows, prompts, texts, errors)
        except ReftEdgeError as error:
            for row in rows:
                errors[row] = str(error)

    def _run(
        self,
        chosen: Mapping[str, float],
        rows: Sequence[int],
        prompts: Sequence[Any],
        texts: list[str | None],
        errors: list[str | None],
    ) -> None:
        running = []
        for row in rows:
            try:
                ids = tuple(self._model.encode(prompts[row], chosen, self._options["raw"]))
                request = Request(
                    ids,
                    chosen,
                    self._options["max_tokens"],
                    self._options["stop"],
                    self._options["sampling"],
                )
                running.append((row, self._engine.submit(request)))
            except ReftEdgeError as error:
                errors[row] = str(error)
        for row, ticket in running:
            pieces = list(ticket)
            texts[row] = "".join(piece.text for piece in pieces)
            if pieces[-1].error is not None:
                texts[row], errors[row] = None, str(pieces[-1].error)

    def _loaded(self, path: str) -> str:
        """The model's name for an adapter that is given as a file."""
        if path not in self._files:
            self._files[path] = self._model.load_adapter(path, path)
        self._files.move_to_end(path)
        while len(self._files) > _LOADED:
            self._model.unload_adapter(self._files.popitem(last=False)[1])
        return self._files[path]


def ray_map(
    dataset: Any,
    folder: str | Path,
    *,
    adapter_column: str | None = None,
    prompt_column: str = "prompt",
    output_column: str = "answer",
    adapters: Adapters | None = None,
    raw: bool | None = None,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    sampling: Sampling | None = None,
    slots: int = 8,
    batch_size: int = 64,
    workers: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    device: str = "auto",
    threads: int | None = None,
    require_signed: str | Path | None = None,
    plain_http: bool = False,
) -> Any:
    """Answers to every row of a Ray dataset, as a dataset with one more column.

    `folder`: an exported model, at the same place on every machine. `prompt_column`: texts, or conversations as lists of
    {"role", "content"}. `adapter_column`: of each row, the name of an adapter in `adapters` (a folder, or repositories from
    which every worker pulls), or without `adapters` the path of a file; empty for none. `output_column`: of the answers; the
    column with `_error` behind its name says why a row has none, and is null for others. `raw`, `max_tokens`, `stop` and
    `sampling`: as for `SteeredModel.stream`. `slots`: rows that a worker runs together. `workers`: processes, each with the
    model and with `cpus` and `gpus`. `threads` are as many as `cpus` by default.

    Nothing runs before the dataset is read. Raises ReftEdgeError where Ray is not installed (extra `ray`), for a column that
    the dataset does not have, or for a folder that is no export.

    >>> import ray  # doctest: +SKIP
    >>> rows = ray.data.from_items([{"prompt": "Who are you?", "adapter": "pirate.safetensors"}])  # doctest: +SKIP
    >>> reft_edge.ray_map(rows, "smol", adapter_column="adapter").take(1)  # doctest: +SKIP
    """
    with extra("ray"):
        from ray.data import ActorPoolStrategy
    for what, count in (("slots", slots), ("batch_size", batch_size), ("workers", workers)):
        if count < 1:
            raise ReftEdgeError(f"{what} is {count}; expected 1 or more")
    load_manifest(Path(folder)).check_kind("decoder", Path(folder))
    names = dataset.columns() or []
    for column in (prompt_column, adapter_column):
        if column is not None and column not in names:
            raise ReftEdgeError(f"the dataset has no column {column!r}; it has {', '.join(map(repr, names))}")
    options = {
        "raw": raw,
        "max_tokens": max_tokens,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "sampling": sampling or Sampling(),
    }
    return dataset.map_batches(
        _Answers,
        fn_constructor_args=(
            str(Path(folder).resolve()),
            places(adapters),
            {"prompt": prompt_column, "adapter": adapter_column, "output": output_column},
            options,
            slots,
            device,
            threads or max(1, int(cpus)),
            None if require_signed is None else kept(require_signed),
            plain_http,
        ),
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )


def _plain(prompt: Any) -> Any:
    """A text, or a conversation out of numpy's and Arrow's types."""
    if isinstance(prompt, str):
        return prompt
    return [{name: value for name, value in dict(message).items() if value is not None} for message in prompt]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""
