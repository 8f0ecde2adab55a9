"""What is fuzzed of the server: the bodies that clients send to every route, with models that answer without computing."""

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from harness import Target
from own_targets import make_manifest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reft_edge.errors import ReftEdgeError
from reft_edge.model.prompts import Prompts
from reft_edge.runtime.encoder import Classification
from reft_edge.runtime.logprobs import TokenScore
from reft_edge.runtime.request import Piece
from reft_edge.runtime.serving.app import serve
from reft_edge.runtime.serving.served import Decoder, Encoder, ServerSettings

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify")
_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
_LONGEST = 1 << 16


def make_prompts() -> Prompts:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({mark: i for i, mark in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Prompts(tokenizer, _TEMPLATE, {})


class StubBatch:
    """Ends every row at once, with one token."""

    def __init__(self) -> None:
        self.running, self.waiting, self.room = 0, [], None

    @property
    def idle(self) -> bool:
        return not self.waiting

    def add(self, row: Any) -> None:
        self.waiting.append(row)

    def step(self) -> None:
        for row in self.waiting:
            count = row.request.logprobs
            score = TokenScore(3, -math.inf, tuple((i, -1.0) for i in range(count or 0)))
            row.finish_reason = "stop"
            row.deliver(Piece("x", () if count is None else (score,), "stop"))
        self.waiting = []

    def abort(self, reason: str, error: str | None = None) -> None:
        self.waiting = []


class StubModel:
    """A decoder and an encoder that hold no weights."""

    def __init__(self) -> None:
        self.prompts, self.manifest = make_prompts(), make_manifest()
        self.held: dict[str, bytes] = {}

    def batch(
        self, slots: int, prefix_budget: int, cache_budget: int | None, speculate: bool | None
    ) -> StubBatch:
        return StubBatch()

    def row(self, request: Any, deliver: Any, room: int | None) -> Any:
        return SimpleNamespace(
            request=request, deliver=deliver, tokens=[3], finish_reason=None, cancelled=False
        )

    def check_constraint(self, form: Any) -> None:
        return

    def load_adapter(self, source: Any, name: str) -> str:
        self.held[name] = source.file.read()
        return name

    def unload_adapter(self, name: str) -> None:
        del self.held[name]

    def adapter_size(self, name: str) -> int:
        return len(self.held[name])

    def embed(self, inputs: Any, adapter: str | None) -> Any:
        return [np.zeros(8, np.float32) for _ in inputs], len(inputs)

    def classify(self, texts: Any, adapter: str) -> Any:
        return [Classification("a", {"a": 1.0}) for _ in texts]


SEEDS: dict[str, list[dict[str, Any]]] = {
    PATHS[0]: [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
        },
        {
            "model": "m:a",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}],
            "stream": True,
            "n": 3,
        },
        {
            "model": "m",
            "messages": [{"role": "system", "content": "x", "name": None}],
            "adapters": {"a": 0.5},
            "stop": ["a"],
        },
        {
            "model": "m",
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "4"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ],
    PATHS[1]: [
        {
            "model": "m",
            "prompt": ["a", "b"],
            "logprobs": 3,
            "seed": 1,
            "temperature": 0.5,
            "stream_options": {"include_usage": True},
        },
        {"model": "m:a", "prompt": [[1, 2], [3]], "stream": True, "user": "u"},
    ],
    PATHS[2]: [
        {"model": "m", "input": ["a", "b"], "encoding_format": "base64"},
        {"model": "m:a", "input": [[1, 2]], "dimensions": 8},
    ],
    PATHS[3]: [{"model": "m:a", "input": ["a", ["b", "c"]]}],
}


def server_bodies_target(folder: Path) -> Target:
    """A byte that chooses the route, and a body."""
    (folder / "a.safetensors").write_bytes(b"weights")
    settings = ServerSettings("m", hosts=("*",), max_body=_LONGEST, cache_budget=1 << 20)
    model: Any = StubModel()
    decoder, encoder = serve(Decoder(model, folder, settings)), serve(Encoder(model, folder, settings))
    loop = asyncio.new_event_loop()

    def read(content: bytes) -> None:
        path = PATHS[content[0] % len(PATHS)] if content else PATHS[0]
        app = decoder if path in PATHS[:2] else encoder
        status, headers, answer = loop.run_until_complete(post(app, path, content[1:]))
        assert status < 500, f"{status} {answer[:300]!r}"
        events = (
            answer.split(b"\n\n")[:-1]
            if b"event-stream" in headers[b"content-type"]
            else [b"data: " + answer]
        )
        parts = [json.loads(event[6:], parse_constant=refuse) for event in events if event != b"data: [DONE]"]
        errors = [part["error"] for part in parts if "error" in part]
        assert (status == 200) == (not errors), answer[:300]
        for error in errors:
            raise ReftEdgeError(error["message"])

    seeds = [bytes([i]) + json.dumps(body).encode() for i, path in enumerate(PATHS) for body in SEEDS[path]]
    return Target(read, [*seeds, b"\x01" + b"[{}," * 99, b'\x00{"model": "\\ud800"}'], len(seeds))


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


async def post(app: Any, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """The status, headers and body of an answer."""
    left = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []
    forever = asyncio.get_running_loop().create_future()

    async def receive() -> dict[str, Any]:
        return left.pop() if left else await forever

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    return (
        sent[0]["status"],
        dict(sent[0]["headers"]),
        b"".join(message.get("body", b"") for message in sent[1:]),
    )
