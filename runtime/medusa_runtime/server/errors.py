"""Errors in OpenAI's shape: status, message, type, code and the field that was wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from starlette.responses import Response

from medusa_runtime.errors import (
    ContextLengthError,
    DeadlineError,
    MedusaError,
    QueueFullError,
    RequestError,
    ServiceClosedError,
)
from medusa_runtime.server.schema.answers import ErrorAnswer

# Codes of refused values, by pydantic's type of error.
_CODES = {
    "extra_forbidden": ("unknown_parameter", "Unknown parameter: {field!r}."),
    "missing": ("missing_required_parameter", "Missing required parameter: {field!r}."),
    "json_invalid": ("invalid_json", "The body is not valid JSON: {message}."),
}

# Status and code for errors of the runtime. The first class that fits is used.
_STATUSES: tuple[tuple[type[MedusaError], int, str], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (RequestError, 400, "invalid_value"),
    (QueueFullError, 429, "rate_limit_exceeded"),
    (ServiceClosedError, 503, "service_unavailable"),
    (DeadlineError, 504, "timeout"),
    (MedusaError, 500, "server_error"),
)


class ApiError(Exception):
    """A request that ends with an error.

    Args:
        status: The HTTP status.
        message: What was wrong, what was expected, and how to fix it.
        code: OpenAI's code for it.
        param: The field that was wrong.
        kind: OpenAI's type of error.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.kind = kind
        self.headers = dict(headers or {})

    @property
    def answer(self) -> ErrorAnswer:
        """The error as a JSON object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """The error as a response."""
        return Response(json.dumps(self.answer), self.status, self.headers, media_type="application/json")


def unsupported(field: str, why: str) -> ApiError:
    """The error for a field that this server does not serve.

    Args:
        field: Name of the field.
        why: A sentence that says why.
    """
    return ApiError(400, f"Unsupported parameter: {field!r}. {why}", "unsupported_parameter", param=field)


def api_error(error: Exception) -> ApiError:
    """The error to answer with, for an exception of the runtime.

    Args:
        error: The exception. One that is no ``MedusaError`` is a mistake of this program: its text is not shown.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _of_validation(error)
    for type_of_error, status, code in _STATUSES:
        if isinstance(error, type_of_error):
            kind = "rate_limit_error" if status == 429 else "server_error" if status > 429 else "invalid_request_error"
            headers = {"Retry-After": "1"} if status in (429, 503) else None
            return ApiError(status, str(error), code, kind=kind, headers=headers)
    message = "The server failed to process this request; its log says why."
    return ApiError(500, message, "server_error", kind="server_error")


def _of_validation(error: ValidationError) -> ApiError:
    """The error for a body that does not follow its schema: its first mistake, or its first unknown field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((mistake for mistake in found if mistake["type"] == "extra_forbidden"), found[0])
    field = _path(first["loc"])
    message = first["msg"]
    code, words = _CODES.get(first["type"], ("invalid_value", "Invalid value for {field!r}: {message}."))
    if first["type"].endswith("_type"):
        code = "invalid_type"
    return ApiError(400, words.format(field=field, message=message), code, param=field or None)


def _path(location: Sequence[int | str]) -> str:
    """The field of a mistake, such as ``messages[0].content``. Names of types in a union are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif str(part).isidentifier() and not (path and str(part) in ("str", "int", "float", "bool", "dict", "none")):
            path += f".{part}" if path else str(part)
    return path
