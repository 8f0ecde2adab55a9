"""Bodies of requests: bounded in bytes, time and shape before anything is made of them."""

import asyncio
import json
import math
import re
from typing import Any

from starlette.types import Receive

from reft_edge.runtime.serving.errors import CLIENT_LEFT, ApiError

SECONDS = 30.0
"""How long a body may take to arrive."""
AT_ONCE = 64
"""Bodies of the largest size that may be arriving together; of more, the oldest is given up."""
MOST_VALUES = 16_384
"""Objects and lists in a body, and names in its objects."""
DEEPEST = 64
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"{}[]")))
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


class Arriving:
    """The bodies that are being received."""

    def __init__(self, largest: int, seconds: float = SECONDS) -> None:
        """`largest`: bytes of one body."""
        self._largest, self._seconds = largest, seconds
        self._parts: dict[asyncio.Task[bytes], bytearray] = {}

    async def read(self, receive: Receive) -> bytes:
        """A whole body. Raises ApiError for one that is too large or too slow, or whose client goes away."""
        part = bytearray()
        task = asyncio.ensure_future(self._collect(receive, part))
        self._parts[task] = part
        try:
            done, _ = await asyncio.wait([task], timeout=self._seconds)
            if not done or task.cancelled():
                raise ApiError(408, f"the body did not arrive within {self._seconds:g} seconds", "timeout")
            return task.result()
        finally:
            task.cancel()
            del self._parts[task]

    async def _collect(self, receive: Receive, part: bytearray) -> bytes:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(CLIENT_LEFT, "the client went away")
            part += message.get("body", b"")
            if len(part) > self._largest:
                raise too_large(self._largest)
            self._bound()
            if not message.get("more_body", False):
                return bytes(part)

    def _bound(self) -> None:
        held = sum(map(len, self._parts.values()))
        for task, part in self._parts.items():
            if held <= AT_ONCE * self._largest:
                return
            held -= len(part)
            part.clear()
            task.cancel()


def too_large(largest: int) -> ApiError:
    """The refusal of a body of more bytes."""
    return ApiError(413, f"the request's body is larger than {largest:,} bytes", "body_too_large")


def check_type(given: str | None) -> None:
    """Raise ApiError unless a Content-Type header says that the body is JSON.

    Web pages can send other types to this machine without asking its server first.
    """
    kind = (given or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"the request says {given[:100]!r}" if given else "the request does not say what its body is"
        raise ApiError(400, f"{found}: send Content-Type: application/json", "unsupported_content_type")


def parse(content: bytes) -> dict[str, Any]:
    """A body's JSON object. Raises ApiError; its shape is bounded before it is parsed."""
    _check_shape(content)

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ApiError(400, f"the body holds {text[:30]}, which is not a finite number")
        return number

    try:
        parsed = json.loads(content.decode("utf-8-sig"), parse_constant=finite, parse_float=finite)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ApiError(400, "the body is not a JSON object")
    if _HALF_PAIR.search(content):
        _check_pairs(parsed)
    return parsed


def _check_shape(content: bytes) -> None:
    """Count what stands outside of texts, at the speed of memory."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = re.sub(rb'"[^"]*"?', b"", plain)
    brackets = outside.translate(None, _NOT_BRACKETS)
    values = max(brackets.count(b"{") + brackets.count(b"["), outside.count(b":"))
    if values > MOST_VALUES:
        raise ApiError(
            400, f"the body has {values:,} objects, lists or names; at most {MOST_VALUES:,} are allowed"
        )
    depth = 0
    for mark in brackets:
        depth += 1 if mark in b"{[" else -1
        if depth > DEEPEST:
            raise ApiError(
                400, f"the body's objects and lists are nested deeper than {DEEPEST}, which is allowed"
            )


def _check_pairs(parsed: Any) -> None:
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400,
            "the body holds half of a surrogate pair, such as \\ud83d alone, which is no text: "
            "a character was cut in two; send both halves or neither",
        ) from error
