"""Training data: JSONL rows to prompt and completion tokens.

A row is `{"prompt": ..., "completion": ...}` or `{"messages": [{"role", "content"}, ...]}` that ends with the
assistant's answer; other fields are ignored. A loss is only taken on the completion.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.jsonl import read_rows
from reft_edge.prompts import Message, Prompts


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The rows of one file."""

    examples: list[Example]
    left_out: int
    """Rows longer than the limit, which are not trained on."""
    digest: str
    """SHA-256 of the file."""


def load_dataset(path: Path, prompts: Prompts, prompt_format: str, max_length: int) -> Dataset:
    """Read and tokenise a JSONL file; `prompt_format` is `chat` or `raw`, `max_length` in tokens a row.

    Raises ReftEdgeError that names the file and line for anything that is not such a row.
    """
    examples, left_out = [], 0
    for _, example in read_rows(path, lambda row: encode_row(row, prompts, prompt_format)):
        if len(example.prompt) + len(example.completion) > max_length:
            left_out += 1
        else:
            examples.append(example)
    if not examples:
        raise ReftEdgeError(
            f"{path} has no row to train on"
            + (
                f": all {left_out} are longer than {max_length} tokens; raise --max-length"
                if left_out
                else ""
            )
        )
    return Dataset(examples, left_out, sha256_of(path))


def encode_row(row: Any, prompts: Prompts, prompt_format: str) -> Example:
    """One parsed row as tokens. Raises ReftEdgeError if it is not of a known form."""
    if not isinstance(row, dict):
        raise ReftEdgeError('expected an object like {"prompt": ..., "completion": ...}')
    if "messages" in row:
        if prompt_format == "raw":
            raise ReftEdgeError("messages need the chat template; raw rows have `prompt` and `completion`")
        return _encode_chat(_messages(row["messages"]), prompts)
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ReftEdgeError(
            'expected text under "prompt" and "completion", or a list under "messages"; '
            f"found the fields {sorted(row)}"
        )
    if not completion:
        raise ReftEdgeError("the completion is empty")
    if prompt_format == "chat":
        return _encode_chat(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], prompts
        )
    return _example(
        prompts.encode_raw(prompt),
        prompts.encode_after(prompt, completion + prompts.special_tokens.get("eos_token", "")),
    )


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ReftEdgeError("expected at least two messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ReftEdgeError('every message needs text under "role" and "content"')
    if messages[-1]["role"] != "assistant":
        raise ReftEdgeError(f"the last message must be the assistant's, not {messages[-1]['role']!r}")
    return messages


def _encode_chat(messages: list[Message], prompts: Prompts) -> Example:
    before = prompts.render(messages[:-1])
    whole = prompts.render(messages, add_generation_prompt=False)
    eos = prompts.special_tokens.get("eos_token", "")
    answer = whole[len(before) :] if whole.startswith(before) else messages[-1]["content"] + eos
    if eos and eos in answer:
        answer = answer[: answer.rindex(eos) + len(eos)]
    return _example(prompts.encode_plain(before), prompts.encode_after(before, answer))


def _example(prompt: list[int], completion: list[int]) -> Example:
    if not prompt:
        raise ReftEdgeError("the prompt is empty; an intervention needs at least one token")
    return Example(tuple(prompt), tuple(completion))
