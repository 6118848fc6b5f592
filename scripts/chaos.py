"""Runs services under injected faults: of 20,000 requests, none may be lost or get a wrong answer.

It runs many services, one after the other. In each, any call of the backend may raise an exception, before or after it
has done its work. Clocks jump, requests are cancelled or late, callbacks are slow or raise, and the process forks. In
the end the service is drained, or closed while requests run.

Every answer must equal the answer that an engine without faults gives to the request alone. Every other request must
end with one of this project's exceptions. The tokens that a request received before it ended must be the beginning of
that answer. As in ``soak.py``, a sampled answer may equal the engine's answer at one of three tree sizes.

The exit code is 1 if a request was wrong, was lost or ended with another exception, if a service failed, or if a call
in a forked child was not refused at once. Without a BUNDLE it exports a tiny random model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from faults import FaultyBackend, JumpyClock
from soak import Consumer, Ends, Outcome, Request, RequestSource, corpus, verdict
from tiny_bundle import bundle_folder

from medusa_export.commands.progress import shown_progress
from medusa_export.common.progress import Task
from medusa_runtime import Bundle, Chunk, ForkError, MedusaEngine, MedusaError, MedusaService
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.text.tokenizer import Tokenizer

POOL = 300  # different requests; the engine's answers to them are kept
QUEUE = 16
TYPED = ("right", "tie", "typed error")


class SlowConsumer(Consumer):
    """A consumer whose callback is slow in every seventh call."""

    def _callback(self, chunk: Chunk) -> None:
        if len(self._received) % 7 == 0:
            time.sleep(0.005)
        super()._callback(chunk)


@dataclasses.dataclass
class Tally:
    """The results of all services.

    Attributes:
        verdicts: Number of requests by verdict.
        ends: Number of requests by finish reason or class of error.
        faults: Number of exceptions by the call of the backend that raised.
        services: Number of services by the way they ended.
        jumps: Number of jumps of clocks.
        forks: Number of forked children.
        failures: Descriptions of other failures.
    """

    verdicts: Counter[str] = dataclasses.field(default_factory=Counter)
    ends: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    services: Counter[str] = dataclasses.field(default_factory=Counter)
    jumps: int = 0
    forks: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        """True if no request was wrong or lost, and there was no other failure."""
        return not self.failures and not set(self.verdicts) - set(TYPED)


@dataclasses.dataclass
class Scenario:
    """The requests and settings of all services. The same seed gives the same requests; timing differs.

    Attributes:
        source: Draws requests.
        engine: An engine without faults. It answers each request alone.
        rate: Probability that a call of the backend raises.
        rows: Rows of a service.
        seed: Seed of all random choices.
        answers: The engine's answers so far, by request and tree size.
    """

    source: RequestSource
    engine: MedusaEngine
    rate: float
    rows: int
    seed: int
    answers: dict[tuple[int, int], Any] = dataclasses.field(default_factory=dict)

    def request(self, number: int) -> Request:
        """A request: one of ``POOL`` prompts and policies, with its own consumer, cancellation and deadline."""
        own = self.source.request(number)
        shared = self.source.request(number % POOL)
        return dataclasses.replace(shared, consumer=own.consumer, cancel_after=own.cancel_after, timeout=own.timeout)

    def generate(self, number: int, *arguments: Any, tree_size: int, **policy: Any) -> Any:
        """The engine's answer to a request at a tree size, computed once and kept."""
        key = (number % POOL, tree_size)
        if key not in self.answers:
            self.answers[key] = self.engine.generate(*arguments, tree_size=tree_size, **policy)
        return self.answers[key]


class _Alone:
    """The engine as ``verdict`` uses it for one request. It reads the kept answers."""

    def __init__(self, scenario: Scenario, number: int) -> None:
        self._scenario, self._number, self.bundle = scenario, number, scenario.engine.bundle

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """The scenario's answer to this request."""
        return self._scenario.generate(self._number, *arguments, **options)


