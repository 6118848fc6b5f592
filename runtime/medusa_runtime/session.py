"""A conversation of several turns with a service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from medusa_runtime.request import GenerationResult, RequestOptions

if TYPE_CHECKING:
    from medusa_runtime.service import MedusaService


class ChatSession:
    """Keeps what was said, and asks for the next answer to it.

    A turn goes on in the row where the one before ended, and computes only what is new, as long as no other request has
    needed that row: then the conversation is computed again. Either way the answer is the same, and
    ``stats.cached_tokens`` says which it was. One turn at a time; sessions side by side are independent.

    Args:
        service: Who answers.
        messages: What was said before, a system message for one.

    Attributes:
        messages: The conversation so far; a turn that failed leaves no trace in it.
    """

    def __init__(self, service: MedusaService, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self._service = service
        self.messages: list[Mapping[str, Any]] = list(messages)

    def send(self, text: str, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Says something and waits for the answer; arguments and errors as for ``MedusaService.generate``."""
        return self._said(text, self._service.generate(self._asked(text), **options))

    async def asend(self, text: str, **options: Unpack[RequestOptions]) -> GenerationResult:
        """As ``send``, for asyncio."""
        return self._said(text, await self._service.agenerate(self._asked(text), **options))

    def _asked(self, text: str) -> list[Mapping[str, Any]]:
        return [*self.messages, {"role": "user", "content": text}]

    def _said(self, text: str, answer: GenerationResult) -> GenerationResult:
        self.messages = [*self._asked(text), {"role": "assistant", "content": answer.text}]
        return answer
