"""A long stormy day of a service: random requests, cancels, deadlines and consumers over a few rows.

Every request must end exactly once; what came of it must equal its run alone; afterwards nothing may run or wait. Fails
with exit code 1 otherwise. Where tokens are drawn it may equal the run at one of three tree sizes: in fp32 these differ
in about one draw of 30,000. Consumers are tasks of one event loop, but for callbacks, which have a thread each from the
service; of a request nothing is kept but what came of it. So the slope of private memory over the second half of the
day is the service's own. RSS has pages of the weights' file besides: a token that comes up for the first time brings in
its row of the embeddings.

Without a BUNDLE it exports a tiny random model; prompts are pieces of the bench's prompts or, there, of noise.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from tiny_bundle import bundle_folder

from medusa_export.common.progress import progress_bar
from medusa_runtime import (
    Bundle,
    Chunk,
    MedusaEngine,
    MedusaError,
    MedusaService,
    Metrics,
    QueueFullError,
    RequestHandle,
    SamplingParams,
    Stats,
)
from medusa_runtime.text.tokenizer import Tokenizer

SHARED = 60  # tokens that half of the prompts begin with
QUEUE = 16
FINISHED = ("stop", "length")
PATIENCE = 300  # seconds after which a request is lost


@dataclass(frozen=True)
class Request:
    """A request, and what is going to happen to it.

    Attributes:
        prompt: Its tokens.
        policy: Options that decide which tokens are right.
        consumer: ``read``, ``callback``, or ``raise`` for a callback that fails.
        cancel_after: Chunks after which a reader cancels it.
        timeout: Seconds until its deadline.
    """

    prompt: list[int]
    policy: dict[str, Any]
    consumer: str
    cancel_after: int | None
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request.

    Attributes:
        name: Its finish reason, or the class of its error.
        tokens: What its consumer got, as 32-bit integers.
    """

    name: str
    tokens: bytes

    @classmethod
    def of(cls, name: str, tokens: Sequence[int]) -> Outcome:
        """What is worth keeping."""
        return cls(name, np.array(list(tokens), np.int32).tobytes())  # a callback's own thread may go on for a moment

    @property
    def received(self) -> list[int]:
        """The tokens."""
        received: list[int] = np.frombuffer(self.tokens, np.int32).tolist()
        return received


@dataclass(frozen=True)
class Weather:
    """Draws requests; the same one for the same number.

    Attributes:
        corpus: What prompts are cut from.
        longest: Tokens of a prompt at most.
        most: Tokens of an answer at most.
        patience: Mean seconds until a deadline.
        sampling: Some requests draw their tokens.
        seed: Of all draws.
    """

    corpus: list[int]
    longest: int
    most: int
    patience: float
    sampling: bool
    seed: int

    def request(self, number: int) -> Request:
        """One of the day's requests; half of them begin with one of three system prompts."""
        rng = np.random.default_rng((self.seed, number))
        prompt = self._piece(rng, int(rng.exponential(25)) + 1)
        if rng.random() < 0.5:
            begin = int(rng.integers(3)) * SHARED
            prompt = self.corpus[begin : begin + SHARED] + prompt
        return Request(
            prompt[: self.longest],
            self._policy(rng),
            str(rng.choice(["read", "callback", "raise"], p=[0.75, 0.2, 0.05])),
            int(rng.integers(20)) if rng.random() < 0.15 else None,
            float(rng.exponential(self.patience)) + 1e-3 if rng.random() < 0.15 else None,
        )

    def _policy(self, rng: np.random.Generator) -> dict[str, Any]:
        """What a request asks for: options that a service and an engine both take, and that fix its tokens."""
        policy: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, self.most))}
        if self.sampling and rng.random() < 0.4:
            policy["sampling"] = SamplingParams(
                temperature=float(rng.uniform(0.2, 1.5)),
                top_k=int(rng.choice([0, 20])),
                top_p=float(rng.choice([1.0, 0.9])),
                seed=int(rng.integers(1 << 30)),
            )
        return policy

    def _piece(self, rng: np.random.Generator, length: int) -> list[int]:
        begin = int(rng.integers(len(self.corpus) - length)) if length < len(self.corpus) else 0
        return self.corpus[begin : begin + length]


class Ends(Metrics):
    """Counts how requests end."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def ended(self, outcome: str, stats: Stats) -> None:
        self.count[outcome] += 1


class Consumer:
    """Takes what comes of one request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._received: list[int] = []

    async def submit(self, service: MedusaService) -> RequestHandle:
        """Submits it, and again while the queue is full."""
        request = self._request
        while True:
            try:
                return service.submit(
                    request.prompt,
                    timeout=request.timeout,
                    priority=len(request.prompt) % 3,
                    on_chunk=None if request.consumer == "read" else self._callback,
                    **request.policy,
                )
            except QueueFullError:
                await asyncio.sleep(0.02)

    def _callback(self, chunk: Chunk) -> None:
        self._received += chunk.token_ids
        if self._request.consumer == "raise":
            raise RuntimeError("a consumer's fault")

    async def follow(self, handle: RequestHandle) -> Outcome:
        """Waits for its end."""
        try:
            if self._request.consumer == "read":
                count = 0
                async for chunk in handle:
                    self._received += chunk.token_ids
                    if count == self._request.cancel_after:
                        handle.cancel()
                    count += 1
            async with asyncio.timeout(PATIENCE):
                result = await handle.aresult()
        except MedusaError as error:
            return Outcome.of(type(error).__name__, self._received)
        for _ in range(1000):
            if len(self._received) == len(result.token_ids):
                break
            await asyncio.sleep(0.01)
        return Outcome.of(result.finish_reason, self._received)


