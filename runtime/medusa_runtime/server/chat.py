"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self

from medusa_runtime.server.api import Api, Asked
from medusa_runtime.server.chat_prompt import chat_prompt
from medusa_runtime.server.constraints import constraints_of
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.generation import Delta, Generation
from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.logprobs import chat_logprobs
from medusa_runtime.server.output.parts import Arguments, Call
from medusa_runtime.server.schema.answers import (
    CalledFunction,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from medusa_runtime.server.schema.base import JsonObject
from medusa_runtime.server.schema.chat import ChatRequest
from medusa_runtime.server.streaming import Events
from medusa_runtime.server.tool_choice import ToolChoice
from medusa_runtime.server.translate import (
    check_answers,
    check_model,
    check_served,
    new_tokens,
    request_options,
)


@dataclass
class ChatJob:
    """A chat that is answered.

    Attributes:
        api: What all endpoints share.
        request: The request.
        generation: The answers.
        choice: Which functions it may or must call.
        id: Identifier of the answer.
        created: Unix time of the request.
    """

    api: Api
    request: ChatRequest
    generation: Generation
    choice: ToolChoice
    id: str = field(default_factory=lambda: f"chatcmpl-{random_hex(24)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def begin(cls, api: Api, data: bytes, client: str) -> Self:
        """Checks, renders, encodes and submits a request.

        Args:
            api: What all endpoints share.
            data: The body.
            client: The client that asks.

        Raises:
            ApiError: The request is refused; so do pydantic's ``ValidationError`` and ``MedusaError``.
        """
        request = ChatRequest.model_validate_json(data)
        settings, service = api.settings, api.service
        check_model(settings.names, request.model)
        check_served(request)
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: set it to true.", "invalid_value", param="top_logprobs")
        check_answers(settings.most_answers, 1, request.n)
        choice = ToolChoice.of(request.tool_choice, request.tools or (), parallel=request.parallel_tool_calls)
        prompt = chat_prompt(
            service.tokenizer,
            api.form,
            request.messages,
            max_tokens=service.max_tokens,
            tools=choice.tools,
            variables=template_variables(request.chat_template_kwargs, request.reasoning_effort),
        )
        constraints = choice.constrained(api.form, prompt, constraints_of(request))
        asked_for = request.max_completion_tokens or request.max_tokens
        most = new_tokens(
            service, len(prompt.token_ids), asked_for, most_prompt=settings.max_prompt_tokens, field="messages"
        )
        answers = []
        for index in range(request.n or 1):
            options = request_options(
                service,
                request,
                constraints,
                index=index,
                logprobs=bool(request.logprobs),
                top_logprobs=request.top_logprobs or 0,
                timeout=settings.request_seconds,
            )
            options["max_new_tokens"] = most
            options["stop"] = request.stop or ()
            options["shown_token_ids"] = api.form.shown_token_ids
            answers.append(Asked(0, prompt.token_ids, options, choice.parser(api.form, prompt)))
        return cls(api, request, api.submit(client, answers), choice)

    @property
    def stream(self) -> bool:
        """True if the answer comes as events."""
        return bool(self.request.stream)

    async def answer(self) -> ChatCompletion:
        """The complete answer."""
        deltas = await self.generation.whole()
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.api.model,
            "choices": [
                {
                    "index": delta.choice.index,
                    "message": self._message(delta),
                    "logprobs": self._logprobs(delta),
                    "finish_reason": self._finish_reason(delta) or "stop",
                }
                for delta in deltas
            ],
            "usage": self.generation.usage,
        }

    async def events(self) -> AsyncGenerator[Events]:
        """The chunks of the answer."""
        include_usage = bool(self.request.stream_options and self.request.stream_options.include_usage)
        role: ChatDelta = {"role": "assistant", "content": ""}
        yield [self._chunk(choice.index, role, include_usage=include_usage) for choice in self.generation.choices]
        async with aclosing(self.generation.deltas(self.api.settings.keep_alive_seconds)) as steps:
            async for deltas in steps:
                chunks = []
                for delta in deltas:
                    added = self._added(delta)
                    if added or delta.result is not None or delta.logprobs:
                        chunks.append(self._chunk(delta.choice.index, added, delta, include_usage=include_usage))
                if chunks or not deltas:
                    yield chunks
        if include_usage:
            chunk = self._chunk(0, {}, include_usage=True)
            yield [{**chunk, "choices": [], "usage": self.generation.usage}]

    def _chunk(self, index: int, added: ChatDelta, delta: Delta | None = None, *, include_usage: bool) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.api.model,
            "choices": [
                {
                    "index": index,
                    "delta": added,
                    "logprobs": None if delta is None else self._logprobs(delta),
                    "finish_reason": self._finish_reason(delta) if delta else None,
                }
            ],
        }
        if include_usage:
            chunk["usage"] = None
        return chunk

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return chat_logprobs(self.api.service.tokenizer, delta)

    def _message(self, delta: Delta) -> ChatMessage:
        calls = [self._tool_call(call) for call in delta.calls]
        message: ChatMessage = {
            "role": "assistant",
            "content": delta.content or (None if calls else ""),
            "refusal": None,
        }
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _added(self, delta: Delta) -> ChatDelta:
        added: ChatDelta = {}
        if delta.content:
            added["content"] = delta.content
        if delta.reasoning:
            added["reasoning_content"] = delta.reasoning
        if calls := list(self._call_deltas(delta)):
            added["tool_calls"] = calls
        return added

    def _call_deltas(self, delta: Delta) -> Iterator[ToolCallDelta]:
        """The calls that begin, and further arguments of calls."""
        index = delta.choice.calls - sum(isinstance(part, Call) for part in delta.parts) - 1
        for part in delta.parts:
            if isinstance(part, Call):
                index += 1
                function: FunctionDelta = {"name": part.name, "arguments": part.arguments}
                yield {"index": index, "id": self._call_id(), "type": "function", "function": function}
            elif isinstance(part, Arguments):
                yield {"index": index, "function": {"arguments": part.text}}

    def _finish_reason(self, delta: Delta) -> FinishReason | None:
        """Why the answer has ended. As in OpenAI's API, a call of the one function that must be called is ``stop``."""
        reason = delta.finish_reason
        return "stop" if reason == "tool_calls" and self.choice.name is not None else reason

    def _tool_call(self, call: Call) -> ToolCall:
        function: CalledFunction = {"name": call.name, "arguments": call.arguments}
        return {"id": self._call_id(), "type": "function", "function": function}

    def _call_id(self) -> str:
        form = self.api.form.tools
        length = form.id_length if form else 0
        return random_hex(length) if length else f"call_{random_hex(24)}"


def template_variables(given: JsonObject | None, effort: str | None) -> JsonObject:
    """The variables of a chat template that a request sets."""
    return (given or {}) | ({} if effort is None else {"reasoning_effort": effort})
