"""A soak test of a service: random requests, cancellations, deadlines and consumers on a few rows.

Every request must end exactly once. Its tokens must equal those of the request alone in an engine. Afterwards no
request may run or wait. The exit code is 1 otherwise. Sampled tokens may equal the engine's at one of three tree sizes:
in fp32, tree sizes disagree in about one draw of 30,000.

It also measures memory. Consumers are tasks of one event loop, except callbacks, each of which has a thread of the
service. Only the outcome of a request is kept. So growth of private memory over the second half of the requests is the
service's own. RSS also contains pages of the weights' file: when a token occurs for the first time, its row of the
embeddings is read into memory.

Prompts are pieces of the benchmark's prompts. Without a BUNDLE it exports a tiny random model, and prompts are random
tokens. With ``--backend stand-in`` the service runs on the TensorRT backend, over the stand-in for a GPU of the tests.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
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

from medusa_export.commands.progress import shown_progress
from medusa_export.common.progress import Task
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
    """A request, its consumer, and when it is cancelled.

    Attributes:
        prompt: Token ids of the prompt.
        policy: The options that determine the answer's tokens.
        consumer: ``read``, ``callback``, or ``raise`` for a callback that fails.
        cancel_after: Number of chunks after which a reader cancels the request; None for never.
        timeout: Seconds until the deadline; None for no deadline.
    """

    prompt: list[int]
    policy: dict[str, Any]
    consumer: str
    cancel_after: int | None
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a request.

    Attributes:
        name: The finish reason, or the class of the error.
        tokens: The tokens that the consumer received, as 32-bit integers.
    """

    name: str
    tokens: bytes

    @classmethod
    def of(cls, name: str, tokens: Sequence[int]) -> Outcome:
        """Makes an outcome of a name and a list of tokens."""
        return cls(name, np.array(list(tokens), np.int32).tobytes())  # a callback's thread may still add to the list

    @property
    def received(self) -> list[int]:
        """The tokens that the consumer received."""
        received: list[int] = np.frombuffer(self.tokens, np.int32).tolist()
        return received


