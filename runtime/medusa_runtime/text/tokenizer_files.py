"""Reads the files of a tokenizer beside ``tokenizer.json``: special tokens, chat templates and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any

import msgspec
import tokenizers
from msgspec import Meta
from tokenizers import AddedToken

from medusa_runtime.bundles.json_file import parse_json
from medusa_runtime.bundles.listed_folder import ListedFolder
from medusa_runtime.errors import BundleError

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
REMEDY = "Get the file again, or export the bundle again."

# The largest published files are those of speech models: 30,000 tokens in 6 MB.
MAX_CONFIG_BYTES = 2**25
# Bytes; the largest published template has 30 KB.
MAX_TEMPLATE_BYTES = 2**18
MAX_TEMPLATES = 64

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

TokenText = Annotated[str, Meta(max_length=4096)]
TokenIndex = Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")]


class TokenFacts(msgspec.Struct, omit_defaults=True):
    """A token with its attributes. If ``normalized`` is None, it is the opposite of ``special``."""

    content: TokenText
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool | None = None

    def token(self, *, special: bool | None = None) -> AddedToken:
        """The token for the tokenizers library; ``special`` overrides the token's own attribute."""
        return AddedToken(
            self.content,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            special=bool(self.special) if special is None else special,
            **({} if self.normalized is None else {"normalized": self.normalized}),
        )


Token = TokenText | TokenFacts


class TemplateEntry(msgspec.Struct):
    """A chat template and its name, where a tokenizer has several."""

    name: TokenText
    template: str


class TokenizerConfig(msgspec.Struct):
    """The schema of ``tokenizer_config.json``, and of ``special_tokens_map.json`` where that file is read.

    In addition, any key that ends in ``_token`` may name a token. These are in ``named``.
    """

    added_tokens_decoder: dict[TokenIndex, TokenFacts] | None = None
    additional_special_tokens: list[Token] | None = None
    chat_template: str | dict[TokenText, str] | list[TemplateEntry] | None = None
    clean_up_tokenization_spaces: bool | None = None
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output: bool | None = None
    extra_special_tokens: dict[TokenText, Token] | list[Token] | None = None
    model_specific_special_tokens: dict[TokenText, Token] | list[Token] | None = None
    split_special_tokens: bool | None = None
    named: dict[TokenText, Token] = {}

    @classmethod
    def load(cls, folder: ListedFolder) -> TokenizerConfig:
        """Reads the files of a folder and merges their values.

        Raises:
            BundleError: A file can't be read.
        """
        where, values = folder.path / CONFIG, _values(folder, CONFIG)
        if "added_tokens_decoder" not in values:
            values |= _values(folder, SPECIAL_TOKENS)
        values.pop("named", None)
        config = parse_json(msgspec.json.encode(values), cls, where, remedy=REMEDY)
        tokens = {key: value for key, value in values.items() if key.endswith("_token") and _is_token(value)}
        config.named = parse_json(msgspec.json.encode(tokens), dict[TokenText, Token], where, remedy=REMEDY)
        for group in (config.extra_special_tokens, config.model_specific_special_tokens):
            config.named |= group if isinstance(group, dict) else {}
        return config

    def named_tokens(self) -> dict[str, AddedToken]:
        """The tokens that have a role, by role: the usual seven first, then the model's own."""
        keys = [*_NAMED_TOKENS, *(key for key in self.named if key not in _NAMED_TOKENS)]
        return {key: _added(self.named[key]) for key in keys if key in self.named}

    def add_missing_tokens(self, backend: tokenizers.Tokenizer, named: Mapping[str, AddedToken]) -> None:
        """Adds the listed tokens that ``tokenizer.json`` lacks, and marks the named tokens as special."""
        present = backend.get_added_tokens_decoder()
        names = {token.content for token in named.values()}
        if self.added_tokens_decoder is not None:
            tokens = [facts.token() for _, facts in sorted(self.added_tokens_decoder.items(), key=lambda i: int(i[0]))]
        else:
            tokens = [token for _, token in sorted(present.items())]
        for token in tokens:
            token.special = token.special or token.content in names
        known = {token.content for token in [*present.values(), *tokens]}
        extra = self.extra_special_tokens or self.additional_special_tokens or []
        for token in [*named.values(), *(_added(value) for value in ([] if isinstance(extra, dict) else extra))]:
            if token.content not in known:
                known.add(token.content)
                tokens.append(token)
        backend.add_tokens(tokens)

    def cleans_up(self, backend: tokenizers.Tokenizer) -> bool:
        """True if decoding removes spaces before punctuation.

        Never for BPE, whose spaces are part of the text, unless the configuration demands it with its second key.
        """
        insists = self.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
        return bool(self.clean_up_tokenization_spaces) and (type(backend.model).__name__ != "BPE" or bool(insists))


def chat_templates(folder: ListedFolder, config: TokenizerConfig) -> dict[str, str]:
    """The chat templates by name. Template files take precedence over templates in the configuration.

    Raises:
        BundleError: A template can't be read or is too long, or there are too many templates.
    """
    files = {PurePosixPath(name).stem: name for name in folder.names(TEMPLATES, ".jinja")[: MAX_TEMPLATES + 1]}
    found = {name: _template(folder, file) for name, file in files.items()}
    default = folder.read(TEMPLATE, at_most=MAX_TEMPLATE_BYTES)
    if default is not None:
        found["default"] = _text(folder, TEMPLATE, default)
    if not found:
        listed = config.chat_template
        if isinstance(listed, list):
            found = {entry.name: entry.template for entry in listed}
        else:
            found = {"default": listed} if isinstance(listed, str) else dict(listed or {})
    if len(found) > MAX_TEMPLATES:
        raise BundleError(f"{folder.path} holds more than the {MAX_TEMPLATES} chat templates that are read. {REMEDY}")
    for name, template in found.items():
        if len(template) > MAX_TEMPLATE_BYTES:
            raise BundleError(
                f"The chat template {name!r} in {folder.path} has {len(template):,} characters, but at most "
                f"{MAX_TEMPLATE_BYTES:,} are read. {REMEDY}"
            )
    return found


def _template(folder: ListedFolder, name: str) -> str:
    return _text(folder, name, folder.read(name, at_most=MAX_TEMPLATE_BYTES) or b"")


def _text(folder: ListedFolder, name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise BundleError(f"{folder.path / name} can't be read as UTF-8 text: {e}. {REMEDY}") from e


def _values(folder: ListedFolder, name: str) -> dict[str, Any]:
    """The values in a file by key, as unparsed JSON; empty if there is no such file."""
    data = folder.read(name, at_most=MAX_CONFIG_BYTES)
    kind: Any = dict[str, msgspec.Raw]
    return {} if data is None else dict(parse_json(data, kind, folder.path / name, remedy=REMEDY))


def _is_token(value: msgspec.Raw) -> bool:
    return bytes(value)[:1] in (b'"', b"{")


def _added(value: str | TokenFacts) -> AddedToken:
    return AddedToken(value, special=True) if isinstance(value, str) else value.token(special=True)
