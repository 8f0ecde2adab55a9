"""One request: what is asked, how far its answer has come, and the pieces that it gives."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from reft_edge.adapter.positions import UNLIMITED
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.binding import Bound, DecodeEdit
from reft_edge.runtime.constraints import Constraint, Progress
from reft_edge.runtime.drafts import Lookup
from reft_edge.runtime.logprobs import TokenScore
from reft_edge.runtime.memory import NoMemoryError
from reft_edge.runtime.sampling import Sampler, Sampling
from reft_edge.runtime.text import TextStream


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    ids: tuple[int, ...]
    """The prompt's tokens."""
    adapters: Mapping[str, float] = field(default_factory=dict)
    """Loaded adapters by name, with their scales."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are left out of it."""
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """None for none; else each token's log-probability, and those of this many likeliest tokens."""
    constraint: Constraint | None = None
    """The form that the answer must have; its end, where nothing can follow, ends the answer."""
    shown: tuple[str, ...] = ()
    """Special tokens whose text the answer has; that of others is left out."""


@dataclass(frozen=True)
class Piece:
    """What an answer gained; the last piece of an answer has a finish_reason."""

    text: str
    tokens: tuple[TokenScore, ...] = ()
    """Where log-probabilities were asked for."""
    finish_reason: str | None = None
    """`stop` (end of sequence, a stop string or the end of the constraint), `length`, `cancelled` or `error`."""
    error: ReftEdgeError | None = None
    """Why it ended, where the finish_reason is `error`: a NoMemoryError for what may work later."""


class Row:
    """A request on its way through a batch."""

    def __init__(
        self,
        request: Request,
        bound: Bound,
        context: int,
        tokenizer: Tokenizer,
        deliver: Callable[[Piece], None],
        progress: Progress | None = None,
        room: int | None = None,
    ) -> None:
        """`context`: the model's, in tokens. `progress`: of the answer under the request's constraint. `room`: tokens that
        there is memory for. Raises ReftEdgeError for an empty prompt, or one that fills the context or the memory."""
        if not request.ids:
            raise ReftEdgeError("the prompt is empty; give at least one token")
        if room is not None and room <= len(request.ids) < context:
            raise ReftEdgeError(
                f"the prompt has {len(request.ids)} tokens, and the memory for KV caches holds {room}: shorten it, or give "
                "more memory (serve --cache-memory)"
            )
        self.request, self.deliver = request, deliver
        self.bound, self.progress = bound.in_prompt(request.ids), progress
        most = context if room is None else min(context, room)
        self.limit = answer_limit(len(request.ids), request.max_tokens, most)
        self.sampler = Sampler(request.sampling, request.ids)
        self.text = TextStream(tokenizer, request.stop, request.shown)
        self.length = 0
        """Tokens in the KV cache."""
        self.tokens: list[int] = []
        self._decode = 0, self.bound.decode
        self.together = 1
        """The last of them that may run at once: one that was chosen, and those that had to follow."""
        self.lookup: Lookup | None = None
        """Of what comes next, where that is guessed."""
        self.guesses: list[int] = []
        """Tokens that run behind the last one, and count if they are chosen."""
        self.started = 0
        """Of rows that started one after another, which this is."""
        self.finish_reason: str | None = None
        self.cancelled = False

    @property
    def need(self) -> int:
        """Tokens in the KV cache after the next step that gives a token, with those that are guessed."""
        return len(self.request.ids) + max(1, len(self.tokens)) + len(self.guesses)

    @property
    def behind(self) -> int:
        """Tokens that are known and not in the KV cache: forced ones, and those from before the row stepped back."""
        return len(self.request.ids) + len(self.tokens) - self.length

    @property
    def phase(self) -> int:
        """How many of the adapters' ends the row has passed: between them, the same acts on each generated token."""
        return bisect_right(self.bound.ends, self._generated)

    @property
    def edit(self) -> DecodeEdit:
        """What acts on the generated token that runs next."""
        if self._decode[0] != self.phase:
            self._decode = self.phase, self.bound.decode_from(self._generated)
        return self._decode[1]

    @property
    def alike(self) -> int:
        """Generated tokens on which the same acts from the next one on; those that it stands before run in one go."""
        ends = self.bound.ends[self.phase :]
        return ends[0] - self._generated if ends else UNLIMITED

    @property
    def _generated(self) -> int:
        """Generated tokens in the KV cache."""
        return max(0, self.length - len(self.request.ids))

    @property
    def most(self) -> int:
        """Tokens in the KV cache at most."""
        return len(self.request.ids) + self.limit


def answer_limit(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """Most tokens that an answer can have. Raises ReftEdgeError for a prompt that fills the context, or no tokens asked for."""
    if max_tokens < 1:
        raise ReftEdgeError(f"max_tokens is {max_tokens}; expected 1 or more")
    if prompt_tokens >= context:
        raise ReftEdgeError(
            f"the prompt has {prompt_tokens} tokens; this model's context is {context}: shorten it"
        )
    return min(max_tokens, context - prompt_tokens)


def as_reason(error: BaseException) -> ReftEdgeError:
    """Whatever ended a row, as a plain error."""
    if isinstance(error, ReftEdgeError):
        return error
    if isinstance(error, MemoryError):
        return NoMemoryError(f"there is not enough memory for this request: {error}")
    return ReftEdgeError(str(error) or type(error).__name__)
