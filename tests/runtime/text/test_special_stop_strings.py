"""Stop strings that hold special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.text.stop_strings import check_stop
from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer
from support.streams import (
    ALL,
    chunked,
    ids_of,
    make,
    run,
    token_ids,
)

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def cut_with_tokens(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, str | None, int]:
    """The text, the stop string, and the number of tokens up to its end, found by brute force.

    Each token must be whole characters.
    """
    pieces = {stop: [part for part in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", stop) if part]
              for stop in stops}  # fmt: skip
    parsed = {stop: [c for part in parts for c in ([part] if part in SPECIAL else part)]
              for stop, parts in pieces.items() if any(part in SPECIAL for part in parts)}  # fmt: skip
    symbols: list[str] = []
    for count, token_id in enumerate(ids, start=1):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        for symbol in [text] if text in SPECIAL else text:
            symbols.append(symbol)
            visible = "".join(s for s in symbols if s not in SPECIAL)
            ending = [(len(stop), stop) for stop in stops if symbol not in SPECIAL and visible.endswith(stop)]
            ending += [
                (sum(s not in SPECIAL for s in part), stop)
                for stop, part in parsed.items()
                if symbols[-len(part) :] == part
            ]
            if ending:
                characters, stop = max(ending, key=lambda found: found[0])
                return visible[: len(visible) - characters], stop, count
    return tokenizer.decode(ids), None, len(ids)


@settings(max_examples=200)
@given(data=st.data())
def test_special_tokens_in_stop_strings_against_brute_force(data: st.DataObject) -> None:
    tokenizer = make("byte_level")
    parts = st.lists(st.sampled_from([*SPECIAL, "a", "b", "ab", "<think>", "ba", "<", ">"]), max_size=14)
    ids = tokenizer.encode("".join(data.draw(parts)), add_special_tokens=False)
    stops = data.draw(
        st.lists(st.lists(st.sampled_from([*SPECIAL, "a", "b", "<think>", "<"]), min_size=1, max_size=4).map("".join),
                 min_size=1, max_size=3))  # fmt: skip
    stream = TextStream(tokenizer, stops)
    text = run(stream, chunked(data, ids))
    expected, stop, count = cut_with_tokens(tokenizer, ids, check_stop(stops))
    assert (text, stream.consumed, stream.stopped_by is None) == (expected, count, stop is None)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25)
@given(data=st.data())
def test_special_tokens_in_stop_strings_in_any_chunks(name: str, data: st.DataObject) -> None:
    """For any tokens, also parts of characters: all chunks give the same prefix of the decoded text."""
    tokenizer = make(name)
    specials = [*tokenizer.special_tokens]
    more = st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=2) if specials else st.just([])
    ids = [*data.draw(token_ids(tokenizer, 16)), *data.draw(more), *data.draw(token_ids(tokenizer, 16))]
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    starts = st.tuples(st.integers(0, len(shown)), st.integers(1, 12)).map(lambda s: shown[s[0] : s[0] + s[1]])
    stops = data.draw(st.lists(st.one_of(starts.filter(bool), st.sampled_from(specials or ["x"])), max_size=3))
    stream, at_once = TextStream(tokenizer, stops), TextStream(tokenizer, stops)
    text = run(stream, chunked(data, ids))
    assert run(at_once, [ids]) == text
    assert (at_once.consumed, at_once.stopped_by) == (stream.consumed, stream.stopped_by)
    assert tokenizer.decode(ids[: stream.consumed]).startswith(text)
    if stream.stopped_by is None:
        assert text == tokenizer.decode(ids)
        assert not any(tokenizer.token(token_id) in stops for token_id in ids if token_id in tokenizer.special_ids)


@pytest.mark.parametrize(
    ("stop", "expected", "consumed"),
    [
        ("<|im_end|>", "ab", 3),
        ("b<|im_end|>", "a", 3),
        ("<|im_end|>\n", "ab", 4),
        ("b<|im_end|>\n<|im_start|>c", "a", 6),
        ("<|im_start|>", "ab\n", 5),
        ("<think>", "ab\nc", 7),  # this added token is not special, so it is text
        ("a<|im_end|>", "ab\nc<think>d", 8),
        ("<|im_start", "ab\nc<think>d", 8),  # a part of a special token's name is text, which does not occur
        ("b\n", "a", 4),  # text on both sides of a special token is one text
    ],
)
def test_stop_strings_that_hold_special_tokens(stop: str, expected: str, consumed: int) -> None:
    tokenizer = make("byte_level")
    ids = tokenizer.encode("ab<|im_end|>\n<|im_start|>c<think>d", add_special_tokens=False)
    stream = TextStream(tokenizer, stop)
    assert (run(stream, [ids]), stream.consumed) == (expected, consumed)
    assert stream.stopped_by == (stop if expected != "ab\nc<think>d" else None)


def test_a_special_token_behind_a_line_break_that_is_a_byte_token() -> None:
    """The line break is held back, since more bytes may follow. The stop string is found at once nevertheless."""
    tokenizer = make("byte_fallback")
    ids = ids_of(tokenizer, "e", "<0x0A>", "</s>", "h")
    for stop, consumed in (("\n</s>", 3), ("\n</s>h", 4), ("e\n</s>", 3), ("</s>", 3)):
        stream = TextStream(tokenizer, stop)
        text = "".join(stream.push([token_id]) for token_id in ids) + stream.finish()
        assert (text, stream.consumed) == ({"e": "", "<": "e\n"}.get(stop[0], "e"), consumed)


@pytest.mark.parametrize("tree_size", [1, 4, 9])
def test_an_engine_ends_at_a_special_token(tiny_bundle: Bundle, tree_size: int) -> None:
    """With any tree size, the answer is that of plain decoding."""
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        plain = engine.generate("Hello", max_new_tokens=30, tree_size=1)
        place = next(i for i in range(5, 29) if plain.token_ids[i] not in plain.token_ids[:i])
        token = engine.tokenizer.token(plain.token_ids[place])
        backend = tokenizers.Tokenizer.from_str(engine.tokenizer._backend.to_str())
        backend.add_special_tokens([token])
        engine.tokenizer = Tokenizer(backend)
        for stop in (token, plain.text[place - 2 : place + 1], plain.text[place - 1 : place + 1]):
            result = engine.generate("Hello", max_new_tokens=30, tree_size=tree_size, stop=["never", stop])
            assert result.finish_reason == "stop"
            assert result.token_ids == plain.token_ids[: place + 1]
            assert result.text == plain.text[: place + 1 - len(stop)]
