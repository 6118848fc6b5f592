"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from medusa_runtime.server.schema.base import Body, CompletionFields, Count, Items, JsonObject


class Part(Body):
    """A part of a message's content. Parts of other types than text are refused when the chat is rendered."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class FunctionCall(Body):
    """The function that a tool call of the model names, and its arguments in JSON."""

    model_config = ConfigDict(extra="ignore")
    name: str
    arguments: str = "{}"


class MessageToolCall(Body):
    """A tool call in an earlier answer."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """A message of a chat. Fields that it does not name are ignored, as clients send answers back whole."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[Part] | None = None
    name: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Body):
    """A function that the model may call: its name, its purpose and the JSON schema of its arguments."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class ChatRequest(CompletionFields):
    """A request for the next message of a chat.

    Attributes:
        messages: The messages.
        max_completion_tokens: As ``max_tokens``, which it overrides.
        logprobs: If true, the answer has the log probability of each token.
        top_logprobs: Number of most likely tokens to give for each place; needs ``logprobs``.
        tools: The functions that the model may call.
        tool_choice: ``none``, ``auto``, which is the default, ``required``, a function, or allowed tools.
        parallel_tool_calls: If false, the answer has one tool call at most.
        chat_template_kwargs: Variables of the chat template, such as ``enable_thinking``.
        reasoning_effort: Is given to the chat template under this name.
        functions: Is refused: use ``tools``.
        function_call: Is refused: use ``tool_choice``.
        modalities: ``["text"]``.
        audio: Is refused.
        prediction: Is refused.
        web_search_options: Is refused.
        metadata: Has no effect, as have the fields behind it.
    """

    messages: Annotated[Items[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Items[Tool] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    reasoning_effort: str | None = None
    functions: JsonValue = None
    function_call: JsonValue = None
    modalities: Items[str] | None = None
    audio: JsonValue = None
    prediction: JsonValue = None
    web_search_options: JsonValue = None
    metadata: JsonValue = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
