"""``POST /v1/responses``, for text and functions. Responses are not stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Self

from medusa_runtime.errors import RequestError
from medusa_runtime.server.api import Api, Asked
from medusa_runtime.server.chat import template_variables
from medusa_runtime.server.chat_prompt import chat_prompt
from medusa_runtime.server.constraints import constraints_of
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.generation import Delta, Generation
from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.logprobs import token_logprobs
from medusa_runtime.server.response_events import Item, ResponseEvents, items_of
from medusa_runtime.server.schema.answers import TokenLogprob
from medusa_runtime.server.schema.chat import Function, FunctionCall, Message, MessageToolCall, Tool
from medusa_runtime.server.schema.responses import InputItem, ResponsesRequest
from medusa_runtime.server.streaming import Events
from medusa_runtime.server.tool_choice import ToolChoice
from medusa_runtime.server.translate import (
    check_model,
    check_served,
    is_greedy,
    new_tokens,
    request_options,
)

# The item of ``include`` that asks for log probabilities.
_LOGPROBS = "message.output_text.logprobs"
# A response's JSON object, which has the type of OpenAI's ``Response``.
Response = dict[str, Any]


@dataclass
class ResponseJob:
    """A response that is generated.

    Attributes:
        api: What all endpoints share.
        request: The request.
        generation: The answer.
        id: Identifier of the response.
        created: Unix time of the request.
    """

    api: Api
    request: ResponsesRequest
    generation: Generation
    id: str = field(default_factory=lambda: f"resp_{random_hex(48)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def begin(cls, api: Api, data: bytes, client: str) -> Self:
        """Checks, renders, encodes and submits a request. Arguments and errors are those of ``ChatJob.begin``."""
        request = ResponsesRequest.model_validate_json(data)
        settings, service = api.settings, api.service
        check_model(settings.names, request.model)
        check_served(request)
        if request.top_logprobs and _LOGPROBS not in (request.include or ()):
            message = f"top_logprobs needs log probabilities: add {_LOGPROBS!r} to include."
            raise ApiError(400, message, "invalid_value", param="top_logprobs")
        effort = request.reasoning.effort if request.reasoning else None
        tools = [
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"})))
            for tool in request.tools or ()
        ]
        choice = ToolChoice.of(request.tool_choice, tools, parallel=request.parallel_tool_calls)
        prompt = chat_prompt(
            service.tokenizer,
            api.form,
            messages_of(request),
            max_tokens=service.max_tokens,
            tools=choice.tools,
            variables=template_variables(request.chat_template_kwargs, effort),
        )
        most = new_tokens(
            service,
            len(prompt.token_ids),
            request.max_output_tokens,
            most_prompt=settings.max_prompt_tokens,
            field="input",
        )
        constraints = choice.constrained(api.form, prompt, constraints_of(request))
        options = request_options(
            service,
            request,
            constraints,
            index=0,
            logprobs=_LOGPROBS in (request.include or ()),
            top_logprobs=request.top_logprobs or 0,
            timeout=settings.request_seconds,
        )
        options["max_new_tokens"] = most
        options["shown_token_ids"] = api.form.shown_token_ids
        parser = choice.parser(api.form, prompt)
        return cls(api, request, api.submit(client, [Asked(0, prompt.token_ids, options, parser)]))

    @property
    def stream(self) -> bool:
        """True if the response comes as events."""
        return bool(self.request.stream)

    async def answer(self) -> Response:
        """The complete response."""
        (delta,) = await self.generation.whole()
        return self._response(items_of(delta.steps, self._logprobs(delta)), delta.finish_reason)

    async def events(self) -> AsyncGenerator[Events]:
        """The events of the response."""
        events = ResponseEvents()
        begun = self._response([], None)
        yield [events.numbered(f"response.{kind}", response=begun) for kind in ("created", "in_progress")]
        reason = None
        async with aclosing(self.generation.deltas(self.api.settings.keep_alive_seconds)) as steps:
            async for deltas in steps:
                added = [event for delta in deltas for event in events.add(delta.steps, self._logprobs(delta))]
                if added or not deltas:
                    yield added
                reason = deltas[-1].finish_reason if deltas else None
        kind = "response.incomplete" if reason == "length" else "response.completed"
        ended = [*events.finish()]
        yield [*ended, events.numbered(kind, response=self._response(events.items, reason))]

    def _logprobs(self, delta: Delta) -> list[TokenLogprob]:
        return token_logprobs(self.api.service.tokenizer, delta)

    def _response(self, items: Sequence[Item], reason: str | None) -> Response:
        request = self.request
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        usage = self.generation.usage
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.api.model,
            "output": [item.answer(status) for item in items],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "store": False,
            "temperature": 0.0 if is_greedy(self.api.service, request) else request.temperature or 1.0,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [
                {"parameters": None, "strict": None, **tool.model_dump(exclude_none=True)}
                for tool in request.tools or ()
            ],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None
            if reason is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cache_write_tokens": 0, **usage["prompt_tokens_details"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
            "user": request.user,
        }


def messages_of(request: ResponsesRequest) -> list[Message]:
    """The messages of a chat that say what a request's instructions and input say.

    Raises:
        RequestError: An item has a type that this server does not read, or lacks a field.
    """
    messages = [] if request.instructions is None else [Message(role="system", content=request.instructions)]
    if isinstance(request.input, str):
        return [*messages, Message(role="user", content=request.input)]
    for number, item in enumerate(request.input):
        if item.type == "reasoning":  # chat templates leave out earlier reasoning
            continue
        message = _message(item, number)
        last = messages[-1] if messages else None
        if message.tool_calls and last is not None and last.role == "assistant":
            last.tool_calls = [*(last.tool_calls or ()), *message.tool_calls]
        else:
            messages.append(message)
    return messages


def _message(item: InputItem, number: int) -> Message:
    match item.type:
        case "message" if item.role is not None:
            return Message(role=item.role, content=item.content)
        case "function_call" if item.name is not None:
            function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
            return Message(role="assistant", tool_calls=[MessageToolCall(id=item.call_id, function=function)])
        case "function_call_output" if item.output is not None:
            return Message(role="tool", content=item.output, tool_call_id=item.call_id)
        case "message" | "function_call" | "function_call_output":
            raise RequestError(f"Item {number} of the input, a {item.type}, lacks a field: see the API's reference.")
        case _:
            raise RequestError(f"Item {number} of the input has the type {item.type!r:.80}, which is not read here.")
