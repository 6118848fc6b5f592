"""Renders the messages and tools of a request by the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medusa_runtime.errors import RequestError
from medusa_runtime.server.errors import unsupported
from medusa_runtime.server.output.formats import ChatFormat
from medusa_runtime.server.schema.base import JsonObject
from medusa_runtime.server.schema.chat import Message, Tool
from medusa_runtime.text.tokenizer import Tokenizer

# Variables that the server sets itself.
_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "max_tokens"})


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat.

    Attributes:
        text: The text that the model continues.
        token_ids: Its tokens.
        tool_names: Names of the functions that the model may call; None if it may call none.
    """

    text: str
    token_ids: list[int]
    tool_names: tuple[str, ...] | None


def chat_prompt(
    tokenizer: Tokenizer | None,
    form: ChatFormat,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    tools: Sequence[Tool] | None = None,
    variables: JsonObject | None = None,
    opens_answer: bool = True,
) -> ChatPrompt:
    """Renders and encodes a chat.

    Args:
        tokenizer: The model's tokenizer; None if it has none.
        form: The model's format of answers.
        messages: The messages.
        max_tokens: The most tokens that the model holds.
        tools: The functions that the model may call.
        variables: Further variables of the chat template.
        opens_answer: Whether the chat ends with the opening of the next answer.

    Raises:
        ApiError: The model's format of tool calls is not known.
        RequestError: The template refuses the chat, or it is too long.
    """
    if tokenizer is None:
        raise RequestError("This model has no tokenizer: use /v1/completions with token ids.")
    given: dict[str, Any] = dict(variables or {})
    for name in sorted(_OWN_VARIABLES & given.keys()):
        raise RequestError(f"chat_template_kwargs has {name!r}, which other fields of the request set: leave it out.")
    if tools:
        if form.tools is None:
            raise unsupported(
                "tools", "The model's chat template shows no format of tool calls that this server reads: leave it out."
            )
        given["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
        names = tuple(tool.function.name for tool in tools)
    else:
        names = None
    plain = [_plain(message, number) for number, message in enumerate(messages)]
    text = tokenizer.render_chat(plain, add_generation_prompt=opens_answer, **given)
    return ChatPrompt(text, tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens), names)


def _plain(message: Message, number: int) -> dict[str, Any]:
    """A message as templates read it: arguments of calls are objects, and content is not missing."""
    plain = message.model_dump(exclude_none=True)
    plain.setdefault("content", "")
    for call in plain.get("tool_calls", ()):
        text = call["function"]["arguments"]
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(f"A tool call of message {number} has arguments that are no JSON object: {text!r:.80}.")
        call["function"]["arguments"] = arguments
    return plain
