"""Puts a server under random load, and compares each answer with the answer that an engine gives alone.

Clients send requests to all endpoints with random fields and sizes, streamed or not. Some disconnect, some read slowly,
some send bad bodies. Meanwhile another process asks for the server's health. At the end the server gets SIGTERM while
requests run. Without a bundle, the script serves a tiny random model.

    scripts/load_server.py --requests 10000 --clients 64
    scripts/load_server.py bundle --requests 500
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tiny_bundle import bundle_folder

from medusa_runtime import MedusaEngine, SamplingParams

WORDS = ["the", "sky", "is", "blue", "and", "a", "river", "runs", "to", "sea", "while", "some", "clouds", "go", "by"]
BAD_BODIES = [
    b"",
    b"{",
    b"[1]",
    b"\xff",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": 5}]}',
    b'{"prompt": "Hi", "input": "Hi", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": -1}',
    b"[" * 100_000,
]
# Seconds between two looks at the server's health.
HEALTH_EVERY = 0.02
# Seconds that a slow reader takes for a chunk.
SLOW = 0.02


@dataclass(frozen=True)
class Example:
    """A request, and its right answer.

    Attributes:
        path: The endpoint.
        body: The body.
        texts: The texts of its answers.
    """

    path: str
    body: dict[str, Any]
    texts: list[str]


def make_examples(bundle: Path, count: int, most_tokens: int, seed: int) -> list[Example]:
    """Makes random requests, and answers each by an engine, one at a time."""
    choice = random.Random(seed)  # noqa: S311
    examples = []
    with MedusaEngine.load(bundle, threads=1, measure=False) as engine:
        for _ in range(count):
            prompt = " ".join(choice.choices(WORDS, k=choice.choice([1, 3, 10, 40])))
            length, answers = choice.randint(1, most_tokens), choice.choice([1, 1, 1, 2])
            path = choice.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses"])
            body: dict[str, Any] = {"temperature": 0}
            if choice.random() < 0.5:
                body = {"temperature": choice.choice([0.5, 1.0]), "seed": choice.randrange(10**6)}
                body |= choice.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
            if path == "/v1/responses":
                body, answers = body | {"input": prompt, "max_output_tokens": max(length, 16)}, 1
            else:
                body |= {"max_tokens": length, "n": answers}
                body |= choice.choice([{}, {"stop": choice.choice("aeiou")}, {"logprobs": True}])
                chat = path == "/v1/chat/completions"
                body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
                if not chat and "logprobs" in body:
                    body["logprobs"] = 0
            examples.append(Example(path, body, [answer(engine, path, body, index) for index in range(answers)]))
    return examples


def answer(engine: MedusaEngine, path: str, body: dict[str, Any], index: int) -> str:
    """The engine's answer to a request."""
    names = ("temperature", "top_p", "top_k", "min_p")
    given = {name: body[name] for name in names if name in body}
    sampling = SamplingParams(seed=body["seed"] + index, **given) if "seed" in body else None
    prompt = body["prompt"] if path == "/v1/completions" else body.get("messages", body.get("input"))
    if path == "/v1/responses":
        prompt = [{"role": "user", "content": prompt}]
    length = body.get("max_tokens") or body["max_output_tokens"]
    return engine.generate(prompt, max_new_tokens=length, stop=body.get("stop", ()), sampling=sampling).text


class Load:
    """Clients of one server.

    Args:
        address: The server's address.
        examples: The requests.
        seed: Seed of what each client does.

    Attributes:
        outcomes: Numbers of requests by outcome.
        wrong: The first answers that differ from the engine's.
        first: Seconds to the first text of streams.
    """

    def __init__(self, address: str, examples: list[Example], seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.first: list[float] = []
        self._examples = examples
        self._choice = random.Random(seed)  # noqa: S311
        self._web = httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=None))

    async def run(self, requests: int, clients: int) -> None:
        """Sends requests by a number of clients at a time."""
        left = iter(range(requests))
        await asyncio.gather(*(self._client(left) for _ in range(clients)))
        await self._web.aclose()

    async def _client(self, left: Iterator[int]) -> None:
        for _ in left:
            kind = self._choice.choices(["whole", "stream", "slow", "leave", "bad"], [40, 40, 5, 8, 7])[0]
            example = self._choice.choice(self._examples)
            try:
                self.outcomes[await self._send(kind, example)] += 1
            except httpx.HTTPError as error:
                self.outcomes[type(error).__name__] += 1

    async def _send(self, kind: str, example: Example) -> str:
        if kind == "bad":
            response = await self._web.post(example.path, content=self._choice.choice(BAD_BODIES))
            return "bad body refused" if response.status_code == 400 else f"bad body: {response.status_code}"
        if kind != "whole":
            return await self._stream(kind, example)
        response = await self._web.post(example.path, json=example.body)
        if response.status_code != 200:
            return f"status {response.status_code}"
        return self._compared(kind, example, whole_texts(response.json()))

    async def _stream(self, kind: str, example: Example) -> str:
        texts = [""] * len(example.texts)
        started = time.monotonic()
        async with self._web.stream("POST", example.path, json=example.body | {"stream": True}) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            async for event in events(response):
                if "error" in event:
                    return f"stream error {event['error']['code']}"
                for index, text in added_texts(event):
                    if text and not any(texts):
                        self.first.append(time.monotonic() - started)
                    texts[index] += text
                if kind == "leave" and self._choice.random() < 0.5:
                    return "left"
                if kind == "slow":
                    await asyncio.sleep(SLOW)
        return self._compared(kind, example, texts)

    def _compared(self, kind: str, example: Example, texts: list[str]) -> str:
        if texts == example.texts:
            return f"right ({kind})"
        if len(self.wrong) < 5:
            self.wrong.append(f"{example}: {texts}")
        return f"wrong ({kind})"


