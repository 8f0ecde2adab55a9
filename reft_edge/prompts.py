"""Text to tokens and back, the same in training and on a device: a tokenizer and a chat template, no transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text

Message = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """A model folder's tokenizer and chat template."""

    tokenizer: Tokenizer
    template: str | None
    special_tokens: dict[str, str]
    """bos_token, eos_token and the like, as the template names them."""

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of text as it stands, with the special tokens the tokenizer adds by itself."""
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins. Raises ReftEdgeError without a template."""
        return self.encode_plain(self.render(messages))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that already holds its special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Token ids of text that continues `before`: those that both have beyond the tokens of `before`.

        Alone, a text gets a leading space from tokenizers such as Llama 2's. Where the two melt into one token, it is
        taken alone all the same.
        """
        start, whole = self.encode_plain(before), self.encode_plain(before + text)
        if whole[: len(start)] == start and len(whole) > len(start):
            return whole[len(start) :]
        return self.encode_plain(text)

    def prompt_text(self, prompt: str, prompt_format: str) -> str:
        """One user message through the chat template (`chat`), or the text itself (`raw`)."""
        return prompt if prompt_format == "raw" else self.render([{"role": "user", "content": prompt}])

    def encode_prompt(self, prompt: str, prompt_format: str) -> list[int]:
        """Token ids of the same."""
        return self.encode_text(self.prompt_text(prompt, prompt_format), prompt_format)

    def encode_text(self, text: str, prompt_format: str) -> list[int]:
        """Token ids of what `prompt_text` gave."""
        return self.encode_raw(text) if prompt_format == "raw" else self.encode_plain(text)

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises ReftEdgeError if there is no template or it refuses the messages.

        Templates come with models from strangers: they run in jinja2's immutable sandbox.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        if self.template is None:
            raise ReftEdgeError("the model has no chat template; give prompts as raw text (--raw)")
        try:
            template = _environment().from_string(self.template)
            text: str = template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                **self.special_tokens,
            )
            return text
        except (SecurityError, TemplateError, OverflowError, MemoryError, RecursionError) as error:
            raise ReftEdgeError(f"the model's chat template failed: {error}") from error

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def choose_format(given: bool | None, adapters: Sequence[str], has_template: bool) -> str:
    """`raw` or `chat`: what was asked for, else what the adapters were trained with, else the template if there is one.

    Raises ReftEdgeError if the adapters were trained with unlike formats.
    """
    if given is not None:
        return "raw" if given else "chat"
    if len(set(adapters)) > 1:
        raise ReftEdgeError(
            "the adapters were trained on unlike prompts, some raw, some through the chat template; "
            "say which to use: --raw or --chat, raw=True or raw=False"
        )
    return adapters[0] if adapters else "chat" if has_template else "raw"


def load_prompts(folder: Path) -> Prompts:
    """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`. Raises ReftEdgeError if there is no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ReftEdgeError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise ReftEdgeError(f"cannot read {path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _read_json(folder / "tokenizer_config.json")
    special = {
        name: text
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (text := _token_text(config.get(name))) is not None
    }
    return Prompts(tokenizer, _template(folder, config), special)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(read_text(path))
    except ValueError as error:
        raise ReftEdgeError(f"cannot read {path}: {error}") from error
    return parsed if isinstance(parsed, dict) else {}


def _environment() -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
