"""The inputs of a Triton request, as the body of a completion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from medusa_runtime.errors import RequestError

# Inputs that ask for an output of the same name without "return_".
_RETURNED = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
# Parameters whose values are text; other text holds a number or JSON, as clients of vLLM's backend send it.
_TEXTS = ("stop", "user", "model", "suffix")


@dataclass(frozen=True)
class TritonInputs:
    """The inputs of a request.

    Attributes:
        body: The body of ``POST /v1/completions`` that asks for the same.
        echoed: The text that the answers begin with: the prompt, or nothing.
        stream: True if a response per step is wanted.
        returned: Names of the outputs that are wanted besides ``text_output``.
    """

    body: bytes
    echoed: str
    stream: bool
    returned: frozenset[str]

    @classmethod
    def of(cls, request: Any) -> TritonInputs:
        """Reads the inputs of a request.

        Raises:
            RequestError: An input can't be used.
        """
        stream = _flag(request, "stream", default=False)
        # Without a stream the answer begins with the prompt, as with vLLM's backend.
        echo = not _flag(request, "exclude_input_in_output", default=stream)
        if echo and stream:
            raise RequestError("A stream can't begin with the prompt: set exclude_input_in_output to true.")
        returned = frozenset(name.removeprefix("return_") for name in _RETURNED if _flag(request, name, default=False))
        fields = _parameters(_text(request, "sampling_parameters") or request.parameters() or "{}")
        if returned & {"logprobs", "cumulative_logprob"}:
            fields.setdefault("logprobs", 0)
        prompt = _text(request, "text_input")
        fields["prompt"] = prompt
        return cls(json.dumps(fields).encode(), (prompt or "") if echo else "", stream, returned)


def _value(request: Any, name: str) -> Any:
    """The one element of an input; None if the request lacks it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise RequestError(f"{name} has {len(values)} elements: expected 1.")
    return values[0]


def _flag(request: Any, name: str, *, default: bool) -> bool:
    value = _value(request, name)
    return default if value is None else bool(value)


def _text(request: Any, name: str) -> str | None:
    value = _value(request, name)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8.") from error


def _parameters(text: str) -> dict[str, Any]:
    """The fields of a completion in ``sampling_parameters``, which is a JSON object with the names of vLLM."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"sampling_parameters is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise RequestError("sampling_parameters must be a JSON object.")
    fields = {name: value if name in _TEXTS else _unquoted(value) for name, value in found.items()}
    formats = fields.get("structured_outputs")
    if isinstance(formats, Mapping):
        fields["structured_outputs"] = {name: value for name, value in formats.items() if value is not None}
    return fields


def _unquoted(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
