"""Converts prompts (text, chats, token ids) to token ids, and refuses everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.errors import ContextLengthError, RequestError
from medusa_runtime.text.limits import shown
from medusa_runtime.text.tokenizer import Tokenizer

_EXPECTED = "give text, a list of messages such as {'role': 'user', 'content': …}, or a list of token ids."
_BYTES = (bytes, bytearray, memoryview)


def encode_prompt(bundle: Bundle, tokenizer: Tokenizer | None, prompt: object) -> list[int]:
    """The token ids of a prompt.

    Args:
        bundle: The bundle that the prompt is for.
        tokenizer: The bundle's tokenizer; None if it has none.
        prompt: Text, a message, a list of messages, or token ids as a sequence or a one-dimensional array of integers.

    Raises:
        RequestError: The prompt has another type, is empty, is too long, or holds a value that is not a token id.
    """
    if isinstance(prompt, _BYTES):
        raise RequestError(f"The prompt is {type(prompt).__name__}: decode it to a string first.")
    if isinstance(prompt, Mapping):
        prompt = [_one_message(prompt)]
    if isinstance(prompt, str) or _is_chat(prompt):
        if tokenizer is None:
            raise RequestError("This bundle has no tokenizer: give the prompt as a list of token ids.")
        limit = bundle.model.max_positions
        encode: Any = tokenizer.encode if isinstance(prompt, str) else tokenizer.encode_chat
        ids: list[int] = encode(prompt, max_tokens=limit)
    else:
        ids = _token_ids(prompt, bundle.model.vocab_size, bundle.model.max_positions)
    if not ids:
        raise RequestError("The prompt is empty: give at least one token.")
    _check_ids(ids, bundle.model.vocab_size)
    return ids


def _one_message(prompt: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if "role" in prompt:
        return prompt
    for key in ("input_ids", "messages", "prompt"):
        if key in prompt:
            raise RequestError(f"The prompt is an object with the key {key!r}: give only the value of that key.")
    raise RequestError(f"The prompt is an object without a role: {_EXPECTED}")


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _token_ids(prompt: object, vocab_size: int, most: int) -> list[int]:
    if hasattr(type(prompt), "__array__"):
        prompt = _of_array(prompt)
    if not isinstance(prompt, Sequence):
        hint = "make it a list, or " if hasattr(type(prompt), "__iter__") else ""
        raise RequestError(f"The prompt has the type {type(prompt).__name__}: {hint}{_EXPECTED}")
    if len(prompt) > most:
        raise ContextLengthError(
            f"The prompt has {len(prompt):,} tokens, but this model's context has {most:,}: shorten the prompt."
        )
    return [token.item() if isinstance(token, np.integer) else token for token in prompt]


def _of_array(prompt: object) -> list[Any]:
    """The ids in an array of NumPy or of another library."""
    try:
        array = np.asarray(prompt)
    except Exception as e:  # other libraries raise any type, for tensors on a device or of types that NumPy lacks
        raise RequestError(f"The prompt can't be read as an array ({e}): {_EXPECTED}") from e
    if array.ndim != 1:
        raise RequestError(
            f"The prompt is an array of shape {array.shape}: a request takes one prompt, so give one row of token ids."
        )
    if array.dtype.kind not in "iu":
        raise RequestError(f"The prompt is an array of {array.dtype}: token ids are integers.")
    ids: list[Any] = array.tolist()
    return ids


def _check_ids(ids: Sequence[object], vocab_size: int) -> None:
    for place, token in enumerate(ids):
        if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size:
            continue
        if isinstance(token, (str, list, tuple, Mapping)) or hasattr(type(token), "__array__"):
            raise RequestError(
                f"The prompt is a list that holds {shown(token)} at index {place}: a request takes one prompt. "
                f"For each prompt, {_EXPECTED}"
            )
        raise RequestError(f"The prompt holds {shown(token)}: token ids are integers from 0 to {vocab_size - 1}.")
