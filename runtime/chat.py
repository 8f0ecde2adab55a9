"""A conversation in a terminal, with adapters switched between turns."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Message
from reft_edge.runtime.adapter_folder import AdapterFolder
from reft_edge.runtime.generation import Generation
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.sampling import Sampling

HELP = """\
/adapter NAME[:SCALE] ...  answer with these adapters from now on
/adapters                  list what there is
/base                      answer without adapters
/system TEXT               set the system prompt; without TEXT, the template's own
/clear                     forget the conversation
/stats                     speed and size of the last answer
/help                      this list
/quit                      leave (or Ctrl-D)"""
_ROOM = 64
"""Tokens that an answer has at least; the oldest turns go when there are fewer."""


@dataclass
class Chat:
    """One conversation. `write` gets text as it comes, without line ends added."""

    model: SteeredModel
    name: str
    write: Callable[[str], None]
    adapters: AdapterFolder | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 512
    schema: Mapping[str, Any] | None = None
    """A JSON schema that every answer is valid under."""
    speculate: bool | None = None
    """Whether to guess tokens, as `SteeredModel.batch` says."""

    def __post_init__(self) -> None:
        if self.model.prompts.template is None:
            raise ReftEdgeError("the model has no chat template; use `reft-edge run --raw` for it")
        self.turns: list[Message] = []
        self.system: str | None = None
        self.chosen: dict[str, float] = {}
        self._switched: float | None = None
        self._last: Generation | None = None

    @property
    def prompt(self) -> str:
        """What stands before the user's line: the model and its adapters."""
        parts = [name if factor == 1 else f"{name}:{factor:g}" for name, factor in self.chosen.items()]
        return f"{self.name}{' + ' if parts else ''}{' + '.join(parts)}> "

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; whether the conversation goes on. Errors are written, not raised."""
        line = line.strip()
        try:
            if line.startswith("/"):
                command, _, rest = line[1:].partition(" ")
                return self._obey(command, rest.strip())
            if line:
                self._answer(line)
        except ReftEdgeError as error:
            self.write(f"{error}\n")
        return True

    def choose(self, given: Iterable[str]) -> None:
        """Use adapters, `NAME` or `NAME:SCALE`, from the folder or loaded already. Raises ReftEdgeError; then nothing changed."""
        chosen: dict[str, float] = {}
        for text in given:
            name, colon, factor = text.rpartition(":")
            try:
                chosen[name if colon else text] = float(factor) if colon else 1.0
            except ValueError as error:
                raise ReftEdgeError(f"the scale in {text!r} is no number; write NAME:0.5") from error
        if self.adapters is not None:
            self.adapters.use(
                [name for name in chosen if name not in self.model.adapters or name in self.adapters.loaded]
            )
        started = time.perf_counter()
        self.model.prepare(chosen)
        self._switched = time.perf_counter() - started
        self.chosen = chosen

    def _obey(self, command: str, rest: str) -> bool:
        if command in ("quit", "exit", "q"):
            return False
        if command == "help":
            self.write(HELP + "\n")
        elif command == "adapter" and rest:
            self.choose(rest.split())
        elif command in ("adapter", "adapters"):
            names = sorted({*self.model.adapters, *(self.adapters.names() if self.adapters else ())})
            self.write(
                "".join(f"{'*' if name in self.chosen else ' '} {name}\n" for name in names)
                or "there are none\n"
            )
        elif command == "base":
            self.choose(())
        elif command == "system":
            self.system = rest or None
        elif command == "clear":
            self.turns.clear()
        elif command == "stats":
            self._show_stats()
        else:
            self.write(f"there is no command /{command}; /help lists them\n")
        return True

    def _messages(self, turns: list[Message]) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *turns]

    def _answer(self, text: str) -> None:
        """Answer, and remember question and answer; of a turn that fails, nothing is remembered."""
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        kept = self._fitting(turns)
        pieces: list[str] = []
        try:
            generation = self.model.stream(
                self._messages(kept),
                self.chosen,
                raw=False,
                max_tokens=self.max_tokens,
                sampling=self.sampling,
                schema=self.schema,
                speculate=self.speculate,
            )
            self._last = generation
            if len(kept) < len(turns):
                self.write(
                    f"(the context is full: the oldest {(len(turns) - len(kept)) // 2} of the turns went)\n"
                )
            for piece in generation:
                pieces.append(piece)
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" …\n")
            if not pieces:
                return
        except ReftEdgeError:
            if pieces:
                self.write("\n")
            raise
        else:
            cut = self.schema is not None and generation.finish_reason == "length"
            self.write(" … (cut: raise --max-tokens)\n" if cut else "\n")
        self.turns = [*kept, {"role": "assistant", "content": "".join(pieces)}]

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """The turns without the oldest, so many that an answer has room."""
        while len(turns) > 1 and self._room(turns) < _ROOM:
            turns = turns[2:]
        return turns

    def _room(self, turns: list[Message]) -> int:
        return self.model.manifest.context_length - len(self.model.prompts.encode_chat(self._messages(turns)))

    def _show_stats(self) -> None:
        if self._last is None:
            self.write("there was no answer yet\n")
            return
        last, context = self._last, self.model.manifest.context_length
        used = last.prompt_tokens + len(last.tokens)
        self.write(
            f"prompt      {last.prompt_tokens} tokens, {last.prompt_tokens / max(last.prefill_seconds, 1e-9):,.0f} a second\n"
            f"answer      {len(last.tokens)} tokens, {last.tokens_per_second:,.1f} a second\n"
            f"context     {used:,} of {context:,} tokens\n"
        )
        if self._switched is not None:
            self.write(f"last switch {self._switched * 1000:.3f} ms\n")


def load_history(path: Path) -> Callable[[], None]:
    """Line editing with a history that lasts, where the terminal's Python has readline; returns what saves it."""
    if sys.platform == "win32":
        return lambda: None
    try:
        import readline
    except ImportError:
        return lambda: None
    try:
        readline.read_history_file(path)
    except OSError:
        readline.clear_history()

    def save() -> None:
        readline.set_history_length(1000)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError:
            return

    return save
