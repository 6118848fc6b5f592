"""The most text that a number of tokens can hold, so that longer text is refused before it is encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import tokenizers

# NFC normalization keeps at least a quarter of the bytes: at most seven bytes become one letter of two bytes.
NFC_SHRINKS = 4
_NEVER_IN_UTF8 = bytes([0xC0, 0xC1, *range(0xF5, 0x100)])
_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength"})


class TextBound(NamedTuple):
    """The most bytes of UTF-8 text that a token can stand for.

    Attributes:
        bytes_per_token: The most bytes of text per token.
        with_spaces: True if whitespace counts. It does not if a token may strip any amount of whitespace around it.
        lost: Bytes that don't count. The vocabulary lacks them, so encoding drops them.
    """

    bytes_per_token: int
    with_spaces: bool
    lost: bytes = b""

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of a text."""
        counted = text if self.with_spaces else "".join(text.split())
        return -(-len(counted.encode().translate(None, self.lost)) // self.bytes_per_token)


def text_bound(backend: tokenizers.Tokenizer) -> TextBound | None:
    """The bound of a tokenizer; None if a token may stand for any amount of text.

    A bound is known for byte-pair encoding over bytes, if no part of the tokenizer removes text: neither the normalizer
    nor the pre-tokenizer nor an unknown token.
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
    if lost and backend.normalizer is not None:  # a normalizer may turn bytes that count into bytes that don't
        return None
    added = backend.get_added_tokens_decoder().values()
    longest = max([longest, *(len(token.content.encode()) for token in added)])
    return TextBound(max(1, longest) * shrinks, not any(token.lstrip or token.rstrip for token in added), lost)


@cache
def characters_of_bytes() -> dict[int, str]:
    """The character that stands for each byte in byte-level tokens.

    Printable Latin-1 characters stand for themselves. The other bytes have the characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _steps(part: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as ``tokenizer.json`` lists them."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), key)


def _flat(step: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of nested sequences in order; ``key`` names the list of a sequence's steps."""
    if step["type"] == "Sequence":
        for inner in step[key]:
            yield from _flat(inner, key)
    else:
        yield step


def _shrinks(step: Mapping[str, Any]) -> int | None:
    """The factor by which a normalizer may shrink the bytes of a text; None if there is no bound."""
    if step["type"] == "Prepend":
        return 1
    if step["type"] == "NFC":
        return NFC_SHRINKS
    if step["type"] == "Replace" and "String" in step["pattern"]:
        old, new = (len(text.encode()) for text in (step["pattern"]["String"], step["content"]))
        return 1 if new >= old else None
    return None


def _keeps(step: Mapping[str, Any]) -> bool:
    """True if a step of a pre-tokenizer is known to remove no text."""
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in _KEEPING_PRE_TOKENIZERS
