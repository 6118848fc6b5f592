"""A conversation of several turns with a service."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Unpack

from medusa_runtime.errors import RequestError
from medusa_runtime.request import GenerationResult, Prompt, RequestOptions


class AnswersPrompts(Protocol):
    """What a session needs of a service: answers to prompts, and a refusal in a forked child."""

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
    """Keeps what was said, and asks for the next answer to it.

    A turn goes on in the row where the one before ended, and computes only what is new, as long as no other request has
    needed that row: then the conversation is computed again. Either way the answer is the same, and
    ``stats.cached_tokens`` says which it was. Sessions side by side are independent.

    Threads and event loops may share a session, one turn at a time: to say something while an answer is awaited is
    refused with ``RequestError``, as its place in the conversation would be chance. In a child made by ``fork`` both
    methods raise ``ForkError``.

    Args:
        service: Who answers.
        messages: What was said before, a system message for one.

    Attributes:
        messages: The conversation so far; a turn that failed leaves no trace in it.
    """

    def __init__(self, service: AnswersPrompts, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self._service = service
        self.messages: list[Mapping[str, Any]] = list(messages)
        self._turn = threading.Lock()

    def send(self, text: str, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Says something and waits for the answer; arguments and errors as for ``MedusaService.generate``."""
        with self._taking_turn():
            return self._said(text, self._service.generate(self._asked(text), **options))

    async def asend(self, text: str, **options: Unpack[RequestOptions]) -> GenerationResult:
        """As ``send``, for asyncio."""
        with self._taking_turn():
            return self._said(text, await self._service.agenerate(self._asked(text), **options))

    @contextmanager
    def _taking_turn(self) -> Iterator[None]:
        self._service.check_process()
        if not self._turn.acquire(blocking=False):
            raise RequestError("This session waits for an answer: say one thing at a time, or begin another session.")
        try:
            yield
        finally:
            self._turn.release()

    def _asked(self, text: str) -> list[Mapping[str, Any]]:
        return [*self.messages, {"role": "user", "content": text}]

    def _said(self, text: str, answer: GenerationResult) -> GenerationResult:
        self.messages = [*self._asked(text), {"role": "assistant", "content": answer.text}]
        return answer
