"""Passes of a training that leave out what changes nothing: the same logits, but for rounding, in less time."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_edge.errors import ReftEdgeError
from reft_edge.steering.hooks import Steering
from reft_edge.steering.interventions import Interventions, dropout_off
from reft_edge.steering.likelihood import Batch, Ids, batch_logits, padded, readable
from reft_edge.training.data import Dataset
from reft_edge.training.kept_states import KeptStates, Key, last_untouched
from reft_edge.training.needed_tokens import NeededTokens, much_padding
from reft_edge.training.objectives import Data
from reft_edge.training.packed_rows import PackedRows, can_pack, shared_length
from reft_edge.training.preference import Preferences
from reft_edge.training.settings import Execution, TrainSettings

_NEAR = {False: 1e-3, True: 5e-2}
"""How far logits of the two ways may be apart, of the largest of them; under autocast more."""
_FILE = "states"


class Passes:
    """Logits of rows as `joined_logits` gives them, inside `attached`; each idea is left where it does not fit.

    - Tokens with which all rows of a batch begin are run once (`packed_rows`).
    - Hidden states below the lowest edit are kept from one epoch to the next (`kept_states`).
    - Padding is left out (`packed_rows`, or of matrix products only), and in the last block what has no label
      (`needed_tokens`).

    On the first batch the logits are held against those of a plain pass: a model for which an idea does not hold is trained
    without them.
    """

    def __init__(
        self,
        model: Any,
        interventions: Interventions,
        data: Data,
        settings: TrainSettings,
        execution: Execution,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._model, self._interventions, self._report = model, interventions, report
        # Several processes that share a base must run the same passes; compiled blocks are one code for all of them; what a
        # checkpointed block computes again belongs to the last pass.
        free = not execution.processes.sharded and not execution.compile
        self._packs = free and not execution.checkpointing and can_pack(model)
        self._shares = execution.shared_prefix and self._packs
        self._needed = NeededTokens() if execution.needed_tokens and free else None
        self._kept = _kept_states(model, interventions, data, settings, execution, report) if free else None
        self._folder = execution.frozen_cache_in
        self._attention = getattr(model.config, "_attn_implementation", "eager")
        self._checked = not (self._shares or self._needed or self._kept)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block, the model's blocks are told what they need not compute."""
        with ExitStack() as stack:
            if self._needed is not None:
                stack.enter_context(self._needed.attached(self._model))
            if self._kept is not None:
                if self._folder is not None:
                    self._kept.file = Path(stack.enter_context(_folder_in(self._folder))) / _FILE
                stack.enter_context(self._kept.attached(self._model))
            yield

    def __call__(
        self,
        model: Any,
        steering: Steering,
        rows: Sequence[tuple[Ids, Ids]],
        device: torch.device,
        autocast: bool = False,
    ) -> Tensor:
        """Float32 logits after every row's prompt and after every token behind it, `[all of them, vocabulary]`."""
        batch = padded(model, rows, device)
        with readable(model, batch.ids.shape[1]):
            if not self._checked and torch.is_grad_enabled():
                self._check(steering, rows, batch, autocast)
                self._checked = True
            if not self._checked:
                return self._plain(steering, batch, autocast)
            return self._quick(steering, rows, batch, autocast)

    def _check(
        self, steering: Steering, rows: Sequence[tuple[Ids, Ids]], batch: Batch, autocast: bool
    ) -> None:
        """Leave all ideas if the model does not give the same logits with them."""
        with torch.no_grad(), dropout_off(self._interventions):
            expected = self._plain(steering, batch, autocast)
            near = _NEAR[autocast] * expected.abs().max()
            try:
                same = all(
                    bool((self._quick(steering, rows, batch, autocast) - expected).abs().max() <= near)
                    for _ in range(2 if self._kept else 1)
                )
            except Exception:  # what a model's own code raises where it meets what it does not expect
                same = False
            if not same:
                self._report("this model has passes of its own: the quicker ones are not used")
                self._leave()

    def _leave(self) -> None:
        self._plainly()
        self._packs = self._shares = False
        self._needed = self._kept = None

    def _plainly(self) -> None:
        """The next pass leaves nothing out."""
        if self._needed is not None:
            self._needed.nothing()
        if self._kept is not None:
            self._kept.nothing()

    def _plain(self, steering: Steering, batch: Batch, autocast: bool) -> Tensor:
        self._plainly()
        return batch_logits(self._model, steering, batch, autocast)

    def _quick(
        self, steering: Steering, rows: Sequence[tuple[Ids, Ids]], batch: Batch, autocast: bool
    ) -> Tensor:
        keys = [(*prompt, *behind) for prompt, behind in rows]
        reads = self._kept is not None and self._kept.has(keys)
        shared = self._shared(steering, rows)
        if self._packs and (shared or (self._needed is not None and much_padding(batch.mask))):
            packed = PackedRows(batch, shared)
            self._tell(keys, packed.numbers, packed.batch, reads)
            with packed.attending(self._model, self._attention):
                logits = batch_logits(self._model, steering, packed.batch, autocast)
        else:
            numbers = torch.arange(batch.ids.numel(), device=batch.ids.device).view_as(batch.ids)
            self._tell(keys, numbers.masked_fill(batch.mask == 0, -1), batch, reads)
            logits = batch_logits(self._model, steering, batch, autocast)
        if self._kept is not None:
            self._kept.done(keys)
        return logits

    def _shared(self, steering: Steering, rows: Sequence[tuple[Ids, Ids]]) -> int:
        """Tokens that are run once for all rows. Dropout draws for each row by itself."""
        drops = self._interventions.training and self._interventions.dropout.p > 0
        if not self._shares or drops or len(rows) < 2:
            return 0
        spans = [span for interventions, _ in steering.adapters for span in interventions.config.spans]
        return shared_length(rows, spans)

    def _tell(self, keys: Sequence[Key], numbers: Tensor, batch: Batch, reads: bool) -> None:
        if self._needed is not None:
            self._needed.of(batch.mask, batch.counts)
        if self._kept is None:
            return
        if self._kept.takes(keys):
            self._kept.of(keys, numbers, batch.ids, reads)
        else:
            self._kept.nothing()


