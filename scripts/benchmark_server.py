"""Compares a server with the service behind it: tokens per second with many clients, and the time to the first token.

Rounds alternate between the service in this process and a server in a process of its own. Both answer the same prompts
with the same number of tokens, greedily, at the same tree size. Prefixes of prompts differ, so none is in a cache.

    scripts/benchmark_server.py bundle --clients 16 --tokens 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from load_server import WORDS, server
from tiny_bundle import bundle_folder

from medusa_runtime import MedusaService

# The seconds to the first token of each answer, and the seconds to the end of all.
Round = tuple[list[float], float]
Answer = Callable[[str], Awaitable[float]]


async def round_of(answer: Answer, prompts: list[str]) -> Round:
    """Asks for the answers to all prompts at a time."""
    started = time.perf_counter()
    firsts = await asyncio.gather(*(answer(prompt) for prompt in prompts))
    return firsts, time.perf_counter() - started


def by_service(service: MedusaService, tokens: int) -> Answer:
    """A contestant: the service alone."""

    async def answer(prompt: str) -> float:
        started, first = time.perf_counter(), 0.0
        async for _ in service.submit(prompt, max_new_tokens=tokens, ignore_eos=True):
            first = first or time.perf_counter() - started
        return first

    return answer


def by_server(port: int, tokens: int) -> Answer:
    """A contestant: streams of a server.

    They are read from bare sockets. An HTTP library takes two milliseconds of a processor for a request, and more for
    the events: on few cores, that time is taken from the server.
    """

    async def answer(prompt: str) -> float:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        data = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        started, first, last = time.perf_counter(), 0.0, b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + data)
        async for line in reader:  # other lines are headers and the sizes of chunks, which hold whole events
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                first, last = first or time.perf_counter() - started, line
        writer.close()
        usage = json.loads(last.removeprefix(b"data: "))["usage"]
        assert usage["completion_tokens"] == tokens, usage
        return first

    return answer


async def compare(service: MedusaService, port: int, arguments: argparse.Namespace) -> None:
    """Runs all rounds and prints the medians of both contestants."""
    choice = random.Random(0)  # noqa: S311
    contestants = {
        "service": by_service(service, arguments.tokens),
        "server": by_server(port, arguments.tokens),
    }
    for clients in (arguments.clients, 1):
        rounds: dict[str, list[Round]] = {name: [] for name in contestants}
        for number in range(arguments.rounds + 1):
            order = list(contestants) if number % 2 else list(reversed(contestants))
            prompts = [" ".join(choice.choices(WORDS, k=12)) for _ in range(clients)]
            for name in order:
                found = await round_of(contestants[name], prompts)
                if number:  # the first round warms up
                    rounds[name].append(found)
        ratios = [alone[1] / served[1] for alone, served in zip(rounds["service"], rounds["server"], strict=True)]
        firsts = {
            name: statistics.median(first for firsts, _ in found for first in firsts) * 1e3
            for name, found in rounds.items()
        }
        speed = clients * arguments.tokens / statistics.median(seconds for _, seconds in rounds["service"])
        print(
            f"{clients} clients: service {speed:.0f} tokens/s; server / service {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}); first token {firsts['service']:.1f} ms by the service, "
            f"{firsts['server']:.1f} ms by the server"
        )


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="The bundle. Default: a tiny random model.")
    parser.add_argument("--clients", type=int, default=16, help="Default: 16.")
    parser.add_argument("--rows", type=int, default=16, help="Default: 16.")
    parser.add_argument("--tokens", type=int, default=64, help="Tokens of each answer. Default: 64.")
    parser.add_argument("--rounds", type=int, default=7, help="Default: 7.")
    arguments = parser.parse_args()
    with (
        bundle_folder(arguments.bundle, tokenizer=True) as folder,
        server(folder, arguments.rows) as (address, _),
        MedusaService.load(folder, rows=arguments.rows, threads=1) as service,
    ):
        asyncio.run(compare(service, int(address.rpartition(":")[2]), arguments))


if __name__ == "__main__":
    main()
