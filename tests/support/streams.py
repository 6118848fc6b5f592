"""Tokenizers, token ids and chunks for tests of the text stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders

from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer
from support.tokenizer_kinds import KINDS, SENTENCES, byte_fallback, byte_level, plain_words, unigram, word_piece

REPLACEMENT = "\ufffd"


def wrapped_byte_level() -> tokenizers.Tokenizer:
    """Byte-level decoding after another step, for which the byte decoder is not used."""
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.Replace("z", "Z"), decoders.ByteLevel()])
    return backend


def greedy_strip() -> tokenizers.Tokenizer:
    """Byte fallback that strips up to three spaces at the start."""
    backend = byte_fallback()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)]
    )
    return backend


def no_strip() -> tokenizers.Tokenizer:
    """Byte fallback as in Gemma, which strips nothing."""
    backend = byte_fallback()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def byte_fallback_then_metaspace() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


ALL: dict[str, tuple[Callable[[], tokenizers.Tokenizer], bool]] = {
    **{name: (make, False) for name, make in KINDS.items()},
    "wrapped_byte_level": (wrapped_byte_level, False),
    "greedy_strip": (greedy_strip, False),
    "no_strip": (no_strip, False),
    "byte_fallback_then_metaspace": (byte_fallback_then_metaspace, False),
    "word_piece cleaned": (word_piece, True),
    "plain_words cleaned": (plain_words, True),
    "unigram cleaned": (unigram, True),
}


@cache
def make(name: str) -> Tokenizer:
    build, cleans_up = ALL[name]
    return Tokenizer(build(), cleans_up=cleans_up)


@cache
def bytes_of(tokenizer: Tokenizer) -> list[int]:
    """The tokens that are single bytes."""
    tokens = {i: tokenizer.token(i) or "" for i in range(tokenizer.vocab_size)}
    return [i for i, token in tokens.items() if token.startswith("<0x")] or [
        i for i, token in tokens.items() if len(token) == 1
    ]


@st.composite
def token_ids(draw: st.DrawFn, tokenizer: Tokenizer, max_size: int = 40) -> list[int]:
    """Random tokens, single bytes, encoded text, complete or cut, and ids outside the vocabulary."""
    parts = draw(
        st.lists(
            st.one_of(
                st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=8),
                st.lists(st.sampled_from(bytes_of(tokenizer)), max_size=5),
                st.one_of(st.sampled_from([*SENTENCES, "▁▁ ▁", "\ufffd\ufffdx", " n't ' s . '"]), st.text()).map(
                    lambda text: tokenizer.encode(text)[-12:]
                ),
            ),
            max_size=6,
        )
    )
    ids = [token_id for part in parts for token_id in part][:max_size]
    return ids[draw(st.integers(0, 2)) :]


def chunked(data: st.DataObject, ids: Sequence[int]) -> list[list[int]]:
    """Divides ids into chunks of any length, also empty ones."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [list(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def run(stream: TextStream, chunks: Sequence[Sequence[int]]) -> str:
    pieces = [stream.push(chunk) for chunk in chunks]
    assert stream.text == "".join(pieces)
    pieces += [stream.finish(), stream.finish()]
    assert stream.text == "".join(pieces)
    return stream.text


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    known = {tokenizer.token(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [known[token] for token in tokens]