def whole_texts(data: dict[str, Any]) -> list[str]:
    """The texts of an answer."""
    if data["object"] == "response":
        return ["".join(part["text"] for item in data["output"] for part in item["content"])]
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in data["choices"]]


def added_texts(event: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The texts that an event adds, with the index of the answer."""
    if event.get("type") == "response.output_text.delta":
        yield 0, event["delta"]
    for choice in event.get("choices", ()):
        yield choice["index"], choice["delta"].get("content", "") if "delta" in choice else choice["text"]


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream's events."""
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def watch_health(address: str, pipe: Any) -> None:
    """Asks for the server's health until the pipe has a message; then sends the times that answers took."""
    times = []
    with httpx.Client(base_url=address, timeout=60) as web:
        while not pipe.poll(HEALTH_EVERY):
            started = time.monotonic()
            web.get("/health/live").raise_for_status()
            times.append(time.monotonic() - started)
    pipe.send(times)


@contextmanager
def server(bundle: Path, rows: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A context manager that runs a server in a process of its own. Gives its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "medusa_runtime.server", str(bundle), "--port", str(port), "--rows", str(rows)]
    process = subprocess.Popen([*command, "--threads", "1", "--log-level", "warning"], text=True)  # noqa: S603
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{address}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                if process.poll() is not None:
                    sys.exit("The server did not start.")
                time.sleep(0.1)
        yield address, process
    finally:
        process.kill()


def memory(process: subprocess.Popen[str]) -> float:
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


async def end_under_load(
    address: str, process: subprocess.Popen[str], examples: list[Example], clients: int
) -> Counter[str]:
    """Sends SIGTERM while each client waits for one answer."""
    load = Load(address, examples, seed=1)
    running = asyncio.create_task(load.run(clients, clients))
    async with httpx.AsyncClient(base_url=address, timeout=60) as web:
        while not running.done() and (await web.get("/health/ready")).json()["waiting"] < clients // 2:
            await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGTERM)
    await running
    code = await asyncio.to_thread(process.wait, 120)
    load.outcomes[f"exit code {code}"] += 1
    return load.outcomes


def main() -> None:
    """Runs the load and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="The bundle. Default: a tiny random model.")
    parser.add_argument("--requests", type=int, default=1000, help="Default: 1000.")
    parser.add_argument("--clients", type=int, default=64, help="Default: 64.")
    parser.add_argument("--examples", type=int, default=200, help="Different requests. Default: 200.")
    parser.add_argument("--most-tokens", type=int, default=24, help="The longest answer. Default: 24.")
    parser.add_argument("--rows", type=int, default=4, help="Default: 4.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    arguments = parser.parse_args()
    with bundle_folder(arguments.bundle, tokenizer=True) as folder:
        examples = make_examples(folder, arguments.examples, arguments.most_tokens, arguments.seed)
        with server(folder, arguments.rows) as (address, process):
            failed = run(address, process, examples, arguments)
    sys.exit(failed)


def run(address: str, process: subprocess.Popen[str], examples: list[Example], arguments: argparse.Namespace) -> int:
    """Runs the load against a server; 1 if an answer was wrong or lost."""
    here, there = multiprocessing.Pipe()
    watcher = multiprocessing.get_context("spawn").Process(target=watch_health, args=(address, there))
    warm_up = Load(address, examples, arguments.seed + 1)
    asyncio.run(warm_up.run(arguments.requests // 10, arguments.clients))
    before = memory(process)
    watcher.start()
    load = Load(address, examples, arguments.seed)
    started = time.monotonic()
    asyncio.run(load.run(arguments.requests, arguments.clients))
    seconds = time.monotonic() - started
    here.send(None)
    health = sorted(here.recv())
    figures = httpx.get(f"{address}/status/figures").json()
    after = memory(process)
    ended = asyncio.run(end_under_load(address, process, examples, arguments.clients))
    for outcome, count in sorted(load.outcomes.items()):
        print(f"{outcome:24} {count:6}")
    print(f"{arguments.requests / seconds:.0f} requests/s; {statistics.median(load.first):.3f} s to the first text")
    place = int(len(health) * 0.99)
    print(
        f"health: p50 {health[len(health) // 2] * 1e3:.1f} ms, p99 {health[place] * 1e3:.1f} ms ({len(health)} times)"
    )
    print(f"event loop late by {figures['event_loop_lag'] * 1e3:.1f} ms at most")
    print(f"memory {before:.0f} MiB after the warm-up, {after:.0f} MiB after the load")
    print(f"SIGTERM under load: {dict(sorted(ended.items()))}")
    print(*load.wrong, sep="\n")
    expected = ("right", "left", "bad body refused")
    return int(any(not outcome.startswith(expected) for outcome in load.outcomes) or ended["exit code 0"] != 1)


if __name__ == "__main__":
    main()
