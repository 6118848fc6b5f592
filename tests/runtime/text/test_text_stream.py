"""The law of the text stream: its pieces, joined, are the decoded text up to the first stop string."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.errors import RequestError
from medusa_runtime.text.limits import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from medusa_runtime.text.stop_strings import StopFinder, check_stop
from medusa_runtime.text.stream import TextStream, _CleanUp
from medusa_runtime.text.tokenizer import Tokenizer, clean_up_spaces
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


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, or the longest of those, found by brute force."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = make(name)
    ids = data.draw(token_ids(tokenizer))
    skip = data.draw(st.booleans())
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    assert run(stream, chunked(data, ids)) == tokenizer.decode(ids, skip)
    assert stream.consumed == len(ids)
    assert stream.stopped_by is None


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = make(name)
    ids = data.draw(token_ids(tokenizer))
    whole = tokenizer.decode(ids)
    slices = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda s: whole[s[0] : s[0] + s[1]])
    stops = data.draw(st.lists(st.one_of(slices, st.text("ab e.", max_size=4)).filter(bool), max_size=4))
    stream = TextStream(tokenizer, stops)
    text = run(stream, chunked(data, ids))
    assert (text, stream.stopped_by) == cut(whole, stops)
    assert stream.consumed <= len(ids)
    # Other chunks give the same text and the same number of consumed tokens.
    at_once = TextStream(tokenizer, stops)
    assert run(at_once, [ids]) == text
    assert at_once.consumed == stream.consumed
    # The consumed tokens contain the stop string, and one token less does not.
    assert cut(tokenizer.decode(ids[: stream.consumed]), stops)[0].startswith(text)


@pytest.mark.parametrize("name", [name for name in ALL if "cleaned" not in name])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_behind_a_prompt(name: str, data: st.DataObject) -> None:
    """The stream is the text after the prompt. A character that the prompt leaves unfinished belongs to the stream."""
    tokenizer = make(name)
    prompt, ids = data.draw(token_ids(tokenizer)), data.draw(token_ids(tokenizer))
    stream = TextStream(tokenizer, prompt_ids=prompt)
    text = run(stream, chunked(data, ids))
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    torn = len(before) - len(before.rstrip(REPLACEMENT))
    assert text in {whole[len(before) - unfinished :] for unfinished in range(torn + 1)}


@given(text=st.text(" '.?!,ntsmver", max_size=60), data=st.data())
@settings(max_examples=150, deadline=None)
def test_clean_up_in_pieces(text: str, data: st.DataObject) -> None:
    stage = _CleanUp()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [stage.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(pieces) + stage.finish() == clean_up_spaces(text)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5))
@settings(max_examples=150, deadline=None)
def test_stop_finder_against_brute_force(text: str, stops: list[str]) -> None:
    finder = StopFinder(stops)
    found = "".join(finder.feed(character) for character in text) + finder.finish()
    assert (found, finder.found) == cut(text, stops)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "unigram", "no_strip"])
@pytest.mark.parametrize("text", SENTENCES)
def test_text_comes_without_delay(name: str, text: str) -> None:
    """After every token the stream has returned all text, except an unfinished character or run of bytes."""
    tokenizer = make(name)
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text)
    behind = 0
    for count, token_id in enumerate(ids, start=1):
        stream.push([token_id])
        assert REPLACEMENT not in stream.text
        whole = tokenizer.decode(ids[:count])
        assert whole.startswith(stream.text)
        is_byte = (tokenizer.token(token_id) or "").startswith("<0x")
        if not whole.endswith(REPLACEMENT) and not is_byte:
            assert stream.text == whole
            behind += 1
    assert behind


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    known = {tokenizer.token(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [known[token] for token in tokens]


def test_a_character_in_parts_comes_whole() -> None:
    tokenizer = make("byte_level")
    parts = ids_of(tokenizer, "ð", "Ł", "Ļ", "Ģ", "!")  # F0 9F 99 80
    stream = TextStream(tokenizer)
    assert [stream.push([part]) for part in parts] == ["", "", "", "🙀", "!"]


def test_an_invalid_character_is_replaced_at_once_or_at_the_end() -> None:
    tokenizer = make("byte_level")
    stream = TextStream(tokenizer)
    assert stream.push(ids_of(tokenizer, "ð", "Ł")) == ""
    assert stream.push(ids_of(tokenizer, "a")) == REPLACEMENT + "a"
    assert stream.push(ids_of(tokenizer, "ð", "Ł")) == ""
    assert stream.finish() == REPLACEMENT


def test_a_run_of_byte_tokens_is_returned_with_the_next_token() -> None:
    tokenizer = make("byte_fallback")
    run_of_bytes = ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in "🙀".encode()))
    stream = TextStream(tokenizer)
    assert stream.push(run_of_bytes) == ""
    assert stream.push(ids_of(tokenizer, "e")) == "🙀e"
    assert stream.push([*run_of_bytes, run_of_bytes[0]]) == ""
    assert stream.finish() == REPLACEMENT * 5


def test_the_first_space_is_kept_only_after_a_prompt() -> None:
    tokenizer = make("byte_fallback")
    ids = tokenizer.encode(" the", add_special_tokens=False)
    prompt = tokenizer.encode("over")
    assert run(TextStream(tokenizer), [ids]) == tokenizer.decode(ids)
    assert run(TextStream(tokenizer, prompt_ids=prompt), [ids[:1], ids[1:]]).startswith(" ")


def test_a_character_that_the_prompt_ends_with_is_not_repeated() -> None:
    tokenizer = make("byte_fallback")
    prompt = tokenizer.encode("over 🙀")
    assert run(TextStream(tokenizer, prompt_ids=prompt), [ids_of(tokenizer, "e")]) == "e"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = make("byte_level")
    ids = tokenizer.encode("a<|im_end|>b<think>")
    assert run(TextStream(tokenizer), [ids]) == "ab<think>"
    assert run(TextStream(tokenizer, skip_special_tokens=False), [ids]) == "<s>a<|im_end|>b<think>"
    stream = TextStream(tokenizer, "<|im_end|>", skip_special_tokens=False)
    assert (run(stream, [ids]), stream.stopped_by, stream.consumed) == ("<s>a", "<|im_end|>", 3)


def letters(text: str) -> tuple[Tokenizer, list[int]]:
    """A tokenizer, and the text as one token per character."""
    tokenizer = make("byte_level")
    return tokenizer, ids_of(tokenizer, *text.replace(" ", "Ġ"))


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped_by", "consumed"),
    [
        ("one two", ["two"], "one ", "two", 7),
        ("one two three", "two", "one ", "two", 7),
        ("ababac", ["abac"], "ab", "abac", 6),
        ("abcd", ["abcd", "bc"], "a", "bc", 3),
        ("xabc", ["c", "abc", "bc"], "x", "abc", 4),
        ("stop", ["stop"], "", "stop", 4),
        ("sto", ["stop"], "sto", None, 3),
        ("aab", ["aac"], "aab", None, 3),
        ("abab", ["b", "b"], "a", "b", 2),
    ],
)
def test_stop_strings(text: str, stop: Any, expected: str, stopped_by: str | None, consumed: int) -> None:
    tokenizer, ids = letters(text)
    stream = TextStream(tokenizer, stop)
    assert run(stream, [ids]) == expected
    assert (stream.stopped_by, stream.consumed) == (stopped_by, consumed)


def test_only_the_start_of_a_stop_string_is_held_back() -> None:
    tokenizer, ids = letters("xabyab")
    stream = TextStream(tokenizer, ["abc"])
    assert [stream.push([token_id]) for token_id in ids] == ["x", "", "", "aby", "", ""]
    assert stream.finish() == "ab"


def test_no_token_is_taken_after_a_stop_string() -> None:
    tokenizer, ids = letters("stop it")
    stream = TextStream(tokenizer, ["op"])
    assert stream.push(ids) == "st"
    assert stream.push(ids) == ""
    assert stream.finish() == ""
    assert (stream.text, stream.consumed, stream.stopped_by) == ("st", 4, "op")


def test_a_stop_string_may_complete_at_the_end() -> None:
    tokenizer = make("byte_fallback")
    stream = TextStream(tokenizer, "🙀")
    assert stream.push(ids_of(tokenizer, "e", *(f"<0x{byte:02X}>" for byte in "🙀".encode()))) == "e"
    assert stream.finish() == ""
    assert (stream.text, stream.stopped_by) == ("e", "🙀")


def test_a_finished_stream_takes_no_more() -> None:
    stream = TextStream(make("byte_level"))
    stream.finish()
    with pytest.raises(RuntimeError, match="finished"):
        stream.push([5])


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_an_invalid_id_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="-1"):
        TextStream(make(name)).push([5, -1])


def test_check_stop() -> None:
    assert check_stop(()) == ()
    assert check_stop("end") == ("end",)
    assert check_stop(["a", "b", "a"]) == ("a", "b")


@pytest.mark.parametrize(
    ("stop", "words"),
    [("", "empty"), (["a", ""], "empty"), ([3], "3"), (3, "int"), (None, "NoneType"), (b"a", "bytes")],
)
def test_wrong_stop_strings(stop: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_stop(stop)


def test_stop_strings_have_bounds() -> None:
    """One more character, or one more string, is refused."""
    assert len(check_stop([str(i) for i in range(MAX_STOP_STRINGS)])) == MAX_STOP_STRINGS
    assert check_stop("x" * MAX_STOP_CHARACTERS)
    with pytest.raises(RequestError, match="257 stop strings"):
        check_stop([str(i) for i in range(MAX_STOP_STRINGS + 1)])
    with pytest.raises(RequestError, match="16,385 characters"):
        check_stop(["x" * MAX_STOP_CHARACTERS, "y"])


# Stop strings that hold special tokens

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def cut_with_tokens(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, str | None, int]:
    """By brute force, for whole characters: the text, the stop string, and the tokens up to the one that ends it."""
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


@settings(max_examples=200, deadline=None)
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
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_special_tokens_in_stop_strings_in_any_chunks(name: str, data: st.DataObject) -> None:
    """Torn characters and runs of byte tokens included: a token at a time is all at once, and the text a prefix."""
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
        ("<think>", "ab\nc", 7),  # an added token that is not special is text
        ("a<|im_end|>", "ab\nc<think>d", 8),
        ("<|im_start", "ab\nc<think>d", 8),  # part of a special token's name is text, which never comes
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
    """The line break is held back, since more bytes may follow; the stop string is found at once all the same."""
    tokenizer = make("byte_fallback")
    ids = ids_of(tokenizer, "e", "<0x0A>", "</s>", "h")
    for stop, consumed in (("\n</s>", 3), ("\n</s>h", 4), ("e\n</s>", 3), ("</s>", 3)):
        stream = TextStream(tokenizer, stop)
        text = "".join(stream.push([token_id]) for token_id in ids) + stream.finish()
        assert (text, stream.consumed) == ({"e": "", "<": "e\n"}.get(stop[0], "e"), consumed)


@pytest.mark.parametrize("tree_size", [1, 4, 9])
def test_an_engine_ends_at_a_special_token(tiny_bundle: Bundle, tree_size: int) -> None:
    """With trees of any size, the answer is the one that decoding token by token gives."""
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


def worst_cases() -> dict[str, tuple[str, str]]:
    """Streams that tempt a decoder to look at everything again: the tokenizer and the token to repeat."""
    return {
        "invalid bytes": ("byte_level", "ÿ"),
        "invalid bytes behind a step": ("wrapped_byte_level", "ÿ"),
        "a long run of byte tokens": ("byte_fallback", "<0xE2>"),
        "spaces": ("byte_fallback", "▁"),
        "stripped spaces": ("greedy_strip", "▁"),
        "spaces to clean up": ("unigram cleaned", "▁"),
        "nothing but special tokens": ("byte_fallback", "</s>"),
        "ordinary": ("byte_fallback", "e"),
    }


@pytest.mark.parametrize("case", worst_cases())
def test_cost_per_token_does_not_grow(case: str) -> None:
    name, token = worst_cases()[case]
    tokenizer = make(name)
    [token_id] = ids_of(tokenizer, token)
    stops = ["e" * 5000 + "!", " " * 5000 + "!", REPLACEMENT * 5000 + "!"]

    def seconds(count: int) -> float:
        stream = TextStream(tokenizer, stops)
        start = time.perf_counter()
        for _ in range(count):
            stream.push([token_id])
        stream.finish()
        return time.perf_counter() - start

    seconds(500)
    assert min(seconds(8000), seconds(8000)) < 10 * max(seconds(2000), 1e-3)


def test_a_stop_string_that_the_last_token_completes_is_why_it_ended() -> None:
    """A line break that is a byte token is held back until the next token, which here never comes."""
    tokenizer = Tokenizer(byte_fallback())
    prompt = tokenizer.encode("abc")
    tokens = [tokenizer.encode("abc")[-1], next(i for i in bytes_of(tokenizer) if tokenizer.token(i) == "<0x0A>")]
    for stop, length, reason in (("\n", 2, "stop"), ("\n", 3, None), ("x", 2, "length")):
        text = TextStream(tokenizer, stop, prompt_ids=prompt)
        sequence = TokenSequence(prompt, length, frozenset(), text)
        sequence.accept(tokens)
        assert sequence.finish_reason == reason
        assert sequence.token_ids == tokens
        assert ("\n" in text.text) == (stop == "x")
