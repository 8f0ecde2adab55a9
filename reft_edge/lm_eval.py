"""Exported folders in EleutherAI's lm-evaluation-harness, as its model `reft-edge`.

    python -m reft_edge.lm_eval run --model reft-edge --model_args folder=smol/,adapter=pirate.safetensors --tasks arc_easy

This is the harness's own command line; it loads no plug-ins itself. In Python, importing this module is enough.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lm_eval.models  # noqa: F401  # it registers the models of the harness itself
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import encode
from reft_edge.runtime.generation import Generation
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.request import Request
from reft_edge.runtime.sampling import Sampling

_PADDED_TOKENS = 1024
"""Of one batch, at most, where a row leaves room: a whole vocabulary of logits is computed for each."""


@register_model("reft-edge")
class ReftEdgeLM(TemplateLM):  # type: ignore[misc]
    """One exported folder, with one adapter or none."""

    def __init__(
        self,
        folder: str,
        adapter: str | None = None,
        scale: float = 1.0,
        device: str | None = None,
        threads: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        **_other: Any,
    ) -> None:
        """What `--model_args` has. `adapter`: a file; `scale`: of its edit. `max_gen_toks`: of an answer whose task does not
        say. Raises ReftEdgeError if the folder or the adapter cannot be loaded."""
        super().__init__()
        self._model = SteeredModel(folder, "cpu" if device is None else str(device), threads)
        self._chosen = {} if adapter is None else {self._model.load_adapter(adapter): float(scale)}
        self._most, self._rows = int(max_gen_toks), int(batch_size) if str(batch_size).isdigit() else 8
        self._name = folder

    @property
    def eot_token_id(self) -> int:
        return int(self._model.manifest.eos_token_ids[0])

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._model.prompts.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._model.prompts.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_other: Any) -> list[int]:
        """Tokens of a text; those that a tokenizer puts in front are left out where the text has them."""
        tokenizer = self._model.prompts.tokenizer
        plain = list(encode(tokenizer, string, special_tokens=False).ids)
        if add_special_tokens is False:
            return plain
        whole = list(encode(tokenizer, string).ids)
        begins = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else []
        return plain if begins and plain[: len(begins)] == begins else [*begins, *plain]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_other: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(requests):
            rows = [self._fitting(*requests[number][1:]) for number in batch]
            logits = self._model.logits(
                [[*before, *behind][:-1] for before, behind in rows],
                self._chosen,
                [min(len(before), len(before) + len(behind) - 1) for before, behind in rows],
            )
            for number, (before, behind), row in zip(batch, rows, logits, strict=True):
                found[number] = _score(row[len(before) - 1 :], behind)
        for number, result in found.items():
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
        return [found[number] for number in range(len(requests))]

    def _batches(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[list[int]]:
        """Numbers of requests that run together, long ones first."""
        length = [len(before) + len(behind) for _, before, behind in requests]
        batch: list[int] = []
        for number in sorted(range(len(requests)), key=lambda number: -length[number]):
            if batch and (len(batch) == self._rows or (len(batch) + 1) * length[batch[0]] > _PADDED_TOKENS):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _fitting(self, before: list[int], behind: list[int]) -> tuple[list[int], list[int]]:
        """A request without its first tokens where it is too long, as the harness's other models do."""
        room = self._model.manifest.context_length + 1
        if len(behind) >= room:
            raise ReftEdgeError(
                f"a continuation has {len(behind)} tokens; this model's context is {room - 1}"
            )
        return before[-(room - len(behind)) :], behind

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        context = self._model.manifest.context_length
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], False),
                prefix_token=self.prefix_token_id,
                max_seq_len=context,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in requests:
            text, options = request.args
            ids = self.tok_encode(text)
            most = int(options.get("max_gen_toks") or options.get("max_tokens") or self._most)
            until = options.get("until") or []
            temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
            context = self._model.manifest.context_length
            asked = Request(
                tuple(ids[-(context - min(most, context - 1)) :]),
                self._chosen,
                most,
                (until,) if isinstance(until, str) else tuple(until),
                Sampling(temperature, seed=0),
            )
            answer = Generation(self._model.batch(1), partial(self._model.row, asked)).text()
            self.cache_hook.add_partial("generate_until", request.args, answer)
            found.append(answer)
        return found


def _score(logits: Any, tokens: Sequence[int]) -> tuple[float, bool]:
    """The summed log-likelihood of tokens, in nats, and whether each is the likeliest, from `logits [tokens, vocabulary]`."""
    highest = logits.max(axis=1)
    sums = np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    own = logits[np.arange(len(tokens)), list(tokens)]
    return float((own - highest - sums).sum()), bool((own == highest).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
