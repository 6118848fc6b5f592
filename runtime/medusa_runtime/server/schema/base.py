"""The base of all request bodies, and the fields that several of them share."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

T = TypeVar("T")

JsonObject = dict[str, JsonValue]
# A list that is refused at its first mistake. To collect all mistakes of a large body would hold up all threads.
Items = Annotated[list[T], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    """A JSON object of a request. Fields that it does not name are refused; values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: If true, the last chunk has the usage figures.
        include_obfuscation: Has no effect: chunks are not padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(Body):
    """Fields that all generating endpoints share.

    Attributes:
        model: Name of the model. If it is left out, the only model answers.
        stream: If true, the answer comes as server-sent events.
        temperature: 0 is greedy decoding. Default: 1.
        top_p: Keep the most likely tokens that together have this probability. 0 keeps one token.
        top_k: Keep this number of the most likely tokens. 0 and -1 keep all.
        min_p: Keep tokens with at least this share of the most likely token's probability.
        seed: Seed of the random numbers.
        ignore_eos: If true, the model's end-of-text tokens don't end the answer.
        user: Has no effect.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    user: str | None = None


class CompletionFields(SamplingFields):
    """Fields that chat completions and completions share.

    Attributes:
        n: Number of answers to each prompt.
        stop: A string that ends the answer, or several. They are not part of it.
        max_tokens: The most tokens of an answer. Default for chats: what fits.
        stream_options: Options of the stream.
        min_tokens: Tokens before which no end token is allowed.
        presence_penalty: Is subtracted from the logits of tokens that the answer holds.
        frequency_penalty: Is subtracted once for each time that the answer holds a token.
        repetition_penalty: Divides positive logits of tokens that prompt or answer hold, and multiplies others.
        logit_bias: Numbers from -100 to 100 that are added to logits, by token id.
        response_format: The format of the answer: ``text``, ``json_object`` or ``json_schema``.
        structured_outputs: A format as vLLM has it: an object with one of ``json`` (a schema), ``regex``, ``choice`` (a
            list of texts) and ``grammar`` (Lark or GBNF).
    """

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Items[str] | None = None
    max_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: JsonObject | None = None
    structured_outputs: JsonObject | None = None