@dataclass(frozen=True)
class RequestSource:
    """Draws random requests. The same number gives the same request.

    Attributes:
        corpus: Tokens that prompts are cut from.
        longest: The most tokens of a prompt.
        most: The most tokens of an answer.
        patience: Mean seconds until a deadline.
        sampling: Whether some requests sample.
        seed: Seed of all random choices.
    """

    corpus: list[int]
    longest: int
    most: int
    patience: float
    sampling: bool
    seed: int

    def request(self, number: int) -> Request:
        """The request of a number. Half of all requests begin with one of three system prompts."""
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
        """The options that determine a request's tokens, for a service and for an engine."""
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
    """Submits one request and receives its tokens."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._received: list[int] = []

    async def submit(self, service: MedusaService) -> RequestHandle:
        """Submits the request; tries again while the queue is full."""
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
            raise RuntimeError("an error of the consumer")

    async def follow(self, handle: RequestHandle) -> Outcome:
        """Waits for the end of the request and returns its outcome."""
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
@click.option("--requests", default=1000, show_default=True, help="Number of requests.")
@click.option("--rows", default=8, show_default=True, help="Rows of the service.")
@click.option(
    "--backend", default="auto", show_default=True, help="The service's backend; stand-in for TensorRT on no GPU."
)
@click.option("--threads", default=1, show_default=True, help="Threads of the service and the engine.")
@click.option("--rate", default=60.0, show_default=True, help="Mean arrivals per second.")
@click.option("--longest", default=300, show_default=True, help="The most tokens of a prompt.")
@click.option("--most", default=80, show_default=True, help="The most tokens of an answer.")
@click.option("--patience", default=0.5, show_default=True, help="Mean seconds until a deadline, if there is one.")
@click.option("--seed", default=0, show_default=True, help="Seed of all random choices.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def main(
    folder: Path | None,
    requests: int,
    rows: int,
    backend: str,
    threads: int,
    rate: float,
    longest: int,
    most: int,
    patience: float,
    seed: int,
    json_path: Path | None,
) -> None:
    """Runs all requests and prints a report as JSON."""
    with bundle_folder(folder) as bundle:
        source = RequestSource(corpus(bundle, seed), longest, most, patience, Bundle.load(bundle).sampling, seed)
        options = {"max_queue": QUEUE, "prefill_chunk": 16, "metrics": (ends := Ends())}
        if backend == "stand-in":
            service = stand_in_service(bundle, rows, longest + most, options)
        else:
            service = MedusaService.load(bundle, backend, rows=rows, threads=threads, **options)
        outcomes, report = asyncio.run(run_requests(service, source, requests, rate))
        service.close()
        engine = MedusaEngine.load(bundle, threads=threads)
        verdicts: Counter[str] = Counter()
        with shown_progress(quiet=False) as on_progress:
            task = Task("each alone", requests, on_progress)
            for number in range(requests):
                verdicts[verdict(number, source.request(number), outcomes.get(number), engine)] += 1
                task.finish_piece()
        report |= {"wrong": verdicts["wrong"], "ties": verdicts["tie"]}
    report |= {"rows": rows, "backend": backend, "ended": sum(ends.count.values())}
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["wrong"] or report["lost"] or report["ended"] != requests or not report["drained"]:
        sys.exit(1)


def stand_in_service(folder: Path, rows: int, longest: int, options: dict[str, Any]) -> MedusaService:
    """A service on the TensorRT backend, over the stand-in for a GPU.

    Args:
        folder: The bundle.
        rows: Rows of the engine.
        longest: The most tokens of a prompt and its answer.
        options: Options of the service.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from medusa_runtime.bundles.compiled import EngineLimits  # noqa: PLC0415
    from support.machine import Machine, stand_in_engine  # noqa: PLC0415

    bundle = Bundle.load(folder)
    capacity = bundle.slots.sequence_capacity(longest, bundle.tree.size)
    with tempfile.TemporaryDirectory() as scratch:
        limits = EngineLimits(rows, capacity, max(64, bundle.tree.size))
        machine = Machine(bundle, stand_in_engine(bundle, Path(scratch), limits), eagerness=0.05)
        return MedusaService(bundle, machine.backend(rows), Tokenizer.load(folder), **options)


def corpus(folder: Path, seed: int) -> list[int]:
    """Tokens that prompts are cut from: the benchmark's prompts, or noise if the bundle has no tokenizer."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        noise: list[int] = np.random.default_rng(seed).integers(1, 101, 4000).tolist()
        return noise
    from medusa_export.benchmarks.prompts import bench_prompts  # noqa: PLC0415

    return [token for prompt in bench_prompts() for token in tokenizer.encode(prompt.prompt)]


async def run_requests(
    service: MedusaService, source: RequestSource, requests: int, rate: float
) -> tuple[dict[int, Outcome], dict[str, Any]]:
    """Sends all requests to a service. Returns the outcomes by number, and figures for the report."""
    pauses = np.random.default_rng(source.seed).exponential(1 / rate, requests)
    process, memory = psutil.Process(), np.zeros((requests, 2))
    outcomes: dict[int, Outcome] = {}
    room = asyncio.Semaphore(4 * QUEUE)  # more than fit into the queue, so that some requests are refused
    started = time.monotonic()

    async def answer(number: int) -> None:
        consumer = Consumer(source.request(number))
        with suppress(TimeoutError):  # without an outcome, the request counts as lost
            outcomes[number] = await consumer.follow(await consumer.submit(service))
        room.release()
        task.finish_piece()

    with shown_progress(quiet=False) as on_progress:
        task = Task("requests", requests, on_progress)
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
    """Compares an outcome with the engine's answer: ``right``, ``wrong`` or ``tie``.

    A tie equals the engine's answer at another tree size: a draw was so near the border of two tokens that tree sizes
    disagree.
    """
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
    click.echo(f"Request {number} was wrong: {outcome}, {received} instead of {alone}; {request}", err=True)
    return "wrong"


if __name__ == "__main__":
    main()