def _folder_in(folder: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="reft-edge-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise ReftEdgeError(
            f"cannot keep hidden states in {folder}: {error.strerror}; name a folder that can be written, or none"
        ) from error


def _kept_states(
    model: Any,
    interventions: Interventions,
    data: Data,
    settings: TrainSettings,
    execution: Execution,
    report: Callable[[str], None],
) -> KeptStates | None:
    """None where no block is below the lowest edit, where rows are seen once only, or where there is not enough room."""
    last = last_untouched(interventions.config.places)
    examples = _examples(data)
    size = settings.batch_size * settings.accumulate
    repeated = (
        settings.epochs > 1 if settings.max_steps is None else settings.max_steps * size > len(data.examples)
    )
    if not execution.frozen_cache or last < 0 or not repeated:
        return None
    lengths = {key: len(key) for key in examples}
    kept = KeptStates(last, lengths, model.config.hidden_size, report)
    if kept.nbytes > execution.frozen_cache * 1e6:
        report(
            f"hidden states below layer {last + 1} would take {kept.nbytes / 1e6:,.0f} MB, more than --frozen-cache; they "
            "are computed anew in each step"
        )
        return None
    return kept


def _examples(data: Data) -> list[Key]:
    """The tokens that are run of each row."""
    if isinstance(data, Preferences):
        rows = [side for pair in data.examples for side in (pair.chosen, pair.rejected)]
    else:
        rows = data.examples if isinstance(data, Dataset) else []
    return [(*row.prompt, *row.completion[:-1]) for row in rows]
