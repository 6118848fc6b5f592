"""The JSON objects of answers. Keys that are not required are left out where they have no value."""

from __future__ import annotations

from typing import Literal

# Pydantic, which describes these types in OpenAPI, reads only this TypedDict before Python 3.12.
from typing_extensions import NotRequired, TypedDict  # noqa: UP035  # so is its NotRequired

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    """Details of a prompt's tokens: those whose entries were in a cache already."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """Details of the answer's tokens: reasoning, and drafts that steps accepted and rejected."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(TypedDict):
    """A token, its log probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer, and the most likely tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of the tokens of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """A function that the model calls, and its arguments in JSON."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(TypedDict):
    """The part of a called function in a chunk: its name, at the beginning of the call, and arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The part of a tool call in a chunk. The first one has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatMessage(TypedDict):
    """The message that answers a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """An answer to a chat. A request may ask for several."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict, total=False):
    """The part of a message in a chunk."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(TypedDict):
    """The part of one of the answers in a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """A server-sent event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """Log probabilities of the tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A completion of a prompt. A request may ask for several."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The answer of ``POST /v1/completions``, and each server-sent event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    """A model that the server has."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """The answer of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """The answer of ``POST /tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class ErrorFacts(TypedDict):
    """The error that ended a request, as the API describes errors."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """The answer to a request that failed."""

    error: ErrorFacts


class Health(TypedDict):
    """The state of the service, and its numbers of requests that wait and run."""

    state: str
    waiting: int
    running: int
