"""Text that is too long is refused before it is encoded, and no other text."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from medusa_runtime.errors import RequestError
from medusa_runtime.text.bounds import NFC_SHRINKS, text_bound
from medusa_runtime.text.limits import (
    MAX_BYTES_PER_TOKEN,
    MAX_TEXT_BYTES,
    SHORT_TEXT_BYTES,
)
from medusa_runtime.text.tokenizer import Tokenizer
from support.tokenizer_kinds import (
    SENTENCES,
    byte_fallback,
    byte_level,
    plain_words,
    unigram,
    word_piece,
)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@settings(max_examples=60)
@given(text=st.one_of(st.text(max_size=200), st.sampled_from([" " * 90, "\u1112\u1161\u11ab" * 20, "a</s>  " * 9])))
def test_no_text_has_fewer_tokens_than_its_bound(make: Callable[[], tokenizers.Tokenizer], text: str) -> None:
    backend = make()
    for normalizer in (backend.normalizer, normalizers.NFC()):
        backend.normalizer = normalizer
        bound = text_bound(backend)
        assert bound is not None
        assert bound.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.slow
def test_nfc_keeps_a_quarter_of_the_bytes() -> None:
    """Compares each character with the longest text that composes to it, in bytes."""
    longest: dict[str, int] = {}
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    for character in characters:  # single characters that become another one
        composed = unicodedata.normalize("NFC", character)
        if len(composed) == 1:
            longest[composed] = max(longest.get(composed, 0), len(character.encode()))
    for character in characters:
        parts = unicodedata.normalize("NFD", character)
        size = max(longest.get(character, 0), sum(longest.get(part, len(part.encode())) for part in parts))
        assert size <= NFC_SHRINKS * len(character.encode()), character


@pytest.mark.parametrize("strips", ["lstrip", "rstrip"])
def test_whitespace_that_a_token_strips_does_not_count(strips: str) -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|x|>", **{strips: True})])
    text = "   " * 10_000 + "<|x|>" + "   " * 10_000 + "\u2003\u0085\x1c"
    bound = text_bound(backend)
    assert bound is not None and not bound.with_spaces
    assert bound.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("make", [word_piece, plain_words, unigram])
def test_no_bound_where_a_token_may_stand_for_any_text(make: Callable[[], tokenizers.Tokenizer]) -> None:
    assert text_bound(make()) is None


@settings(max_examples=60)
@given(text=st.one_of(st.text(max_size=80), st.text("abü \n\x1f\U000f0000", max_size=80)))
@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_bytes_that_the_vocabulary_lacks_do_not_count(unknown: str | None, text: str) -> None:
    """They are dropped, or any number of them becomes one unknown token. SmolLM2's vocabulary lacks some, too."""
    backend = byte_level()
    alphabet = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in "Ċüñ¼Ğò"]
    vocab = {character: i for i, character in enumerate(["<unk>", *sorted(alphabet), "ab"])}
    backend.model = models.BPE(vocab=vocab, merges=[("a", "b")], unk_token=unknown, fuse_unk=unknown is not None)
    bound = text_bound(backend)
    assert bound is not None and len(bound.lost) == 5  # not six: the byte of ü does not occur in UTF-8
    assert bound.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)
    assert bound.least_tokens("x" * 10**6) > 10**4
    backend.normalizer = normalizers.NFC()
    assert text_bound(backend) is None


def test_no_bound_where_text_is_dropped() -> None:
    for change in (
        lambda backend: setattr(backend, "normalizer", normalizers.Strip()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("aa", "b")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
    ):
        backend = byte_level()
        change(backend)
        assert text_bound(backend) is None


def test_text_that_is_too_long_is_refused_before_it_is_encoded() -> None:
    ours = Tokenizer(byte_level())
    bound = text_bound(ours._backend)
    assert bound is not None
    encode, ours._backend = ours._backend, NoEncoding(ours._backend)  # type: ignore[assignment]
    with pytest.raises(RequestError, match="at least 101 tokens, which exceed the 100 tokens"):
        ours.encode("x" * (100 * bound.bytes_per_token + 1), max_tokens=100)
    with pytest.raises(RequestError, match="4,194,305 bytes"):
        ours.encode("x" * (MAX_TEXT_BYTES + 1))
    with pytest.raises(RequestError, match="bytes or more"):
        ours.encode("\ud800" * (MAX_TEXT_BYTES + 1))
    ours._backend = encode
    assert ours.encode("x" * 100, max_tokens=100)


@pytest.mark.parametrize("make", [word_piece, plain_words, unigram])
def test_text_without_a_bound_of_tokens_is_bounded_by_the_context(make: Callable[[], tokenizers.Tokenizer]) -> None:
    """Otherwise encoding would take 400 bytes of memory for each of four million bytes of text."""
    ours = Tokenizer(make())
    for text in ("x" * SHORT_TEXT_BYTES, "é" * (SHORT_TEXT_BYTES // 2)):
        ours.encode(text, max_tokens=100)  # short enough for every context
        ours.encode(text + "x", max_tokens=SHORT_TEXT_BYTES // MAX_BYTES_PER_TOKEN + 1)
        ours.encode(text + "x")
        backend, ours._backend = ours._backend, NoEncoding(ours._backend)  # type: ignore[assignment]
        with pytest.raises(RequestError, match=r"has 65,537 bytes\. This model's context has 4,096 tokens"):
            ours.encode(text + "x", max_tokens=4096)
        ours._backend = backend


class NoEncoding:
    """A tokenizer that must not encode."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        assert not name.startswith("encode")
        return getattr(self._backend, name)


@pytest.mark.parametrize("special", [False, True])
def test_long_text_has_the_tokens_of_short_text(special: bool) -> None:
    """Long text is encoded by a method that lets other threads run."""
    backend = byte_level()
    text = " ".join(SENTENCES) * 100
    assert len(text) > 2**14
    expected = backend.encode(text, add_special_tokens=special).ids
    assert Tokenizer(backend).encode(text, add_special_tokens=special) == expected