class ServiceRun:
    """A service from its start to its end.

    Args:
        scenario: The requests and settings.
        numbers: Numbers of the service's requests.
        tally: The results, to add to.
    """

    def __init__(self, scenario: Scenario, numbers: range, tally: Tally) -> None:
        self._scenario, self._numbers, self._tally = scenario, numbers, tally
        self._random = random.Random(f"{scenario.seed} {numbers.start}")  # noqa: S311  # no secret
        bundle = scenario.engine.bundle
        self._clock = JumpyClock()
        inner = OnnxRuntimeBackend(bundle, rows=scenario.rows, threads=1)
        self._backend = FaultyBackend(inner, rate=scenario.rate, seed=scenario.seed + numbers.start)
        self._ends = Ends()
        self._service = MedusaService(
            bundle,
            self._backend,  # type: ignore[arg-type]
            Tokenizer.load(bundle.listed),
            max_queue=QUEUE,
            tree_size=self._random.choice([1, min(4, bundle.tree.size), bundle.tree.size]),
            prefill_chunk=16,
            metrics=self._ends,
            clock=self._clock,
        )
        self._outcomes: dict[int, Outcome] = {}
        self._untyped: dict[int, str] = {}
        self._room = asyncio.Semaphore(3 * QUEUE)

    async def run(self) -> None:
        """Sends all requests, and drains or closes the service."""
        ending = self._random.choice(["drained", "closed"])
        last = self._numbers[-1] if ending == "drained" else self._numbers[-1 - len(self._numbers) // 10]
        async with asyncio.TaskGroup() as tasks:
            for number in self._numbers:
                await self._room.acquire()
                tasks.create_task(self._answer(number))
                await asyncio.sleep(self._random.expovariate(2000))
                self._perhaps_jump()
                if self._random.random() < 1 / 400:
                    tasks.create_task(self._fork())
                if number == last and ending == "closed":
                    tasks.create_task(asyncio.to_thread(self._service.close))
        if not await asyncio.to_thread(self._service.drain, 120):
            self._tally.failures.append("a service was not drained")
        state = self._service.state
        if state != ("draining" if ending == "drained" else "closed"):
            self._tally.failures.append(f"a service was {state}: {self._service.failure!r}")
        await asyncio.to_thread(self._service.close)
        self._tally.services[ending] += 1
        self._count()

    async def _answer(self, number: int) -> None:
        consumer = SlowConsumer(self._scenario.request(number))
        try:
            self._outcomes[number] = await consumer.follow(await consumer.submit(self._service))
        except MedusaError as error:  # the request was refused
            self._outcomes[number] = Outcome.of(type(error).__name__, [])
        except TimeoutError:
            pass  # without an outcome, the request counts as lost
        except Exception as error:  # noqa: BLE001  # this script searches for such exceptions
            self._untyped[number] = repr(error)
        self._room.release()

    def _perhaps_jump(self) -> None:
        if self._random.random() < 1 / 100:
            self._clock.jump(self._random.choice([-1, 1]) * self._random.choice([0.1, 10, 1e5]))

    async def _fork(self) -> None:
        child = os.fork()
        if not child:
            os._exit(_refusals(self._service))
        code = await asyncio.to_thread(_exit_code, child)
        self._tally.forks += 1
        if code != 0:
            self._tally.failures.append(f"a forked child ended with {code}")

    def _count(self) -> None:
        tally = self._tally
        tally.faults += self._backend.raised
        tally.jumps += self._clock.jumps
        waiting = [thread for thread in threading.enumerate() if thread.name.startswith("medusa-callback")]
        for thread in waiting:
            thread.join(30)
        if any(thread.is_alive() for thread in waiting) or self._service.load_figures != (0, 0):
            tally.failures.append("a service left threads or requests behind")
        for number in self._numbers:
            outcome = self._outcomes.get(number)
            if number in self._untyped:
                tally.verdicts["other exception"] += 1
                tally.failures.append(self._untyped[number])
                continue
            if outcome is None:
                tally.verdicts["lost"] += 1
                continue
            tally.ends[outcome.name] += 1
            request = self._scenario.request(number)
            found = verdict(number, request, outcome, _Alone(self._scenario, number))  # type: ignore[arg-type]
            if found != "wrong" and outcome.name not in ("stop", "length"):
                found = "typed error"
            tally.verdicts[found] += 1


def _refusals(service: MedusaService) -> int:
    """The exit code of a forked child: 0 if each call of the service raises ``ForkError``."""
    for call in (lambda: service.submit([1]), lambda: service.generate([1]), service.drain, service.close):
        try:
            call()
        except ForkError:
            continue
        except BaseException:  # noqa: BLE001  # the parent reports the exit code
            return 2
        return 3
    return 0 if service.state == "failed" else 4


def _exit_code(child: int) -> int:
    """The exit code of a child; -9 if it did not end within 30 seconds and was killed."""
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


@click.command()
@click.argument("folder", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option("--requests", default=20_000, show_default=True, help="Number of requests.")
@click.option("--requests-per-service", "per_service", default=400, show_default=True, help="Requests per service.")
@click.option("--rate", default=0.002, show_default=True, help="Probability that a call of the backend raises.")
@click.option("--rows", default=6, show_default=True, help="Rows of a service.")
@click.option("--seed", default=0, show_default=True, help="Seed of all random choices.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def main(
    folder: Path | None, requests: int, per_service: int, rate: float, rows: int, seed: int, json_path: Path | None
) -> None:
    """Runs all services and prints the results as JSON."""
    logging.getLogger("medusa_runtime").setLevel(logging.CRITICAL)  # thousands of failures are expected
    started = time.monotonic()
    with bundle_folder(folder) as path:
        bundle = Bundle.load(path)
        source = RequestSource(corpus(path, seed), 200, 40, 0.5, bundle.sampling, seed)
        tally, engine = Tally(), MedusaEngine.load(path, threads=1)
        scenario = Scenario(source, engine, rate, rows, seed)
        with shown_progress(quiet=False) as on_progress:
            task = Task("requests", requests, on_progress)
            for first in range(0, requests, per_service):
                numbers = range(first, min(first + per_service, requests))
                asyncio.run(ServiceRun(scenario, numbers, tally).run())
                for _ in numbers:
                    task.finish_piece()
        engine.close()
    report = {"requests": requests, "seconds": round(time.monotonic() - started), **vars(tally)}
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not tally.is_fine or sum(tally.verdicts.values()) != requests:
        sys.exit(1)


if __name__ == "__main__":
    main()
