"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self, cast

from medusa_runtime.errors import RequestError
from medusa_runtime.server.api import Api, Asked
from medusa_runtime.server.constraints import constraints_of
from medusa_runtime.server.errors import unsupported
from medusa_runtime.server.generation import Delta, Generation
from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.logprobs import completion_logprobs
from medusa_runtime.server.output.parts import PlainParser
from medusa_runtime.server.schema.answers import Completion, CompletionChoice
from medusa_runtime.server.schema.completions import CompletionRequest
from medusa_runtime.server.streaming import Events
from medusa_runtime.server.translate import (
    check_answers,
    check_model,
    check_served,
    new_tokens,
    request_options,
)

# OpenAI's default.
_MAX_TOKENS = 16


@dataclass
class CompletionJob:
    """Prompts that are continued.

    Attributes:
        api: What all endpoints share.
        request: The request.
        prompts: The prompts' texts; empty for prompts of token ids that are not echoed.
        generation: The answers.
        id: Identifier of the answer.
        created: Unix time of the request.
    """

    api: Api
    request: CompletionRequest
    prompts: Sequence[str]
    generation: Generation
    id: str = field(default_factory=lambda: f"cmpl-{random_hex(24)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def begin(cls, api: Api, data: bytes, client: str) -> Self:
        """Checks, encodes and submits a request. Arguments and errors are those of ``ChatJob.begin``."""
        request = CompletionRequest.model_validate_json(data)
        settings, service = api.settings, api.service
        check_model(settings.names, request.model)
        check_served(request, but=["prompt"])
        constraints = constraints_of(request)
        if request.best_of not in (None, request.n or 1):
            raise unsupported("best_of", "Answers are not ranked: use n.")
        if request.echo and request.logprobs is not None:
            raise unsupported("echo", "Prompts have no log probabilities: leave out echo or logprobs.")
        prompts = _prompts(request.prompt)
        check_answers(settings.most_answers, len(prompts), request.n)
        token_ids = [encoded(api, prompt) for prompt in prompts]
        answers = []
        for number, ids in enumerate(token_ids):
            asked_for = request.max_tokens or _MAX_TOKENS
            most = new_tokens(service, len(ids), asked_for, most_prompt=settings.max_prompt_tokens, field="prompt")
            for index in range(request.n or 1):
                options = request_options(
                    service,
                    request,
                    constraints,
                    index=index,
                    logprobs=request.logprobs is not None,
                    top_logprobs=request.logprobs or 0,
                    timeout=settings.request_seconds,
                )
                options["max_new_tokens"] = most
                options["stop"] = request.stop or ()
                answers.append(Asked(number, ids, options, PlainParser()))
        texts = [prompt if isinstance(prompt, str) else _text(api, prompt) for prompt in prompts if request.echo]
        return cls(api, request, texts, api.submit(client, answers))

    @property
    def stream(self) -> bool:
        """True if the answer comes as events."""
        return bool(self.request.stream)

    async def answer(self) -> Completion:
        """The complete answer."""
        deltas = await self.generation.whole()
        choices = [self._choice(delta, self._echoed(delta.choice.prompt), 0) for delta in deltas]
        return self._completion(choices) | {"usage": self.generation.usage}

    async def events(self) -> AsyncGenerator[Events]:
        """The chunks of the answer."""
        include_usage = bool(self.request.stream_options and self.request.stream_options.include_usage)
        usage: Completion = cast("Completion", {"usage": None} if include_usage else {})
        places = [0 for _ in self.generation.choices]
        begun: set[int] = set()
        async with aclosing(self.generation.deltas(self.api.settings.keep_alive_seconds)) as steps:
            async for deltas in steps:
                chunks = []
                for delta in deltas:
                    index = delta.choice.index
                    echoed = "" if index in begun else self._echoed(delta.choice.prompt)
                    begun.add(index)
                    choice = self._choice(delta, echoed, places[index])
                    places[index] += len(choice["text"])
                    if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                        chunks.append({**self._completion([choice]), **usage})
                if chunks or not deltas:
                    yield chunks
        if include_usage:
            yield [{**self._completion([]), "usage": self.generation.usage}]

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.api.model,
            "choices": choices,
        }

    def _choice(self, delta: Delta, echoed: str, offset: int) -> CompletionChoice:
        return {
            "index": delta.choice.index,
            "text": echoed + delta.content,
            "logprobs": completion_logprobs(self.api.service.tokenizer, delta, offset),
            "finish_reason": delta.finish_reason,
        }

    def _echoed(self, prompt: int) -> str:
        return self.prompts[prompt] if self.prompts else ""


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a request."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def encoded(api: Api, prompt: str | list[int]) -> list[int]:
    """The token ids of a prompt.

    Raises:
        RequestError: The bundle has no tokenizer, or the text is too long.
    """
    if not isinstance(prompt, str):
        return prompt
    if api.service.tokenizer is None:
        raise RequestError("This model has no tokenizer: give the prompt as token ids.")
    return api.service.tokenizer.encode(prompt, max_tokens=api.service.max_tokens)


def _text(api: Api, token_ids: Sequence[int]) -> str:
    return api.service.tokenizer.decode(token_ids) if api.service.tokenizer else ""
