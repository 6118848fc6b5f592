"""Prompts of all types: converted to token ids, or refused with a reason."""

from __future__ import annotations

import array
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_runtime import Bundle, MedusaEngine, RequestError
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.text.tokenizer import Tokenizer

MESSAGE = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Bundle) -> Tokenizer:
    found = Tokenizer.load(tiny_bundle.listed)
    assert found is not None
    return found


@pytest.fixture
def ids_of(tiny_bundle: Bundle, tokenizer: Tokenizer) -> Callable[..., Sequence[int]]:
    """A function that converts a request's prompt to token ids."""

    def ids(prompt: Any, **options: Any) -> Sequence[int]:
        return TokenSequence.of(tiny_bundle, tokenizer, prompt, **{"max_new_tokens": 4, **options}).prompt_ids

    return ids


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        deque([5, 6, 7]),
        range(5, 8),
        array.array("i", [5, 6, 7]),
        [np.int64(5), 6, np.uint8(7)],
        np.array([5, 6, 7]),
        np.array([5, 6, 7], np.uint16),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int32),
    ],
)
def test_token_ids(ids_of: Callable[..., Sequence[int]], prompt: Any) -> None:
    found = ids_of(prompt)
    assert list(found) == [5, 6, 7]
    assert all(type(token) is int for token in found)


@pytest.mark.parametrize(
    "prompt",
    [
        MESSAGE,
        UserDict(MESSAGE),
        [MESSAGE],
        (MESSAGE,),
        deque([MESSAGE]),
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        [{"role": "user", "content": ["Hi"]}],
    ],
)
def test_a_chat(ids_of: Callable[..., Sequence[int]], tokenizer: Tokenizer, prompt: Any) -> None:
    assert ids_of(prompt) == tokenizer.encode("[user]Hi\n[assistant]")


@dataclass
class Message:
    role: str
    content: str


class Secretive:
    def __repr__(self) -> str:
        raise OSError("no")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "has the type NoneType: give text"),
        (3, "has the type int: give text"),
        (3.5, "has the type float"),
        (True, "has the type bool"),
        (np.int64(3), r"array of shape \(\)"),
        (b"Hi", "is bytes: decode it"),
        (bytearray(b"Hi"), "is bytearray: decode it"),
        (memoryview(b"Hi"), "is memoryview: decode it"),
        (np.array([[5, 6]]), r"shape \(1, 2\): a request takes one prompt"),
        (torch.tensor([[5, 6]]), r"shape \(1, 2\): a request takes one prompt"),
        (np.array([5.0, 6.0]), "array of float64: token ids are integers"),
        (np.array([True]), "array of bool"),
        (np.array(["Hi"]), "array of <U2"),
        (np.array([MESSAGE]), "array of object"),
        (torch.tensor([5], dtype=torch.bfloat16), "can't be read as an array"),
        (np.array([], int), "empty"),
        (np.array([5, 101]), "holds 101: token ids are integers from 0 to 100"),
        ({5, 6}, "has the type set: make it a list, or give text"),
        (iter([5, 6]), "has the type list_iterator: make it a list"),
        ((token for token in (5, 6)), "has the type generator: make it a list"),
        (count(), "has the type count: make it a list"),
        (Path("prompt.txt"), "has the type PosixPath: give text"),
        (Message("user", "Hi"), "has the type Message: give text"),
        (Secretive(), "has the type Secretive"),
        ([Secretive()], "The prompt holds "),
        ({}, "an object without a role"),
        ({"content": "Hi"}, "an object without a role"),
        ({"messages": [MESSAGE]}, "key 'messages': give only the value"),
        ({"input_ids": [5, 6]}, "key 'input_ids': give only the value"),
        ([[5, 6], [7]], r"a list that holds \[5, 6\] at index 0: a request takes one prompt"),
        ([5, [6]], r"holds \[6\] at index 1"),
        (["Hi", "Ho"], "holds 'Hi' at index 0: a request takes one prompt"),
        ([("user", "Hi")], "a list that holds .'user', 'Hi'. at index 0"),
        ([Message("user", "Hi")], "The prompt holds .*Message.*token ids are integers"),
        ([5, MESSAGE], "at index 1: a request takes one prompt"),
        ([MESSAGE, 5], "Message 1 must be an object with a role and a content, but got int"),
        ([MESSAGE, ("user", "Hi")], "Message 1 must be an object with a role and a content, but got tuple"),
        ([MESSAGE, [MESSAGE]], "Message 1 must be an object with a role and a content, but got list"),
        ([None], "holds None"),
        ([True], "holds True"),
        ([5.0], "holds 5.0"),
        ([torch.tensor(5)], r"holds tensor\(5\) at index 0"),
        (array.array("d", [5.0]), "holds 5.0"),
        ([-1], "holds -1"),
        ([10**5000], "The prompt holds "),
        ([], "empty"),
        ("", "empty"),
        ((), "empty"),
        ([MESSAGE, None], "got NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "type 'image', but this model reads only text"),
    ],
)
def test_other_values_are_refused_with_a_reason(ids_of: Callable[..., Sequence[int]], prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ids_of(prompt)


class Endless(Sequence[int]):
    """A long list whose items must not be read."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: Any) -> Any:
        assert index == 0
        return 5


def endless_stops() -> Iterator[int]:
    while True:
        yield 5


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (Endless(), {}, "has 1,000,000,000 tokens, but this model's context has 512"),
        (range(10**12), {}, "has 1,000,000,000,000 tokens"),
        ([MESSAGE] * 300_000, {}, "has 300,000 messages, but 10,000 are read at most"),
        ("Hi", {"stop": "x" * 3_000_000}, "3,000,000 characters together"),
        ("Hi", {"stop": ["x"] * 200_000}, "200,000 stop strings: give 256 at most"),
        ("Hi", {"stop_token_ids": endless_stops()}, "may hold 101 entries at most"),
        ("Hi", {"stop_token_ids": [5] * 102}, "may hold 101 entries at most"),
        ("Hi", {"stop_token_ids": [101]}, "token ids go up to 100"),
        ("Hi", {"stop_token_ids": "5"}, "One of stop_token_ids is '5'"),
        ("Hi", {"stop_token_ids": None}, "One of stop_token_ids is None"),
        ("Hi", {"max_new_tokens": 10**5000}, "exceed the 512 tokens"),
        ("Hi", {"max_new_tokens": -(10**5000)}, "max_new_tokens is "),
        ("x" * 5_000_000, {}, "5,000,000 bytes or more"),
        ("Hi", {"sampling": [0] * 10**6}, "sampling is .{,120}: give"),
    ],
)
def test_too_much_is_refused(ids_of: Callable[..., Sequence[int]], prompt: Any, options: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ids_of(prompt, **options)


def test_stop_tokens_may_be_one_or_many(tiny_bundle: Bundle) -> None:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        plain = engine.generate("Hello", max_new_tokens=20)
        token = plain.token_ids[10]
        expected = plain.token_ids[: plain.token_ids.index(token) + 1]
        for stops in (token, [token], (t for t in (token,)), np.array([token]), {token}):
            assert engine.generate("Hello", max_new_tokens=20, stop_token_ids=stops).token_ids == expected


def test_text_and_chats_need_a_tokenizer(tiny_bundle: Bundle) -> None:
    for prompt in ("Hi", MESSAGE, [MESSAGE]):
        with pytest.raises(RequestError, match="no tokenizer"):
            TokenSequence.of(tiny_bundle, None, prompt, max_new_tokens=4)
    assert TokenSequence.of(tiny_bundle, None, np.array([5]), max_new_tokens=4).prompt_ids == [5]
