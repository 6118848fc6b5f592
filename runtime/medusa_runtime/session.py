"""A session: a conversation of several turns with a service."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Unpack

from medusa_runtime.errors import RequestError
from medusa_runtime.request import GenerationResult, Prompt, RequestOptions


class AnswersPrompts(Protocol):
    """The part of a service that a session uses."""

    def check_process(self) -> None:
        """Raises ``ForkError`` in a child made by ``fork``."""
        ...

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Answers a prompt."""
        ...

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Answers a prompt, for asyncio."""
        ...


class ChatSession:
    """Keeps the messages of a conversation, and asks for the next answer.

    A turn continues in the row of the turn before and computes only what is new. If another request has used that row
    since, the conversation is computed again. The answer is the same in both cases; ``stats.cached_tokens`` says how
    many tokens were reused. Sessions are independent of each other.

    Threads and event loops may share a session, one turn at a time. A message that comes while an answer is awaited is
    refused with ``RequestError``, as its place in the conversation would depend on chance. In a child made by ``fork``
    both methods raise ``ForkError``.

    Args:
        service: The service that answers.
        messages: Messages from before, such as a system message.

    Attributes:
        messages: The conversation so far. A turn that failed adds nothing.
    """

    def __init__(self, service: AnswersPrompts, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self._service = service
        self.messages: list[Mapping[str, Any]] = list(messages)
        self._turn = threading.Lock()

    def send(self, text: str, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Sends a message and waits for the answer. Options and errors are those of ``MedusaService.generate``."""
        with self._taking_turn():
            return self._said(text, self._service.generate(self._asked(text), **options))

    async def asend(self, text: str, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Sends a message and waits for the answer, like ``send``, for asyncio."""
        with self._taking_turn():
            return self._said(text, await self._service.agenerate(self._asked(text), **options))

    @contextmanager
    def _taking_turn(self) -> Iterator[None]:
        self._service.check_process()
        if not self._turn.acquire(blocking=False):
            raise RequestError("This session waits for an answer: send one message at a time, or begin another.")
        try:
            yield
        finally:
            self._turn.release()

    def _asked(self, text: str) -> list[Mapping[str, Any]]:
        return [*self.messages, {"role": "user", "content": text}]

    def _said(self, text: str, answer: GenerationResult) -> GenerationResult:
        self.messages = [*self._asked(text), {"role": "assistant", "content": answer.text}]
        return answer
