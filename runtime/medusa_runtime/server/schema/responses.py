"""The body of ``POST /v1/responses``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from medusa_runtime.server.schema.base import Body, Count, Items, JsonObject, SamplingFields
from medusa_runtime.server.schema.chat import Part


class InputItem(Body):
    """An item of the input: a message, a function call or a function's output.

    Fields that it does not name are ignored, as clients send answers back whole.
    """

    model_config = ConfigDict(extra="ignore")
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Items[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Items[Part] | None = None


class ResponseTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ResponseText(Body):
    """The format of a response's text. Its verbosity has no effect."""

    format: JsonObject | None = None
    verbosity: str | None = None


class Reasoning(Body):
    """Options of the reasoning. Only ``effort`` has an effect."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(SamplingFields):
    """A request for a response.

    Attributes:
        input: A text, or items.
        instructions: A system message before the input.
        max_output_tokens: The most tokens of the answer. Default: what fits.
        tools: The functions that the model may call.
        tool_choice: ``none``, ``auto``, which is the default, ``required``, a function, or allowed tools.
        parallel_tool_calls: If false, the answer has one tool call at most.
        text: The format of the answer: ``text``, ``json_object`` or ``json_schema``.
        reasoning: Its ``effort`` is given to the chat template as ``reasoning_effort``.
        chat_template_kwargs: Variables of the chat template.
        truncation: ``disabled``.
        previous_response_id: Is refused: responses are not stored.
        conversation: Is refused: conversations are not stored.
        prompt: Is refused: prompts are not stored.
        background: Must not be true.
        top_logprobs: Number of most likely tokens to give for each place; needs ``include``.
        max_tool_calls: Is refused: no tools run here.
        include: ``message.output_text.logprobs`` asks for log probabilities. Other items have no effect.
        metadata: Has no effect, as have the fields behind it.
    """

    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Items[ResponseTool] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: JsonObject | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: JsonValue = None
    prompt: JsonValue = None
    background: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tool_calls: int | None = None
    include: Items[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream_options: JsonObject | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
