"""The base of all endpoints: the service, the settings, and threads that prepare requests beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from medusa_runtime.request import RequestOptions
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.generation import Choice, Generation
from medusa_runtime.server.output.formats import ChatFormat
from medusa_runtime.server.output.parts import OutputParser
from medusa_runtime.server.settings import Settings
from medusa_runtime.service import MedusaService

T = TypeVar("T")

# Threads that check, render and encode requests. Templates hold Python's lock, so that more would bring nothing.
_THREADS = 4


class Clients:
    """Counts the answers that each client waits for.

    Args:
        most: The most of one client; None for no limit.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._waiting: Counter[str] = Counter()
        self._lock = Lock()

    @contextlib.contextmanager
    def waiting(self, client: str, answers: int) -> Iterator[None]:
        """A context manager that counts answers while a client waits for them.

        Raises:
            ApiError: The client would wait for too many.
        """
        with self._lock:
            if self._most is not None and self._waiting[client] + answers > self._most:
                message = f"This client may wait for {self._most} answers at a time: try again later."
                raise ApiError(
                    429, message, "rate_limit_exceeded", kind="rate_limit_error", headers={"Retry-After": "1"}
                )
            self._waiting[client] += answers
        try:
            yield
        finally:
            with self._lock:
                self._waiting[client] -= answers
                if not self._waiting[client]:
                    del self._waiting[client]


@dataclass(frozen=True)
class Asked:
    """An answer that a request asks for, before it is submitted.

    Attributes:
        prompt: Index of the prompt.
        token_ids: The prompt's tokens.
        options: Options for the service.
        parser: The parser of the answer.
    """

    prompt: int
    token_ids: Sequence[int]
    options: RequestOptions
    parser: OutputParser


class Api:
    """A service behind endpoints.

    Args:
        service: The service.
        settings: The settings.

    Attributes:
        form: The model's format of answers.
        created: Unix time at which the service was loaded.
    """

    def __init__(self, service: MedusaService, settings: Settings) -> None:
        self.service = service
        self.settings = settings
        self.form = ChatFormat.of(
            service.tokenizer, tools=settings.tool_format, reasoning_format=settings.reasoning_format
        )
        self.created = int(time.time())
        self._clients = Clients(settings.max_client_requests)
        self._threads = ThreadPoolExecutor(_THREADS, "medusa-prepare")

    @property
    def model(self) -> str:
        """Name of the model in answers."""
        return self.settings.names[0]

    async def in_thread(self, work: Callable[[], T], undo: Callable[[T], object] = lambda _: None) -> T:
        """Runs a function in a thread.

        Args:
            work: The function.
            undo: Is called with the function's result if the task is cancelled meanwhile.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: None if done.exception() else undo(done.result()))
            raise
        finally:
            del future  # an error's traceback holds this frame, which must not hold the error

    def submit(self, client: str, answers: Sequence[Asked]) -> Generation:
        """Submits all answers of a request, or none.

        Args:
            client: The client that asks.
            answers: The answers that it asks for.

        Raises:
            ApiError: The client waits for too many answers.
            MedusaError: The service refuses one of them.
        """
        with ExitStack() as stack:
            stack.enter_context(self._clients.waiting(client, len(answers)))
            choices = []
            for index, asked in enumerate(answers):
                handle = self.service.submit(asked.token_ids, **asked.options)
                stack.callback(handle.cancel)
                choices.append(Choice(index, asked.prompt, handle, asked.parser))
            return Generation(choices, stack.pop_all())

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
