"""The responses to a Triton request."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from medusa_runtime.request import RankedToken
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.generation import Delta
from medusa_runtime.server.logprobs import token_text
from medusa_runtime.text.tokenizer import Tokenizer


@dataclass
class Answered:
    """The parts of one answer that have come.

    Attributes:
        text: Text that no response held yet.
        token_ids: Tokens that no response held yet.
        logprobs: Log probabilities of these tokens, if they were asked for.
        top_logprobs: The most likely tokens in their places, if they were asked for.
        sum_of_logprobs: That of all tokens so far.
        finish_reason: The reason of its end, once it has ended.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Sequence[RankedToken], ...] = ()
    sum_of_logprobs: float = 0.0
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Adds the tokens and the text of a step."""
        self.text += delta.content
        self.token_ids += tuple(delta.token_ids)
        self.logprobs += tuple(delta.logprobs or ())
        self.top_logprobs += tuple(delta.top_logprobs or ())
        self.sum_of_logprobs += math.fsum(delta.logprobs or ())
        self.finish_reason = delta.finish_reason

    def clear(self) -> None:
        """Forgets tokens and text once a response holds them."""
        self.text, self.token_ids, self.logprobs, self.top_logprobs = "", (), (), ()


def response_of(
    answers: Sequence[Answered], returned: frozenset[str], prompt_tokens: int, tokenizer: Tokenizer | None
) -> Any:
    """The response with the tokens and texts that answers got since the last response.

    Args:
        answers: The answers of the request.
        returned: Names of the outputs that are wanted besides ``text_output``.
        prompt_tokens: Tokens of the prompt.
        tokenizer: The model's tokenizer.
    """
    outputs: dict[str, Any] = {
        "text_output": _texts([answer.text for answer in answers]),
        "finish_reason": _texts([str(answer.finish_reason) for answer in answers]),
        "cumulative_logprob": np.array([answer.sum_of_logprobs for answer in answers], np.float32),
        "logprobs": _texts([_logprobs(answer, tokenizer) for answer in answers]),
        "num_input_tokens": np.array([prompt_tokens], np.uint32),
        "num_output_tokens": np.array([len(answer.token_ids) for answer in answers], np.uint32),
    }
    wanted = {name: array for name, array in outputs.items() if name in returned or name == "text_output"}
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(*item) for item in wanted.items()])


def failure_of(error: ApiError) -> Any:
    """The response for a request that ends with an error."""
    code = pb_utils.TritonError.INVALID_ARG if error.status < 500 else pb_utils.TritonError.INTERNAL
    if error.status in (429, 503):
        code = pb_utils.TritonError.UNAVAILABLE
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def cancelled() -> Any:
    """The response for a request that its client cancelled."""
    error = pb_utils.TritonError("The request was cancelled.", pb_utils.TritonError.CANCELLED)
    return pb_utils.InferenceResponse(error=error)


def _texts(values: Sequence[str]) -> Any:
    return np.array([value.encode() for value in values], dtype=object)


def _logprobs(answer: Answered, tokenizer: Tokenizer | None) -> str:
    """The log probabilities of tokens as JSON, in the form of vLLM's backend.

    A place has the chosen token first, then the most likely ones. The rank of others than these is not known.
    """
    places = []
    for token, logprob, top in itertools.zip_longest(answer.token_ids, answer.logprobs, answer.top_logprobs):
        if logprob is None:
            break
        ranks = {ranked.token_id: rank for rank, ranked in enumerate(top or (), 1)}
        values = {token: logprob} | dict(top or ())
        places.append(
            {
                str(listed): {
                    "logprob": value,
                    **({"rank": ranks[listed]} if listed in ranks else {}),
                    "decoded_token": token_text(tokenizer, listed)[0],
                }
                for listed, value in values.items()
            }
        )
    return json.dumps(places)
