"""Text to tokens and back, the same in training and on a device: a tokenizer and a chat template, no transformers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from reft_edge.errors import ReftEdgeError
from reft_edge.files import read_text
from reft_edge.unicode import check_text, check_texts

if TYPE_CHECKING:
    from reft_edge.model.templates import Span, Template


Message = Mapping[str, Any]
"""Of a conversation, as OpenAI's chat API has it: `role`, `content`, and `tool_calls` and the like where there are any."""

ANSWER = "~0answer0~"
"""Stands for an answer where it is asked what a template writes around one."""
_LONGEST_NAME = 100
_TEXTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GIVEN = ("messages", "tools", "add_generation_prompt", *_TEXTS)


@dataclass(frozen=True)
class Prompts:
    """A model folder's tokenizer and chat template."""

    tokenizer: Tokenizer
    template: str | None
    special_tokens: dict[str, str]
    """bos_token, eos_token and the like, as the template names them."""
    tool_template: str | None = None
    """The template of conversations with tools, where the model has one of its own for them."""
    end_ids: tuple[int, ...] = field(default=())
    """Tokens that end an answer by the model's generation_config.json or config.json."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """For the template beside the conversation, such as `enable_thinking`; `check_arguments` says which there are."""

    def with_arguments(self, arguments: Mapping[str, Any]) -> "Prompts":
        """The same with arguments for the chat template. Raises ReftEdgeError as `check_arguments` does."""
        check_arguments(arguments)
        return replace(self, arguments=dict(arguments))

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of text as it stands, with the special tokens the tokenizer adds by itself.

        Like all that encode, raises ReftEdgeError for text that is not valid Unicode.
        """
        return list(encode(self.tokenizer, text).ids)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins. Raises ReftEdgeError without a template."""
        for number, message in enumerate(messages, start=1):
            check_texts(message, f"message {number}")
        return self.encode_plain(self.render(messages, tools=tools))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that already holds its special tokens."""
        return list(encode(self.tokenizer, text, special_tokens=False).ids)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Token ids of text that continues `before`: those that both have beyond the tokens of `before`.

        Alone, a text gets a leading space from tokenizers such as Llama 2's. Where the two melt into one token, it is
        taken alone all the same.
        """
        return self.encode_both(before, text)[1]

    def encode_both(self, before: str, text: str) -> tuple[list[int], list[int]]:
        """`encode_plain` of `before`, and `encode_after` of `text`."""
        start, ids, _ = self.encode_with_places(before, text)
        return start, ids

    def encode_with_places(
        self, before: str, text: str
    ) -> "tuple[list[int], list[int], list[tuple[int, int]]]":
        """The same, and of `encode_after`'s tokens the characters of `text` that each stands for: first, and behind last."""
        start, whole = (
            self.encode_plain(before),
            encode(self.tokenizer, before + text, special_tokens=False),
        )
        if whole.ids[: len(start)] == start and len(whole.ids) > len(start):
            here = slice(len(start), None)
            moved = [(first - len(before), end - len(before)) for first, end in whole.offsets[here]]
            return start, whole.ids[here], moved
        alone = encode(self.tokenizer, text, special_tokens=False)
        return start, alone.ids, alone.offsets

    def prompt_text(self, prompt: str, prompt_format: str) -> str:
        """One user message through the chat template (`chat`), or the text itself (`raw`)."""
        check_text(prompt)
        return prompt if prompt_format == "raw" else self.render([{"role": "user", "content": prompt}])

    def encode_prompt(self, prompt: str, prompt_format: str) -> list[int]:
        """Token ids of the same."""
        return self.encode_text(self.prompt_text(prompt, prompt_format), prompt_format)

    def encode_text(self, text: str, prompt_format: str) -> list[int]:
        """Token ids of what `prompt_text` gave."""
        return self.encode_raw(text) if prompt_format == "raw" else self.encode_plain(text)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template` writes it. `arguments`: beside or in place of those
        of the model.

        Templates come with models from strangers: they run in a sandbox, with bounds. Raises ReftEdgeError if there is no
        template, or it refuses the messages or does not end.
        """
        variables = self._variables(add_generation_prompt, tools)
        return self._template_for(tools).render(messages, **{**variables, **(arguments or {})})

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> "tuple[str, tuple[Span, ...] | None]":
        """A finished conversation, and the characters that the template's `{% generation %}` marks as what is trained.

        A template without marks marks all; None says that they cannot be followed. Raises ReftEdgeError as `render` does.
        """
        template, variables = self._template_for(tools), self._variables(False, tools)
        if template.marked:
            return template.render_marked(messages, **variables)
        text = template.render(messages, **variables)
        return text, ((0, len(text)),)

    def _variables(
        self, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] | None
    ) -> dict[str, Any]:
        return {
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
            **self.arguments,
        }

    def _template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> "Template":
        if self.template is None:
            raise ReftEdgeError("the model has no chat template; give prompts as raw text (--raw)")
        return self._compiled_for_tools if tools and self.tool_template else self._compiled

    @cached_property
    def _compiled(self) -> "Template":
        from reft_edge.model.templates import Template

        return Template(self.template or "")

    @cached_property
    def _compiled_for_tools(self) -> "Template":
        from reft_edge.model.templates import Template

        return Template(self.tool_template or "")

    @cached_property
    def eos(self) -> str:
        """The text of the token that ends an answer, by the tokenizer or the model's configuration; "" if none is known.

        A text that the tokenizer has no token for ends nothing.
        """
        named = self.special_tokens.get("eos_token")
        if named is not None and self.tokenizer.token_to_id(named) is not None:
            return named
        texts = (self.tokenizer.id_to_token(token) for token in self.end_ids)
        return next((text for text in texts if text is not None), "")

    @cached_property
    def turn_tail(self) -> str | None:
        """What the template writes behind an answer; None if it does not write a plain answer, or there is no template."""
        try:
            text = self.render(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}], False
            )
        except ReftEdgeError:
            return None
        return text.rpartition(ANSWER)[2] if ANSWER in text else None

    @cached_property
    def turn_end(self) -> int | None:
        """The token by which the template ends an answer; None if it writes none."""
        added = self.tokenizer.get_added_tokens_decoder()
        return next((token for token in self.encode_plain(self.turn_tail or "") if token in added), None)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that an answer ends with: the model's own, its tokenizer's and its template's."""
        eos = self.tokenizer.token_to_id(self.eos) if self.eos else None
        found = (*self.end_ids, eos, self.turn_end)
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def stop_ids_with(self, known: Sequence[int]) -> tuple[int, ...]:
        """The same, behind those known from elsewhere."""
        return tuple(dict.fromkeys((*known, *self.stop_ids)))

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return decode(self.tokenizer, ids, special_tokens=False)

    @cached_property
    def token_limit(self) -> int:
        """One more than the largest token id."""
        return token_limit(self.tokenizer)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ReftEdgeError for arguments that no template takes: names that are none or that stand for something else already,
    and texts with half a character."""
    for name in arguments:
        if not name.isidentifier() or len(name) > _LONGEST_NAME or name == "self":
            raise ReftEdgeError(f"{name[:_LONGEST_NAME]!r} is no name of an argument for a chat template")
        if name in _GIVEN:
            raise ReftEdgeError(f"{name} comes from the conversation or the model; it cannot be given")
    check_texts(arguments, "the arguments for the chat template")


def encode(
    tokenizer: Tokenizer, text: str, second: str | None = None, special_tokens: bool = True
) -> Encoding:
    """A text, or pair of texts, as tokens. Raises ReftEdgeError for what is not Unicode, or what the tokenizer fails at."""
    check_text(text)
    if second is not None:
        check_text(second)
    with _told("the model's tokenizer cannot take this text"):
        return tokenizer.encode(text, second, add_special_tokens=special_tokens)


def encode_batch(
    tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], special_tokens: bool = True
) -> list[Encoding]:
    """Texts, or pairs of texts, as tokens; other threads run meanwhile, which they do not during `encode`. Raises
    ReftEdgeError as it does."""
    for text in texts:
        for part in (text,) if isinstance(text, str) else text:
            check_text(part)
    with _told("the model's tokenizer cannot take this text"):
        return tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)


def decode(tokenizer: Tokenizer, ids: Sequence[int], special_tokens: bool) -> str:
    """Text of tokens, with or without the special ones. Raises ReftEdgeError for what the tokenizer fails at."""
    with _told("the model's tokenizer cannot decode these tokens"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special_tokens))


def token_limit(tokenizer: Tokenizer) -> int:
    """One more than the largest token id: ids may have gaps, so that they are not counted."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class _told:  # noqa: N801
    """What a tokenizer raises inside the block, a Rust panic included, is a ReftEdgeError."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) or (kind is not None and kind.__name__ == "PanicException"):
            raise ReftEdgeError(f"{self.what}: {error}") from error


def choose_format(given: bool | None, adapters: Sequence[str], has_template: bool) -> str:
    """`raw` or `chat`: what was asked for, else what the adapters were trained with, else the template if there is one.

    Raises ReftEdgeError if the adapters were trained with different formats.
    """
    if given is not None:
        return "raw" if given else "chat"
    if len(set(adapters)) > 1:
        raise ReftEdgeError(
            "the adapters were trained on different prompts, some raw, some through the chat template; "
            "say which to use: --raw or --chat, raw=True or raw=False"
        )
    return adapters[0] if adapters else "chat" if has_template else "raw"


def load_prompts(folder: Path) -> Prompts:
    """Read a model folder's `tokenizer.json`, the files that describe its special tokens, and its chat templates.

    Raises ReftEdgeError if there is no tokenizer, or one of them cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ReftEdgeError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    with _told(f"cannot read {path}"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _read_json(folder / "tokenizer_config.json")
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    special = {name: text for name in _TEXTS if (text := _token_text(named.get(name))) is not None}
    templates = _templates(folder, config)
    return Prompts(
        tokenizer, templates.get("default"), special, templates.get("tool_use"), read_end_ids(folder)
    )


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name, as transformers finds them: files come before what stands in tokenizer_config.json."""
    names = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
    paths = {name: folder / path for name, path in names.items()}
    if files := {name: read_text(path) for name, path in paths.items() if path.is_file()}:
        return files
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        found = {str(entry.get("name")): entry.get("template") for entry in entries}
    else:
        found = {"default": template}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end an answer by a model folder's generation_config.json or, where that names none, config.json."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        text = config.get("text_config")
        found = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        ids = found if isinstance(found, list) else [found]
        if ids := [token for token in ids if isinstance(token, int) and 0 <= token < 2**31]:
            return tuple(ids)
    return ()


def _token_text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ReftEdgeError(f"cannot read {path}: {error}") from error
    return parsed if isinstance(parsed, dict) else {}
