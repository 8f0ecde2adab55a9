"""A long run of the server under everything at once: many adapters, cancels, bad requests, a file replaced under load.

    python benchmarks/runtime/soak.py EXPORTED_FOLDER --requests 10000
    python benchmarks/runtime/soak.py EXPORTED_FOLDER --requests 1000 --free

Random adapters are made for the folder. Every answer that comes back whole is compared with what the model gives for that
request alone. Exits with 1 if an answer differs, a request is lost, or memory still grows after the first fifth.

With --free, requests have no max_tokens, most are conversations, and answers are sampled, so they are counted by what ended
them. Exits with 1 if a request is lost, or the server takes more memory at rest or at the end than is allowed.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress

from reft_edge.adapter.file import save_adapter
from reft_edge.runtime import SteeredModel
from reft_edge.runtime.bench import random_adapter

_MILD = 0.02
"""A scale at which a random adapter changes an answer, and its model still ends it."""
ADAPTERS, PROMPTS, CLIENTS = 20, 12, 24
POSITIONS = ("f7+l7", "l3", "all+gen", "gen", "all")
SENTENCES = "The quick brown fox jumps over the lazy dog. Water boils when it is hot; ice melts when it is warm. Who are you?"


def memory(process: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def prompts() -> list[str]:
    words = SENTENCES.split()
    return [" ".join(words[start % 7 : start % 7 + 2 + 3 * start]) for start in range(PROMPTS)]


class Soak:
    def __init__(
        self, folder: Path, adapters: Path, url: str, process: int, requests: int, tokens: int, free: bool
    ) -> None:
        self.free, self.generated = free, 0
        self.url, self.process, self.requests, self.tokens = url, process, requests, tokens
        self.adapters, self.prompts, self.choices = adapters, prompts(), random.Random(0)
        self.outcomes: Counter[str] = Counter()
        self.memory: list[tuple[int, int]] = []
        self.done = 0
        self.alone = SteeredModel(folder, device="cpu")
        self.known: dict[tuple[str, str | None], str] = {}
        self.variants: list[Path] = []

    def prepare(self, work: Path) -> None:
        for number in range(ADAPTERS):
            positions = POSITIONS[number % len(POSITIONS)]
            save_adapter(
                random_adapter(self.alone, 4, positions, seed=number),
                self.adapters / f"task{number}.safetensors",
            )
        for seed in (100, 101):
            path = work / f"variant{seed}.safetensors"
            save_adapter(random_adapter(self.alone, 4, "all+gen", seed=seed), path)
            self.variants.append(path)
        names: list[tuple[str | None, Path | None]] = [(None, None)]
        names += [(f"task{n}", self.adapters / f"task{n}.safetensors") for n in range(ADAPTERS)]
        names += [(path.stem, path) for path in self.variants]
        for name, path in names:
            if path is not None:
                self.alone.load_adapter(path, name)
            for prompt in () if self.free else self.prompts:
                self.known[prompt, name] = self.alone.generate(prompt, name, raw=True, max_tokens=self.tokens)

    async def run(self, progress: Progress) -> None:
        task = progress.add_task("requests", total=self.requests)
        # the server closes connections that were idle for 5 seconds, which are no longer used well before
        limits = httpx.Limits(max_connections=CLIENTS * 2, keepalive_expiry=2)
        async with httpx.AsyncClient(base_url=self.url, timeout=1800, limits=limits) as client:
            swapping = asyncio.create_task(self.swap())
            left = iter(range(self.requests))

            async def worker() -> None:
                for number in left:
                    await self.one(client, number)
                    self.done += 1
                    progress.advance(task)
                    if self.done % max(1, self.requests // 50) == 0:
                        self.memory.append((self.done, memory(self.process)))

            await asyncio.gather(*(worker() for _ in range(CLIENTS)))
            swapping.cancel()

    async def swap(self) -> None:
        """Replace one served file again and again while requests use it."""
        turn = 0
        while True:
            replacement = self.adapters / ".replacement"
            replacement.write_bytes(self.variants[turn % 2].read_bytes())
            os.replace(replacement, self.adapters / "swapped.safetensors")
            turn += 1
            await asyncio.sleep(0.2)

    async def freely(self, client: httpx.AsyncClient, number: int) -> None:
        """One request without max_tokens."""
        kind = self.choices.choices(("chat", "stream", "completion", "cancel", "bad"), (50, 20, 18, 6, 6))[0]
        prompt = self.choices.choice(self.prompts)
        name = self.choices.choice([None, *(f"task{n}" for n in range(ADAPTERS))])
        body: dict = {"model": "soak", "temperature": 0.8, "seed": number}
        if name is not None:
            body["adapters"] = {name: _MILD}
        if kind in ("chat", "stream"):
            text = f"In one short sentence: {prompt}"
            body |= {"messages": [{"role": "user", "content": text}], "stream": kind == "stream"}
            path = "/v1/chat/completions"
        else:
            body["prompt"], path = prompt, "/v1/completions"
        try:
            if kind == "cancel":
                await self.cancel(client, body)
            elif kind == "bad":
                await self.bad(client, body, number)
            elif kind == "stream":
                async with client.stream("POST", path, json=body) as stream:
                    lines = [line async for line in stream.aiter_lines() if line.startswith("data: ")]
                self.outcomes["streamed" if lines[-1] == "data: [DONE]" else "lost: a stream was cut"] += 1
                self.generated += len(lines) - 2
            else:
                answer = (await client.post(path, json=body)).json()
                self.outcomes[f"{kind}: {answer['choices'][0]['finish_reason']}"] += 1
                self.generated += answer["usage"]["completion_tokens"]
        except (httpx.HTTPError, KeyError) as error:
            self.outcomes[f"lost: {type(error).__name__}"] += 1

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        if self.free:
            await self.freely(client, number)
            return
        kind = self.choices.choices(("plain", "swapped", "cancel", "bad"), (80, 8, 6, 6))[0]
        prompt = self.choices.choice(self.prompts)
        name = self.choices.choice([None, *(f"task{n}" for n in range(ADAPTERS))])
        if kind == "swapped":
            name = "swapped"
        body = {
            "model": "soak" if name is None else f"soak:{name}",
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
        }
        try:
            if kind == "cancel":
                await self.cancel(client, body)
            elif kind == "bad":
                await self.bad(client, body, number)
            else:
                await self.compare(client, body, prompt, name)
        except httpx.HTTPError as error:
            self.outcomes[f"lost: {type(error).__name__}"] += 1

    async def compare(self, client: httpx.AsyncClient, body: dict, prompt: str, name: str | None) -> None:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            self.outcomes[f"lost: {answer.status_code}"] += 1
            return
        names = [path.stem for path in self.variants] if name == "swapped" else [name]
        right = answer.json()["choices"][0]["text"] in [self.known[prompt, each] for each in names]
        self.outcomes["answered as alone" if right else "differs"] += 1

    async def cancel(self, client: httpx.AsyncClient, body: dict) -> None:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            async for _ in stream.aiter_lines():
                break
        self.outcomes["cancelled"] += 1

    async def bad(self, client: httpx.AsyncClient, body: dict, number: int) -> None:
        worse = [
            ({**body, "model": "soak:nobody", "adapters": None}, 404),
            ({**body, "temperature": -1}, 400),
            ({**body, "prompt": "word " * 100_000}, 400),
            ({**body, "tools": [1]}, 400),
        ]
        content, expected = worse[number % len(worse)]
        answer = await client.post("/v1/completions", json=content)
        self.outcomes["refused" if answer.status_code == expected else f"lost: {answer.status_code}"] += 1


def wait_for(url: str, seconds: float = 120) -> None:
    """Until the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def growth(samples: list[tuple[int, int]]) -> tuple[int, int]:
    """Resident bytes after the first fifth of the requests, and at most after that."""
    warm = next(size for done, size in samples if done >= samples[-1][0] / 5)
    return warm, max(size for done, size in samples if done >= samples[-1][0] / 5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--allowed-growth", type=float, default=0.05, help="share of the warm size")
    parser.add_argument("--free", action="store_true", help="requests without max_tokens")
    parser.add_argument("--at-rest", type=int, default=450, help="MB, with --free")
    parser.add_argument("--afterwards", type=int, default=1300, help="MB, with --free")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        adapters = work / "adapters"
        adapters.mkdir()
        command = [
            sys.executable,
            "-m",
            "reft_edge",
            "serve",
            str(options.folder),
            "--adapters",
            str(adapters),
        ]
        command += ["--port", str(port), "--name", "soak", "--queue", "256"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            soak = Soak(
                options.folder,
                adapters,
                f"http://127.0.0.1:{port}",
                server.pid,
                options.requests,
                options.tokens,
                options.free,
            )
            with console.status("what each request gives alone"):
                soak.prepare(work)
                (adapters / "swapped.safetensors").write_bytes(soak.variants[0].read_bytes())
                wait_for(soak.url)
            time.sleep(2)
            rest = memory(server.pid)
            started = time.perf_counter()
            with Progress(console=console) as progress:
                asyncio.run(soak.run(progress))
            seconds = time.perf_counter() - started
            end = memory(server.pid)
        finally:
            server.terminate()
            server.wait(30)
    warm, most = growth(soak.memory)
    figures = {
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "memory at rest, MB": round(rest / 1e6, 1),
        "memory at the end, MB": round(end / 1e6, 1),
        "memory after a fifth, MB": round(warm / 1e6, 1),
        "most after that, MB": round(most / 1e6, 1),
        "memory after each tenth, MB": [round(size / 1e6, 1) for _, size in soak.memory[4::5]],
    }
    print(json.dumps(figures, indent=1))
    wrong = [name for name in soak.outcomes if name.startswith("lost") or name == "differs"]
    if options.free:
        print(f"tokens generated: {soak.generated:,}")
        large = rest > options.at_rest * 1e6 or max(most, end) > options.afterwards * 1e6
        raise SystemExit(1 if wrong or large else 0)
    raise SystemExit(1 if wrong or most > warm * (1 + options.allowed_growth) else 0)


if __name__ == "__main__":
    main()
