"""JSON objects in files of their own: configurations of models and tokenizers."""

import json
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.files import decode_text, open_regular

_MAX_SIZE = 64 << 20


def read_object(path: Path, limit: int = _MAX_SIZE) -> dict[str, Any]:
    """The object in a file of at most `limit` bytes, UTF-8 with or without a byte order mark.

    Raises ReftEdgeError that names the file if it cannot be read or holds anything else.
    """
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise ReftEdgeError(f"{path} has more than {limit:,} bytes")
    return parse_object(content, str(path))


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """The same from a file's bytes; `name` stands for it in messages."""
    try:
        parsed = json.loads(decode_text(content, name))
    except RecursionError as error:
        raise ReftEdgeError(f"{name} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ReftEdgeError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ReftEdgeError(f"{name} is not a JSON object")
    return parsed
