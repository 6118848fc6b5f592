"""How much text a tokenizer can put into so many tokens, so that longer text is refused before it is encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import tokenizers

# Composing (NFC) leaves at least a quarter of the bytes: up to seven of them become one letter of two bytes.
NFC_SHRINKS = 4
_NEVER_IN_UTF8 = bytes([0xC0, 0xC1, *range(0xF5, 0x100)])
_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength"})


class TextBound(NamedTuple):
    """The most bytes of UTF-8 that a token can stand for.

    Attributes:
        bytes_per_token: Bytes of text per token.
        with_spaces: Whether whitespace counts. It does not where a token may swallow any amount of it.
        lost: Bytes that don't count, since the vocabulary lacks them: text may lose any number of them.
    """

    bytes_per_token: int
    with_spaces: bool
    lost: bytes = b""

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least."""
        counted = text if self.with_spaces else "".join(text.split())
        return -(-len(counted.encode().translate(None, self.lost)) // self.bytes_per_token)


def text_bound(backend: tokenizers.Tokenizer) -> TextBound | None:
    """The bound of a tokenizer, or None where one token may stand for any amount of text.

    A bound is known for byte-pair encoding over bytes, where nothing takes text away: neither the normalizer nor the
    pre-tokenizer nor an unknown token.
    """
    if type(backend.model).__name__ != "BPE":
        return None
    shrinks = 1
    for step in _steps(backend.normalizer, "normalizers"):
        factor = _shrinks(step)
        if factor is None:
            return None
        shrinks *= factor
    pre_tokenizers = list(_steps(backend.pre_tokenizer, "pretokenizers"))
    if not all(_keeps(step) for step in pre_tokenizers):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    lost = b""
    if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        # Each character of a token is one byte.
        lost = bytes(byte for byte, name in sorted(characters_of_bytes().items()) if name not in vocabulary)
        lost = lost.translate(None, _NEVER_IN_UTF8)
        longest = max(map(len, vocabulary), default=0)
    else:
        if not (backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))):
            return None
        longest = max(len(token.encode()) for token in vocabulary)
    if lost and backend.normalizer is not None:  # which may turn bytes that count into some that don't
        return None
    added = backend.get_added_tokens_decoder().values()
    longest = max([longest, *(len(token.content.encode()) for token in added)])
    return TextBound(max(1, longest) * shrinks, not any(token.lstrip or token.rstrip for token in added), lost)


@cache
def characters_of_bytes() -> dict[int, str]:
    """The alphabet of byte-level tokens: printable Latin-1 stands for itself, other bytes are moved up from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _steps(part: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as its file lists them."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), key)


def _flat(step: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    if step["type"] == "Sequence":
        for inner in step[key]:
            yield from _flat(inner, key)
    else:
        yield step


def _shrinks(step: Mapping[str, Any]) -> int | None:
    """How many times fewer bytes a text may have behind a normalizer; None if there is no bound."""
    if step["type"] == "Prepend":
        return 1
    if step["type"] == "NFC":
        return NFC_SHRINKS
    if step["type"] == "Replace" and "String" in step["pattern"]:
        old, new = (len(text.encode()) for text in (step["pattern"]["String"], step["content"]))
        return 1 if new >= old else None
    return None


def _keeps(step: Mapping[str, Any]) -> bool:
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in _KEEPING_PRE_TOKENIZERS
