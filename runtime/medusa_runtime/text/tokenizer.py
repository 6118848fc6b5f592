"""A bundle's tokenizer: text and chats to token ids, and ids back to text, without transformers.

Reads what ``save_pretrained`` of transformers writes, the older layouts included, and gives the ids and
texts that transformers gives. Like transformers it takes the beginning and end tokens that ``encode``
adds from the post-processor in ``tokenizer.json``, never from ``add_bos_token`` in the configuration.
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
from medusa_runtime.errors import BundleError, RequestError
from medusa_runtime.text.bounds import TextBound, characters_of_bytes, text_bound
from medusa_runtime.text.chat_content import Takes, find_takes, in_form
from medusa_runtime.text.chat_template import check_template, checked_messages, checked_variables, render
from medusa_runtime.text.limits import MAX_BYTES_PER_TOKEN, MAX_TEXT_BYTES, SHORT_TEXT_BYTES
from medusa_runtime.text.tokenizer_files import CONFIG, TokenizerConfig, chat_templates

TOKENIZER = "tokenizer.json"
# The largest vocabularies, of 260,000 tokens, come in 35 MB.
MAX_TOKENIZER_BYTES = 2**28
# Bytes of text from which on encoding takes so long that other threads must be able to run meanwhile.
_LONG_TEXT = 2**14
# What a template takes is found for these; messages of other roles have text as content.
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
    """Encodes text and chats, and decodes token ids, as transformers does with the same files.

    Threads and event loops may share it, and a child made by ``fork`` may use it; it changes nothing that they see.

    Attributes:
        named_tokens: The tokens with a role, by role: ``{"eos_token": "</s>", …}``.
        chat_templates: The chat templates by name; the one used by default is ``default``.
        special_ids: The ids that ``decode`` skips.
        cleans_up: Whether ``decode`` removes spaces before punctuation, for tokenizers that ask for it.
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
        self._known_takes: dict[tuple[str, str], Takes] = {}
        self.named_tokens = dict(named_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.cleans_up = cleans_up
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path | ListedFolder) -> Tokenizer | None:
        """The tokenizer in a folder, or None when the folder has no ``tokenizer.json``.

        Args:
            folder: The folder. Of a bundle's files those that it lists are read, and no others.

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

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, None when the tokenizer names none."""
        name = self.named_tokens.get("eos_token")
        return None if name is None else self._backend.token_to_id(name)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that ``decode`` skips: their ids by their text."""
        return {token: index for index in sorted(self.special_ids) if (token := self.token(index))}

    @cached_property
    def decoder_steps(self) -> tuple[str, ...]:
        """Types of the steps that turn tokens into text, in order: ``("ByteLevel",)``; empty when there are none."""
        decoder = self._backend.decoder
        return () if decoder is None else tuple(_step_types(json.loads(decoder.__getstate__())))

    def token(self, token_id: int) -> str | None:
        """The token as it stands in the vocabulary, None for an id outside it.

        Raises:
            RequestError: The id is negative or beyond 32 bits.
        """
        try:
            return self._backend.id_to_token(token_id)
        except OverflowError as e:
            raise RequestError(f"{token_id} is not a token id: ids start at 0 and fit in 32 bits.") from e

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a byte-level decoder makes of a token, none for an id outside the vocabulary."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.token(token_id) or ""
            try:
                known = bytes(_byte_of_character()[character] for character in token)
            except KeyError:  # an added token that is written as it reads
                known = token.encode()
            self._token_bytes[token_id] = known
        return known

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer puts around one.

        Args:
            text: The text.
            add_special_tokens: Whether to add the tokens that begin and end a text.
            max_tokens: The most tokens of use. Text that surely has more is refused before it is encoded. Where the
                tokenizer can't tell, text of more than ``MAX_BYTES_PER_TOKEN`` for each is refused.

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
            # Of the library's methods, those for batches let other threads run.
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _check_length(self, text: str, size: int, max_tokens: int) -> None:
        """Refuses a text of so many bytes if it is too long for so many tokens."""
        if self._text_bound is None:
            most = max(SHORT_TEXT_BYTES, MAX_BYTES_PER_TOKEN * max_tokens)
            if size > most:
                raise RequestError(
                    f"The prompt has {size:,} bytes. This model holds {max_tokens:,} tokens, for which {most:,} bytes "
                    "are read at most: shorten it."
                )
            return
        least = self._text_bound.least_tokens(text)
        if least > max_tokens:
            raise RequestError(
                f"The prompt has at least {least:,} tokens, which exceed the {max_tokens:,} tokens that this model "
                "holds: shorten it."
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
        """The token ids of a chat; the arguments and errors are those of ``render_chat`` and ``encode``."""
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
        """A chat as the text that the model was trained to continue.

        Args:
            messages: The messages, each with a ``role`` and, mostly, a ``content``: a string, or a list of parts
                such as ``{"type": "text", "text": …}``. A template that takes no parts gets them as one string, with
                line breaks between them.
            add_generation_prompt: Whether to end with the opening of the assistant's answer.
            chat_template: Name of the template to use; by default ``tool_use`` where tools are given and the
                tokenizer has it, else ``default``.
            template_variables: What the template reads besides: ``tools`` (JSON schemas), ``documents``, …

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
                message["content"] = in_form(message["content"], self._takes(template, message["role"]))
        context = self.named_tokens | variables
        return render(template, messages=chat, add_generation_prompt=add_generation_prompt, **context)

    def _takes(self, template: str, role: str) -> Takes:
        """The forms of content that a template takes in messages of a role."""
        key = (template, role if role in _ROLES else "")
        if key not in self._known_takes:
            variables = checked_variables({})

            def rendered(messages: list[dict[str, Any]]) -> str:
                return render(
                    template, messages=messages, add_generation_prompt=False, **(self.named_tokens | variables)
                )

            self._known_takes[key] = find_takes(rendered, role) if key[1] else Takes.TEXT
        return self._known_takes[key]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, *, clean_up: bool | None = None) -> str:
        """The text of token ids; ids outside the vocabulary add nothing.

        Args:
            ids: The token ids.
            skip_special_tokens: Whether special tokens are left out.
            clean_up: Whether to remove spaces before punctuation; by default as the tokenizer asks for.

        Raises:
            RequestError: An id is negative or beyond 32 bits.
        """
        checked = [int(index) for index in ids]
        try:
            with library_errors("decode these tokens"):
                text = str(self._backend.decode(checked, skip_special_tokens=skip_special_tokens))
        except OverflowError as e:
            wrong = next(index for index in checked if not 0 <= index < 2**32)
            raise RequestError(f"{wrong} is not a token id: ids start at 0 and fit in 32 bits.") from e
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
    """The text without the spaces that word-piece decoding leaves before punctuation and English contractions."""
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
    """Turns what the tokenizers library raises into a ``BundleError``, its panics included: they are no ``Exception``.

    Args:
        doing: What the tokenizer does, as in "can't read this file".
    """
    try:
        yield
    except OverflowError:  # an id that is none
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise BundleError(
            f"The tokenizers library can't {doing}: {brief(e)}. The tokenizer is damaged, or this version of the "
            "library doesn't know its kind."
        ) from e
