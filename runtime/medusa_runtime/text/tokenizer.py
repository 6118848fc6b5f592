"""A bundle's tokenizer: encodes text and chats to token ids and decodes ids to text, without transformers.

It reads the files that ``save_pretrained`` of transformers writes, older layouts included, and gives the same ids and
texts as transformers. Like transformers, it takes the beginning and end tokens that ``encode`` adds from the
post-processor in ``tokenizer.json``, never from ``add_bos_token`` in the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers

from medusa_runtime.bundles.json_file import brief
from medusa_runtime.bundles.listed_folder import ListedFolder
from medusa_runtime.errors import BundleError, ContextLengthError, RequestError
from medusa_runtime.text.bounds import TextBound, characters_of_bytes, text_bound
from medusa_runtime.text.chat_content import ContentForms, find_forms, in_form
from medusa_runtime.text.chat_template import check_template, checked_messages, checked_variables, render
from medusa_runtime.text.limits import MAX_BYTES_PER_TOKEN, MAX_TEXT_BYTES, SHORT_TEXT_BYTES
from medusa_runtime.text.tokenizer_files import CONFIG, TokenizerConfig, chat_templates

TOKENIZER = "tokenizer.json"
# The largest vocabularies have 260,000 tokens in files of 35 MB.
MAX_TOKENIZER_BYTES = 2**28
# Encoding texts of at least this number of bytes takes so long that other threads must be able to run meanwhile.
_LONG_TEXT = 2**14
# For messages of these roles, the template is tried for the forms of content that it supports. Others have text.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """Encodes text and chats, and decodes token ids, like transformers with the same files.

    Threads, event loops and children made by ``fork`` may share it: after loading, only its internal caches change.

    Attributes:
        named_tokens: The tokens that have a role, by role: ``{"eos_token": "</s>", …}``.
        chat_templates: The chat templates by name. The default template's name is ``default``.
        special_ids: The ids that ``decode`` skips.
        cleans_up: True if ``decode`` removes spaces before punctuation, for tokenizers that ask for it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        cleans_up: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._token_bytes: dict[int, bytes] = {}
        self._known_forms: dict[tuple[str, str], ContentForms] = {}
        self.named_tokens = dict(named_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.cleans_up = cleans_up
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path | ListedFolder) -> Tokenizer | None:
        """Loads the tokenizer of a folder; None if the folder has no ``tokenizer.json``.

        Args:
            folder: The folder. Of a bundle, only the files that it lists are read.

        Raises:
            BundleError: A file of the tokenizer can't be read.
        """
        folder = folder if isinstance(folder, ListedFolder) else ListedFolder(folder)
        data = folder.read(TOKENIZER, at_most=MAX_TOKENIZER_BYTES)
        if data is None:
            return None
        path = folder.path / TOKENIZER
        config = TokenizerConfig.load(folder)
        with library_errors(f"read {path}"):
            backend = tokenizers.Tokenizer.from_buffer(data)
        named = config.named_tokens()
        with library_errors(f"add the special tokens in {folder.path / CONFIG} to {path}"):
            config.add_missing_tokens(backend, named)
        backend.encode_special_tokens = bool(config.split_special_tokens)
        templates = chat_templates(folder, config)
        for template in templates.values():
            check_template(template)
        return cls(
            backend,
            named_tokens={name: token.content for name, token in named.items()},
            chat_templates=templates,
            cleans_up=config.cleans_up(backend),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def description(self) -> str:
        """The tokenizer as the text of ``tokenizer.json``."""
        return str(self._backend.to_str())

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text; None if the tokenizer names none."""
        name = self.named_tokens.get("eos_token")
        return None if name is None else self._backend.token_to_id(name)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, which ``decode`` skips, by their text."""
        return {token: index for index in sorted(self.special_ids) if (token := self.token(index))}

    @cached_property
    def decoder_steps(self) -> tuple[str, ...]:
        """Types of the decoder's steps, in order, such as ``("ByteLevel",)``; empty without a decoder."""
        decoder = self._backend.decoder
        return () if decoder is None else tuple(_step_types(json.loads(decoder.__getstate__())))

    def token(self, token_id: int) -> str | None:
        """The text of a token in the vocabulary; None for an id outside the vocabulary.

        Raises:
            RequestError: The id is negative or exceeds 32 bits.
        """
        try:
            return self._backend.id_to_token(token_id)
        except OverflowError as e:
            raise RequestError(f"{token_id} is not a token id: ids are at least 0 and have at most 32 bits.") from e

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a byte-level decoder makes of a token; empty for an id outside the vocabulary."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.token(token_id) or ""
            try:
                known = bytes(_byte_of_character()[character] for character in token)
            except KeyError:  # an added token, whose text is not in the byte alphabet
                known = token.encode()
            self._token_bytes[token_id] = known
        return known

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """The token ids of a text.

        Args:
            text: The text.
            add_special_tokens: True to add the tokens that begin and end a text.
            max_tokens: The most tokens that the caller can use. Text that certainly has more is refused before it is
                encoded. If the tokenizer has no bound, text of more than ``MAX_BYTES_PER_TOKEN`` bytes for each of
                these tokens is refused.

        Raises:
            RequestError: ``text`` is not a string, holds half of a surrogate pair, or is too long.
        """
        if not isinstance(text, str):
            raise RequestError(f"The text must be a string, but got {type(text).__name__}.")
        try:
            size = len(text) if len(text) > MAX_TEXT_BYTES else len(text.encode())
        except UnicodeEncodeError as e:
            raise RequestError(
                f"The text holds a lone surrogate at position {e.start}, which is not a character: send valid Unicode."
            ) from e
        if size > MAX_TEXT_BYTES:
            raise RequestError(f"The text has {size:,} bytes or more, but {MAX_TEXT_BYTES:,} are read at most.")
        if max_tokens is not None and size > max_tokens:
            self._check_length(text, size, max_tokens)
        with library_errors("encode this text"):
            if size < _LONG_TEXT:
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
            # Only the library's methods for batches let other threads run meanwhile.
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _check_length(self, text: str, size: int, max_tokens: int) -> None:
        """Refuses a text of ``size`` bytes if it certainly has more than ``max_tokens`` tokens."""
        if self._text_bound is None:
            most = max(SHORT_TEXT_BYTES, MAX_BYTES_PER_TOKEN * max_tokens)
            if size > most:
                raise ContextLengthError(
                    f"The prompt has {size:,} bytes. This model's context has {max_tokens:,} tokens, for which at most "
                    f"{most:,} bytes are read: shorten the prompt."
                )
            return
        least = self._text_bound.least_tokens(text)
        if least > max_tokens:
            raise ContextLengthError(
                f"The prompt has at least {least:,} tokens, which exceed the {max_tokens:,} tokens of this model's "
                "context: shorten the prompt."
            )

    @cached_property
    def _text_bound(self) -> TextBound | None:
        return text_bound(self._backend)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        max_tokens: int | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The token ids of a chat. Arguments and errors are those of ``render_chat`` and ``encode``."""
        chat = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, chat_template=chat_template, **template_variables
        )
        return self.encode(chat, add_special_tokens=False, max_tokens=max_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_variables: Any,
    ) -> str:
        """Renders a chat as the text that the model was trained to continue.

        Args:
            messages: The messages. Each has a ``role`` and usually a ``content``: a string, or a list of parts such as
                ``{"type": "text", "text": …}``. If the template does not support parts, they are joined to one string
                with line breaks.
            add_generation_prompt: True to end with the opening of the assistant's answer.
            chat_template: Name of the template. The default is ``tool_use`` if tools are given and the tokenizer has
                that template, otherwise ``default``.
            template_variables: The template's other variables: ``tools`` (JSON schemas), ``documents``, …

        Raises:
            BundleError: The chat template has a syntax error.
            BackendError: Jinja, which renders chats, is not installed.
            RequestError: There is no chat template, a message is malformed, or the template refuses the chat.
        """
        variables = checked_variables(template_variables)
        chat = checked_messages(messages)
        template = self._choose_template(chat_template, has_tools=variables["tools"] is not None)
        for message in chat:
            if "content" in message:
                message["content"] = in_form(message["content"], self._content_forms(template, message["role"]))
        context = self.named_tokens | variables
        return render(template, messages=chat, add_generation_prompt=add_generation_prompt, **context)

    def _content_forms(self, template: str, role: str) -> ContentForms:
        """The forms of content that a template supports in messages of a role."""
        key = (template, role if role in _ROLES else "")
        if key not in self._known_forms:
            variables = checked_variables({})

            def rendered(messages: list[dict[str, Any]]) -> str:
                return render(
                    template, messages=messages, add_generation_prompt=False, **(self.named_tokens | variables)
                )

            self._known_forms[key] = find_forms(rendered, role) if key[1] else ContentForms.TEXT
        return self._known_forms[key]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, *, clean_up: bool | None = None) -> str:
        """The text of token ids. Ids outside the vocabulary add nothing.

        Args:
            ids: The token ids.
            skip_special_tokens: True if special tokens are left out.
            clean_up: True to remove spaces before punctuation. None follows the tokenizer's configuration.

        Raises:
            RequestError: An id is negative or exceeds 32 bits.
        """
        checked = [int(index) for index in ids]
        try:
            with library_errors("decode these tokens"):
                text = str(self._backend.decode(checked, skip_special_tokens=skip_special_tokens))
        except OverflowError as e:
            wrong = next(index for index in checked if not 0 <= index < 2**32)
            raise RequestError(f"{wrong} is not a token id: ids are at least 0 and have at most 32 bits.") from e
        return clean_up_spaces(text) if (self.cleans_up if clean_up is None else clean_up) else text

    def _choose_template(self, name: str | None, *, has_tools: bool) -> str:
        if not self.chat_templates:
            raise RequestError("This model has no chat template: pass the prompt as text instead of messages.")
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise RequestError(
                f"This model has no chat template named {name!r}: choose one of {sorted(self.chat_templates)}."
            )
        return self.chat_templates[name]


def clean_up_spaces(text: str) -> str:
    """Removes the spaces that word-piece decoding leaves before punctuation and English contractions."""
    for spaced, closed in _CLEAN_UPS:
        text = text.replace(spaced, closed)
    return text


@cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in characters_of_bytes().items()}


def _step_types(decoder: Mapping[str, Any]) -> Iterator[str]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _step_types(step)
    else:
        yield str(decoder["type"])


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """A context manager that turns errors of the tokenizers library into a ``BundleError``.

    Panics of the library's Rust code are included. They are a ``BaseException``, not an ``Exception``.

    Args:
        doing: The library's action inside, as in "can't read this file".
    """
    try:
        yield
    except OverflowError:  # an id that is out of range: callers report it
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise BundleError(
            f"The tokenizers library can't {doing}: {brief(e)}. The tokenizer is damaged, or this version of the "
            "library doesn't know its kind."
        ) from e
