"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from medusa_runtime.server.schema.base import CompletionFields, Items

TokenIds = Annotated[Items[int], Field(min_length=1)]
Texts = Annotated[Items[str], Field(min_length=1)]
ManyTokenIds = Annotated[Items[TokenIds], Field(min_length=1)]


class CompletionRequest(CompletionFields):
    """A request to continue one text or several.

    Attributes:
        prompt: A text, token ids, or a list of either.
        echo: If true, the answer begins with the prompt.
        logprobs: Number of most likely tokens to give for each place, besides the log probability of each token.
        best_of: Equal to ``n``.
        suffix: Is refused.
    """

    prompt: str | TokenIds | Texts | ManyTokenIds
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None
