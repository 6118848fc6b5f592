"""A bundle's tokenizer: text and chats to token ids, and ids back to text, without transformers.

Reads what ``save_pretrained`` of transformers writes, the older layouts included, and gives the ids and
texts that transformers gives. Like transformers it takes the beginning and end tokens that ``encode``
adds from the post-processor in ``tokenizer.json``, never from ``add_bos_token`` in the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from medusa_runtime.chat_template import checked_messages, checked_variables, render
from medusa_runtime.errors import BundleError, RequestError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

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
        self.named_tokens = dict(named_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.cleans_up = cleans_up
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in a folder, or None when the folder has no ``tokenizer.json``.

        Raises:
            BundleError: A file of the tokenizer can't be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        text = _read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the tokenizers library raises nothing narrower
            raise BundleError(f"{path} is not a tokenizer that this version of tokenizers reads: {e}.") from e
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_json(folder / "special_tokens_map.json")
        try:
            named = _named_tokens(config)
            _add_missing_tokens(backend, config, named)
        except (TypeError, ValueError) as e:
            raise BundleError(f"The special tokens in {folder / 'tokenizer_config.json'} are malformed: {e}.") from e
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        return cls(
            backend,
            named_tokens={name: token.content for name, token in named.items()},
            chat_templates=_chat_templates(folder, config),
            cleans_up=_cleans_up(backend, config),
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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer puts around one.

        Raises:
            RequestError: ``text`` is not a string, or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise RequestError(f"The text must be a string, but got {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(
                f"The text holds a lone surrogate at position {e.start}, which is not a character: send valid Unicode."
            ) from e
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The token ids of a chat; the arguments and errors are those of ``render_chat``."""
        chat = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, chat_template=chat_template, **template_variables
        )
        return self.encode(chat, add_special_tokens=False)

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
            messages: The messages, each with a ``role`` and, mostly, a ``content``.
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
        context = self.named_tokens | variables
        return render(template, messages=chat, add_generation_prompt=add_generation_prompt, **context)

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
    """The alphabet of byte-level tokens: printable Latin-1 stands for itself, other bytes are moved up from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"{path} can't be read as UTF-8 text: {e}.") from e


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise BundleError(f"{path} is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise BundleError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def _step_types(decoder: Mapping[str, Any]) -> Iterator[str]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _step_types(step)
    else:
        yield str(decoder["type"])


def _added_token(value: str | Mapping[str, Any], *, special: bool | None = None) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = {key: value[key] for key in ("content", "single_word", "lstrip", "rstrip", "normalized") if key in value}
    if not isinstance(fields.get("content"), str):
        raise TypeError(f"a token must have its text under 'content', but got {dict(value)!r}")
    return AddedToken(**fields, special=bool(value.get("special", False)) if special is None else special)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens with a role: the usual seven, and a model's own, listed under any key in ``_token``."""
    own = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(group), dict):
            own |= config[group]
    keys = [*_NAMED_TOKENS, *(key for key in own if key not in _NAMED_TOKENS)]
    return {key: _added_token(own[key], special=True) for key in keys if key in own}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, AddedToken]
) -> None:
    """Adds what the configuration lists beyond ``tokenizer.json``, and marks the named tokens as special."""
    present = backend.get_added_tokens_decoder()
    names = {token.content for token in named.values()}
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        tokens = [_added_token(value) for _, value in sorted(listed.items(), key=lambda item: int(item[0]))]
    else:
        tokens = [token for _, token in sorted(present.items())]
    for token in tokens:
        token.special = token.special or token.content in names
    known = {token.content for token in [*present.values(), *tokens]}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [*named.values(), *(_added_token(value, special=True) for value in extra if not isinstance(extra, dict))]
    for token in others:
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    backend.add_tokens(tokens)


def _cleans_up(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether to clean up: never for BPE, whose spaces are part of the text, unless the configuration insists."""
    if not config.get("clean_up_tokenization_spaces", False):
        return False
    insists = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return type(backend.model).__name__ != "BPE" or bool(insists)


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; files of their own rank above the configuration."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    listed = config.get("chat_template")
    if listed is None:
        return {}
    if isinstance(listed, str):
        return {"default": listed}
    try:
        templates = dict(listed) if isinstance(listed, dict) else {t["name"]: t["template"] for t in listed}
    except (TypeError, KeyError) as e:
        raise _malformed_templates(folder) from e
    if not all(isinstance(template, str) for template in templates.values()):
        raise _malformed_templates(folder)
    return templates


def _malformed_templates(folder: Path) -> BundleError:
    return BundleError(
        f"chat_template in {folder / 'tokenizer_config.json'} is malformed: "
        "it must be a template, or a list of objects with a name and a template."
    )
