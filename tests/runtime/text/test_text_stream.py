"""The law of the text stream: its pieces, joined, are the decoded text up to the first stop string."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.errors import RequestError
from medusa_runtime.text.limits import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from medusa_runtime.text.stop_strings import StopFinder, check_stop
from medusa_runtime.text.stream import TextStream, _CleanUp
from medusa_runtime.text.tokenizer import Tokenizer, clean_up_spaces
from support.streams import (
    ALL,
    REPLACEMENT,
    bytes_of,
    chunked,
    ids_of,
    make,
    run,
    token_ids,
)
from support.tokenizer_kinds import SENTENCES, byte_fallback


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, or the longest of those, found by brute force."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25)
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
@settings(max_examples=25)
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
@settings(max_examples=25)
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
@settings(max_examples=150)
def test_clean_up_in_pieces(text: str, data: st.DataObject) -> None:
    stage = _CleanUp()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [stage.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(pieces) + stage.finish() == clean_up_spaces(text)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5))
@settings(max_examples=150)
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
    """The limits are allowed; a character or a string more is refused."""
    assert len(check_stop([str(i) for i in range(MAX_STOP_STRINGS)])) == MAX_STOP_STRINGS
    assert check_stop("x" * MAX_STOP_CHARACTERS)
    with pytest.raises(RequestError, match="257 stop strings"):
        check_stop([str(i) for i in range(MAX_STOP_STRINGS + 1)])
    with pytest.raises(RequestError, match="16,385 characters"):
        check_stop(["x" * MAX_STOP_CHARACTERS, "y"])


def worst_cases() -> dict[str, tuple[str, str]]:
    """Streams in which a simple decoder would decode all tokens again and again: tokenizer and token to repeat."""
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


@pytest.mark.slow
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


def test_the_last_token_may_complete_a_stop_string() -> None:
    """A line break that is a byte token is held back until the next token. Here it is the last token."""
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