@click.command()
@click.argument("folder", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option("--requests", default=1000, show_default=True)
@click.option("--rows", default=8, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rate", default=60.0, show_default=True, help="Mean arrivals per second.")
@click.option("--longest", default=300, show_default=True, help="Tokens of a prompt, at most.")
@click.option("--most", default=80, show_default=True, help="Tokens of an answer, at most.")
@click.option("--patience", default=0.5, show_default=True, help="Mean seconds until a deadline, where there is one.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def main(
    folder: Path | None,
    requests: int,
    rows: int,
    threads: int,
    rate: float,
    longest: int,
    most: int,
    patience: float,
    seed: int,
    json_path: Path | None,
) -> None:
    """Runs the day and prints its report."""
    with bundle_folder(folder) as bundle:
        weather = Weather(corpus(bundle, seed), longest, most, patience, Bundle.load(bundle).sampling, seed)
        service = MedusaService.load(
            bundle, rows=rows, threads=threads, max_queue=QUEUE, prefill_chunk=16, metrics=(ends := Ends())
        )
        outcomes, report = asyncio.run(day(service, weather, requests, rate))
        service.close()
        engine = MedusaEngine.load(bundle, threads=threads)
        verdicts: Counter[str] = Counter()
        with progress_bar("each alone", requests) as bar:
            for number in range(requests):
                verdicts[verdict(number, weather.request(number), outcomes.get(number), engine)] += 1
                bar.finish_piece()
        report |= {"wrong": verdicts["wrong"], "ties": verdicts["tie"]}
    report |= {"rows": rows, "ended": sum(ends.count.values())}
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["wrong"] or report["lost"] or report["ended"] != requests or not report["drained"]:
        sys.exit(1)


def corpus(folder: Path, seed: int) -> list[int]:
    """Tokens to cut prompts from."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        noise: list[int] = np.random.default_rng(seed).integers(1, 101, 4000).tolist()
        return noise
    from medusa_export.benchmarks.bench import bench_prompts  # noqa: PLC0415

    return [token for prompt in bench_prompts() for token in tokenizer.encode(prompt.prompt)]


async def day(
    service: MedusaService, weather: Weather, requests: int, rate: float
) -> tuple[dict[int, Outcome], dict[str, Any]]:
    """Sends all requests through a service; gives what came of them, and figures."""
    pauses = np.random.default_rng(weather.seed).exponential(1 / rate, requests)
    process, memory = psutil.Process(), np.zeros((requests, 2))
    outcomes: dict[int, Outcome] = {}
    room = asyncio.Semaphore(4 * QUEUE)  # many more than the queue takes, so that requests are turned away
    started = time.monotonic()

    async def answer(number: int) -> None:
        consumer = Consumer(weather.request(number))
        with suppress(TimeoutError):  # it is lost
            outcomes[number] = await consumer.follow(await consumer.submit(service))
        room.release()
        bar.finish_piece()

    with progress_bar("requests", requests) as bar:
        async with asyncio.TaskGroup() as consumers:
            for number, pause in enumerate(pauses):
                await asyncio.sleep(pause)
                await room.acquire()
                consumers.create_task(answer(number))
                info = process.memory_info()
                memory[number] = info.rss, info.rss - info.shared
    drained = service.drain(120)
    seconds = time.monotonic() - started
    half = requests // 2
    slopes = np.polyfit(np.arange(half, requests), memory[half:], 1)[0]
    resident, private = np.round(memory[:: max(requests // 8, 1)] / 2**20, 1).T.tolist()
    return outcomes, {
        "requests": requests,
        "seconds": round(seconds, 1),
        "tokens": sum(len(outcome.received) for outcome in outcomes.values()),
        "outcomes": dict(Counter(outcome.name for outcome in outcomes.values())),
        "lost": requests - len(outcomes),
        "drained": drained and service.load_figures == (0, 0),
        "threads_left": sum(thread.name.startswith("medusa-callback") for thread in threading.enumerate()),
        "rss_mib": resident,
        "private_mib": private,
        "rss_slope_bytes_per_request": round(float(slopes[0])),
        "private_slope_bytes_per_request": round(float(slopes[1])),
    }


def verdict(number: int, request: Request, outcome: Outcome | None, engine: MedusaEngine) -> str:
    """``right``, ``wrong``, or ``tie``: a draw so near the border of two tokens that tree sizes disagree."""
    largest = engine.bundle.tree.size
    if outcome is None:
        return "wrong"
    received = outcome.received
    for tree_size in (1, min(4, largest), largest) if "sampling" in request.policy else (1,):
        alone = list(engine.generate(request.prompt, tree_size=tree_size, **request.policy).token_ids)
        whole = outcome.name in FINISHED and request.consumer != "raise"
        expected = alone if whole else alone[: len(received)]
        if received == expected:
            return "right" if tree_size == 1 else "tie"
    click.echo(f"Request {number} was wrong: {outcome}, {received} in place of {alone}; {request}", err=True)
    return "wrong"


if __name__ == "__main__":
    main()
