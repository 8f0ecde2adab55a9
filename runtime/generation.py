"""One answer as it comes."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from reft_edge.runtime.batch import Batch
from reft_edge.runtime.request import Piece, Row


class Generation(Iterator[str]):
    """An answer as it comes: iterate for text pieces; figures are final when it ends."""

    def __init__(self, batch: Batch, make_row: Callable[[Callable[[Piece], None]], Row]) -> None:
        """`batch`: one of its own, of one slot. Raises ReftEdgeError as `make_row` does."""
        self._batch = batch
        self._pieces: deque[Piece] = deque()
        self._row = make_row(self._pieces.append)
        batch.prefixes.fetch(self._row.request.ids, self._row.bound.edit)
        batch.add(self._row)
        self.prompt_tokens = len(self._row.request.ids)
        self.prefill_seconds = 0.0
        self.decode_steps = self._decode_tokens = 0
        self.decode_seconds = 0.0
        """Time in decode steps and sampling; what the reader does between pieces does not count."""

    @property
    def tokens(self) -> list[int]:
        """Generated token ids, the end-of-sequence token left out."""
        return self._row.tokens

    @property
    def finish_reason(self) -> str | None:
        """`stop` (end of sequence, a stop string or the end of the constraint), `length` or `error`; None while it runs."""
        return self._row.finish_reason

    def __next__(self) -> str:
        """Raises ReftEdgeError if the answer cannot go on; what came before is whole."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                if piece.error is not None:
                    raise piece.error
                if piece.text:
                    return piece.text
            if self._batch.idle:
                raise StopIteration
            self._step()

    def _step(self) -> None:
        begun, started = len(self._row.tokens), time.perf_counter()
        self._batch.step()
        seconds = time.perf_counter() - started
        if begun:
            self.decode_steps += 1
            self._decode_tokens += len(self._row.tokens) - begun
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; the first token comes from the prompt's pass and does not count."""
        return self._decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def text(self) -> str:
        """The rest of the answer at once."""
        return "".join(self)
