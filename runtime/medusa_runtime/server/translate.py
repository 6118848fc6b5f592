"""Translates the fields of requests to options of the service, and refuses fields that it does not serve.

``_NEUTRAL`` lists the fields that the server reads and does not serve, with the values that change nothing. To serve
one of them, remove it there and set its option in ``request_options``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medusa_runtime.constraints.options import Constraints
from medusa_runtime.request import RequestOptions
from medusa_runtime.sampling import SamplingParams
from medusa_runtime.server.errors import ApiError, unsupported
from medusa_runtime.server.schema.base import Body, SamplingFields

if TYPE_CHECKING:
    from medusa_runtime.service import MedusaService

_STORED = "This server stores nothing: send the whole conversation."
_OTHER = "This server does not serve it: leave it out."

# Fields by name: the values that change nothing, and why others are refused.
_NEUTRAL: dict[str, tuple[Sequence[Any], str]] = {
    "functions": ((), "Use 'tools'."),
    "function_call": ((), "Use 'tool_choice'."),
    "modalities": ((["text"],), "This server answers with text."),
    "audio": ((), _OTHER),
    "prediction": ((), _OTHER),
    "web_search_options": ((), _OTHER),
    "suffix": (("",), _OTHER),
    "truncation": (("disabled",), "Prompts are not cut: shorten the input."),
    "previous_response_id": ((), _STORED),
    "conversation": ((), _STORED),
    "prompt": ((), _STORED),
    "background": ((False,), _STORED),
    "max_tool_calls": ((), "No tools run on this server."),
}


def check_served(body: Body, *, but: Sequence[str] = ()) -> None:
    """Refuses a request with a field that the server reads and does not serve.

    Args:
        body: The request.
        but: Fields with such a name that this endpoint serves.

    Raises:
        ApiError: A field would change the answer; the error names it.
    """
    for name in _NEUTRAL.keys() & type(body).model_fields.keys() - {*but}:
        value = getattr(body, name)
        values, why = _NEUTRAL[name]
        if value is not None and value not in values:
            raise unsupported(name, why)


def request_options(
    service: MedusaService,
    body: SamplingFields,
    constraints: Constraints | None,
    *,
    index: int,
    logprobs: bool,
    top_logprobs: int,
    timeout: float | None,
) -> RequestOptions:
    """The options of one of the answers that a request asks for, without its length and stop strings.

    Args:
        service: The service that answers.
        body: The request.
        constraints: The constraints of all its answers (``constraints_of``).
        index: Index of the answer. With a seed, each answer has a seed of its own.
        logprobs: True if the answer needs log probabilities.
        top_logprobs: Number of most likely tokens that it needs for each place.
        timeout: Seconds after which the request ends.

    Raises:
        RequestError: A value is out of range.
    """
    options: RequestOptions = {
        "sampling": sampling_params(service, body, index),
        "constraints": constraints,
        "logprobs": logprobs,
        "top_logprobs": top_logprobs,
        "ignore_eos": bool(body.ignore_eos),
        "timeout": timeout,
    }
    return options


def is_greedy(service: MedusaService, body: SamplingFields) -> bool:
    """True if the answer is chosen without random numbers. A bundle that can't sample is greedy by default."""
    return body.temperature == 0 or (body.temperature is None and not service.bundle.sampling)


def sampling_params(service: MedusaService, body: SamplingFields, index: int) -> SamplingParams | None:
    """The sampling parameters of one of the answers; None if it is greedy."""
    if is_greedy(service, body):
        return None
    seed = None if body.seed is None else (body.seed + index) % 2**64
    top_k = max(0, body.top_k or 0)
    top_p = 1.0 if body.top_p is None else body.top_p
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=top_k if top_p else 1,
        top_p=top_p or 1.0,
        min_p=body.min_p or 0.0,
        seed=seed,
    )


def check_model(names: Sequence[str], model: str | None) -> None:
    """Refuses a request to a model that this server does not have.

    Raises:
        ApiError: The name is unknown.
    """
    if model is not None and model not in names:
        raise ApiError(
            404, f"The model {model!r} does not exist: this server has {names[0]!r}.", "model_not_found", param="model"
        )


def check_answers(most: int, prompts: int, n: int | None) -> None:
    """Refuses a request for more answers than rows and queue hold.

    Args:
        most: The most answers.
        prompts: Number of prompts.
        n: Number of answers to each.

    Raises:
        ApiError: There are more.
    """
    if prompts * (n or 1) > most:
        message = f"The request asks for {prompts * (n or 1)} answers, but this server gives {most} at most."
        raise ApiError(400, message, "invalid_value", param="n")


def new_tokens(
    service: MedusaService, prompt_tokens: int, asked_for: int | None, *, most_prompt: int | None, field: str
) -> int:
    """The most tokens of an answer: as many as asked for, or what fits.

    Args:
        service: The service that answers.
        prompt_tokens: Tokens of the prompt.
        asked_for: The most tokens that the request asks for; None for what fits.
        most_prompt: The most tokens that a prompt may have; None for no limit of its own.
        field: The field that holds the prompt.

    Raises:
        ApiError: Prompt and answer don't fit.
    """
    if most_prompt is not None and prompt_tokens > most_prompt:
        message = f"The prompt has {prompt_tokens} tokens, but this server takes {most_prompt}: shorten it."
        raise ApiError(400, message, "context_length_exceeded", param=field)
    most = min(service.max_tokens, service.bundle.model.most_tokens(prompt_tokens))
    left = most - prompt_tokens
    if left < 1 or (asked_for is not None and asked_for > left):
        answer = "the answer has no room" if asked_for is None else f"{asked_for} tokens of the answer don't fit"
        message = (
            f"This model's maximum context length is {most} tokens. The prompt has {prompt_tokens}, and "
            f"{answer}: shorten the prompt or ask for a shorter answer."
        )
        raise ApiError(400, message, "context_length_exceeded", param=field)
    return left if asked_for is None else asked_for
