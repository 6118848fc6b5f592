"""Renders chats as the text that a model was trained to continue: Jinja templates, in a sandbox, over plain data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_runtime.errors import BackendError, BundleError, RequestError
from medusa_runtime.text.chat_content import checked_content
from medusa_runtime.text.limits import MAX_CHAT_VALUES, MAX_DEPTH, MAX_MESSAGES, MAX_TEXT_BYTES, shown

if TYPE_CHECKING:
    import jinja2

    from medusa_runtime.text.template_sandbox import BoundedEnvironment

MAX_TEMPLATE_TOKENS = 30_000  # Jinja tokens; the largest published template has 8,000

# The keys under which clients send a model's reasoning. Most templates read the first, gpt-oss's template the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# Options of transformers' apply_chat_template. A template would ignore them without an error.
_NOT_TEMPLATE_VARIABLES = frozenset(
    {
        "continue_final_message",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain data, without keys that hold None. Reasoning is put under the keys that templates read.

    Raises:
        RequestError: The argument is not a list of messages, or a message is malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"The messages must be a list of objects, but got {type(messages).__name__}.")
    if not messages:
        raise RequestError("The chat is empty: send at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"The chat has {len(messages):,} messages, but {MAX_MESSAGES:,} are read at most.")
    plain = _Plain("The chat")
    return [_checked_message(message, number, plain) for number, message in enumerate(messages)]


def _checked_message(message: object, number: int, rebuilt: _Plain) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"Message {number} must be an object with a role and a content, but got {type(message).__name__}."
        )
    given = {key: value for key, value in message.items() if value is not None}
    if "content" in given:
        given["content"] = checked_content(given["content"], number)
    plain = {key: rebuilt(value) for key, value in given.items()}
    if not isinstance(plain.get("role"), str):
        raise RequestError(f"Message {number} has no role: name one, such as 'user' or 'assistant'.")
    reasoning = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The other variables of a template as plain data; ``tools`` and ``documents`` are None if they are not given.

    Raises:
        RequestError: A variable is an option of transformers, or has the wrong type.
    """
    for name in sorted(_NOT_TEMPLATE_VARIABLES & variables.keys()):
        raise RequestError(f"{name} is an option of transformers and not a template variable: leave it out.")
    for name in ("tools", "documents"):
        value = variables.get(name)
        if value is not None and not (
            isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
        ):
            raise RequestError(f"{name} must be a list of objects, but got {shown(value)}.")
    tools = variables.get("tools")
    plain = {name: _Plain(name)(value) for name, value in variables.items()}
    return {"documents": None} | plain | {"tools": None if tools is None else list(plain["tools"])}


def render(template: str, **context: Any) -> str:
    """Renders a template.

    Args:
        template: Source text of the template.
        context: The template's variables.

    Raises:
        BundleError: The chat template has a syntax error.
        BackendError: Jinja, which renders chats, is not installed.
        RequestError: The template refuses the chat, fails, or does too much work.
    """
    compiled = _compiled(template)
    from medusa_runtime.text.template_budget import TooMuchWorkError, bounded_render
    from medusa_runtime.text.template_environment import ChatRefusedError

    try:
        with bounded_render():
            return compiled.render(**context)
    except ChatRefusedError as e:
        raise RequestError(f"The chat template refused these messages: {e}") from e
    except TooMuchWorkError as e:
        raise RequestError(
            f"The chat template does too much work for these messages: {e}. Send fewer or shorter messages. If short "
            "messages fail as well, use another template."
        ) from e
    except Exception as e:  # a template is a program: it may fail on odd messages with any error
        raise RequestError(
            f"The chat template could not render these messages ({type(e).__name__}: {e!s:.500}): "
            "check that each has the keys and types the model expects."
        ) from e


def check_template(template: str) -> None:
    """Compiles a template, so that errors are found before the first request.

    Raises:
        BundleError: The chat template has a syntax error.
    """
    with contextlib.suppress(BackendError):  # without Jinja, everything but chats works
        _compiled(template)


class _Plain:
    """Copies values to plain JSON types, within bounds. So a template gets no objects with methods of their own.

    Args:
        name: The owner of the values, as the subject of messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = self._characters = 0

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self._count(value, depth)
        if value is None or isinstance(value, bool):
            return value
        for kind, rebuilt in _REBUILT.items():
            if isinstance(value, kind):
                return rebuilt(value, partial(self, depth=depth + 1))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return {field.name: self(getattr(value, field.name), depth + 1) for field in fields}
        return f"<{type(value).__name__}>"

    def _count(self, value: object, depth: int) -> None:
        self._values += 1
        self._characters += len(value) if isinstance(value, str) else 0
        if depth > MAX_DEPTH:
            raise RequestError(f"{self._name} holds values nested more than {MAX_DEPTH} deep: flatten it.")
        if self._values > MAX_CHAT_VALUES:
            raise RequestError(f"{self._name} holds more than {MAX_CHAT_VALUES:,} values: shorten it.")
        if self._characters > MAX_TEXT_BYTES:
            raise RequestError(f"{self._name} holds more than {MAX_TEXT_BYTES:,} characters: shorten it.")


# How to copy a value, by type. The first type that fits is used. An object of a subclass, such as an enum, becomes an
# object of that type.
_REBUILT: dict[type, Callable[[Any, Callable[[Any], Any]], Any]] = {
    str: lambda value, _: str.__str__(value),
    int: lambda value, _: int.__int__(value),
    float: lambda value, _: float.__float__(value),
    list: lambda values, again: [again(value) for value in values],
    tuple: lambda values, again: tuple(again(value) for value in values),
    Mapping: lambda values, again: {again(key): again(value) for key, value in values.items()},
    np.generic: lambda value, again: again(value.item()),
}


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = _environment()
    from jinja2 import TemplateSyntaxError

    from medusa_runtime.text.template_budget import bounded_render

    try:
        # Counted before parsing: Jinja's parser takes kilobytes of memory for each token.
        too_long = next(islice(environment.lex(template), MAX_TEMPLATE_TOKENS, None), None) is not None
        with bounded_render():
            compiled = None if too_long else environment.from_string(template)
    except TemplateSyntaxError as e:
        raise BundleError(f"The chat template has a syntax error on line {e.lineno}: {e.message}.") from e
    except Exception as e:  # Jinja's parser and Python's compiler have further limits, such as on nested loops
        raise BundleError(f"The chat template can't be compiled ({type(e).__name__}: {e}).") from e
    if compiled is None:
        raise BundleError(
            f"The chat template has more than {MAX_TEMPLATE_TOKENS:,} tokens, the most that are compiled: shorten it."
        )
    return compiled


def _environment() -> BoundedEnvironment:
    """The environment of chat templates. Jinja is imported with the first chat.

    Raises:
        BackendError: Jinja is not installed.
    """
    try:
        from medusa_runtime.text.template_environment import environment
    except ImportError as e:
        raise BackendError("Chats are rendered by Jinja, which is not installed: pip install 'jinja2>=3.1.6'.") from e
    return environment()
