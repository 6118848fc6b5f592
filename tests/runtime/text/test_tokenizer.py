"""The tokenizer gives what transformers gives from the same folder, and says what is wrong with bad input."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medusa_runtime.errors import BundleError, RequestError
from medusa_runtime.text.bounds import NFC_SHRINKS, text_bound
from medusa_runtime.text.limits import (
    MAX_BYTES_PER_TOKEN,
    MAX_CHAT_VALUES,
    MAX_DEPTH,
    MAX_MESSAGES,
    MAX_TEXT_BYTES,
    SHORT_TEXT_BYTES,
)
from medusa_runtime.text.tokenizer import Tokenizer
from support.template_texts import CHATML, LLAMA2, TOOLS
from support.tokenizer_kinds import (
    KINDS,
    SENTENCES,
    byte_fallback,
    byte_level,
    plain_words,
    unigram,
    word_piece,
)

TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two leading spaces",
    "trailing ",
    "unseen: ຂອບໃຈ 🦜 \u200d \x00 \ufffd",
    "<s> hi </s> <|im_start|>user<|im_end|> <think> x",
    "do n't . You 're right , he 's not !",
]


def save(folder: Path, backend: tokenizers.Tokenizer, **settings: Any) -> Path:
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **{"pad_token": "</s>"} | settings
    ).save_pretrained(folder)
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), KINDS[request.param](), clean_up_tokenization_spaces=True)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, Any]:
    return load(folder), AutoTokenizer.from_pretrained(folder)


def test_encode_and_decode_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(np.array(ids), skip_special_tokens=False) == theirs.decode(ids)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_text_and_ids_equal_transformers(pair: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    ours, theirs = pair
    text = data.draw(st.text())
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 5)))
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_facts_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.named_tokens == theirs.special_tokens_map
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert ours.cleans_up is (type(theirs.backend_tokenizer.model).__name__ != "BPE")


def test_clean_up_is_off_unless_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path, word_piece(), clean_up_tokenization_spaces=False)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("it does not stop . fun !")
    assert ours.decode(ids) == theirs.decode(ids)
    assert " ." in ours.decode(ids)
    assert ours.decode(ids, clean_up=True) == theirs.decode(ids, clean_up_tokenization_spaces=True)


def test_clean_up_of_bpe_takes_insisting(tmp_path: Path) -> None:
    insisting = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    folder = save(tmp_path, byte_level(), clean_up_tokenization_spaces=True, **insisting)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("stop . fun !")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "stop. fun!"


def test_bos_setting_in_configuration_counts_as_in_transformers(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    save(tmp_path, backend)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True, "add_eos_token": True}))
    assert load(tmp_path).encode("hello") == AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]


def test_saved_bos_setting_is_kept(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = None
    save(tmp_path, backend, add_bos_token=True, add_eos_token=True)
    ids = load(tmp_path).encode("hello")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 1)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64, pad_id=1, pad_token="</s>")
    save(tmp_path, backend)
    text = SENTENCES[0]
    assert load(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


def test_split_special_tokens(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), split_special_tokens=True)
    text = "a</s><think>"
    assert load(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


@pytest.mark.parametrize("listed", [False, True])
def test_tokens_listed_only_in_the_configuration(tmp_path: Path, listed: bool) -> None:
    """The older layouts: special_tokens_map.json, added_tokens_decoder, additional_special_tokens."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": True, "special": False},
        "image_token": "<image>",
        "unk_token": None,
        "additional_special_tokens": ["<tool>", "</tool>"],
    }
    if listed:
        config["added_tokens_decoder"] = {
            "7": {"content": "<think>", "special": True, "rstrip": True},
            "1": {"content": "</s>", "special": False},
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "<|im_end|>", "normalized": False}, "bos_token": "<|im_start|>"})
    )
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.named_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    for text in ("x <end> <image><tool> a </tool> <think>  b</s>", *TEXTS):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_decoder_steps() -> None:
    assert Tokenizer(byte_level()).decoder_steps == ("ByteLevel",)
    assert Tokenizer(byte_fallback()).decoder_steps == ("Replace", "ByteFallback", "Fuse", "Strip")
    assert Tokenizer(plain_words()).decoder_steps == ()


# Chats

MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi! 😀 <b>&amp;</b>"}],
    [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "x\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning": "hm", "tool_calls": None},
        {"role": "user", "content": "three"},
    ],
]
WEATHER = {"type": "function", "function": {"name": "wetter", "parameters": {"größe": [1, 2.5, None, True]}}}


@pytest.fixture(scope="module", params=["chatml", "llama2", "tools"])
def chat_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    template = {"chatml": CHATML, "llama2": LLAMA2, "tools": TOOLS}[request.param]
    folder = save(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=template)
    return load(folder), AutoTokenizer.from_pretrained(folder)


def same_chat(pair: tuple[Tokenizer, Any], messages: Any, **variables: Any) -> str:
    """The rendered chat, once it and its ids are known to equal those of transformers."""
    ours, theirs = pair
    prompted = {"add_generation_prompt": True} | variables
    text = ours.render_chat(messages, **variables)
    assert text == theirs.apply_chat_template(messages, tokenize=False, **prompted)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **prompted)
    assert ours.encode_chat(messages, **variables) == expected
    return text


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": [WEATHER], "documents": [], "enable_thinking": False},
        {"eos_token": "<other>", "pad_token": "P", "enable_thinking": np.bool_(True)},
    ],
)
def test_chats_equal_transformers(
    chat_pair: tuple[Tokenizer, Any], messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    same_chat(chat_pair, messages, **variables)


@pytest.fixture(scope="module")
def tools_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = save(tmp_path_factory.mktemp("tools"), byte_fallback(), chat_template=TOOLS)
    return load(folder), AutoTokenizer.from_pretrained(folder)


def test_loop_controls_and_tool_calls(tools_pair: tuple[Tokenizer, Any]) -> None:
    messages = [
        {"role": "skip", "content": "no"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "wetter", "arguments": {"ort": "Köln"}}]},
        {"role": "end"},
        {"role": "user", "content": "no"},
    ]
    text = same_chat(tools_pair, messages)
    assert "Köln" in text
    assert ">no" not in text
    assert "gone" in text


@dataclasses.dataclass
class Picture:
    path: str
    size: tuple[int, int]


class Name(enum.StrEnum):
    ADA = "Ada"


def test_rich_values_reach_the_template_as_plain_data(tools_pair: tuple[Tokenizer, Any]) -> None:
    values = [Picture("a.png", (1, 2)), Name.ADA, np.float32(0.5), np.zeros(2), {1: b"x"}, float("inf"), 10**30]
    same_chat(tools_pair, [{"role": "assistant", "tool_calls": values}])


def test_a_template_refuses_with_its_own_words(tmp_path: Path) -> None:
    ours = load(save(tmp_path, byte_level(), chat_template=LLAMA2))
    with pytest.raises(RequestError, match="roles must alternate"):
        ours.encode_chat([{"role": "assistant", "content": "first"}])
    with pytest.raises(RequestError, match="could not render"):
        ours.encode_chat([{"role": "user"}])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def endless() -> list[Any]:
    """A list that holds itself."""
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hello", "list of objects"),
        ({"role": "user"}, "list of objects"),
        (None, "list of objects"),
        (["hello"], "Message 0 must be an object"),
        ([("user", "hello")], "Message 0 must be an object.* but got tuple"),
        ([{"role": "user", "content": 3}], "content of message 0 is 3"),
        ([{"role": "user", "content": b"hello"}], "content of message 0 is b'hello'"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content of message 0 is {"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0 holds the part {'type': 'text'}"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type 'image_url'.* reads only text"),
        ([{"role": "user", "content": ["x", 3]}], "Message 0 holds the part 3"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), "has 10,001 messages"),
        ([{"role": "user", "content": "x" * (MAX_TEXT_BYTES // 2 + 1)}] * 2, "more than 4,194,304 characters"),
        ([{"role": "user", "content": "x", "n": [0] * MAX_CHAT_VALUES}], "more than 200,000 values"),
        ([{"role": "user", "content": "x", "n": nested(MAX_DEPTH + 1)}], "more than 64 deep"),
        ([{"role": "user", "content": "x", "n": endless()}], "more than 64 deep"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "Message 1 has no role"),
        ([{"role": None, "content": "y"}], "has no role"),
        ([{"role": "user", "content": "\ud83d"}], "lone surrogate"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: Any, words: str) -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": CHATML})
    with pytest.raises(RequestError, match=words):
        ours.encode_chat(messages)


# Content in parts

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
# Of both forms for users, of text alone for all others, as in Llama 3.2.
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role != 'user' or m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<image>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
# Of parts alone: a string has no parts, and nothing is printed.
PARTS_ONLY = "{% for m in messages %}[{{ m.role }}]{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
# A macro, of which nothing can be told by looking at loops.
MACRO = (
    "{% macro show(c) %}{% if c is string %}{{ c }}{% elif c is iterable %}{% for p in c %}{{ p.text }};{% endfor %}"
    "{% endif %}{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}{% endfor %}"
)
PRINTS_JSON = "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "user", "system"),
    [
        (CHATML, "one\ntwo", "one\ntwo"),
        (LLAMA2, "one\ntwo", "one\ntwo"),
        (TOOLS, "one\ntwo", "one\ntwo"),
        (BOTH, "onetwo", "one\ntwo"),
        (PARTS_ONLY, "onetwo", "onetwo"),
        (MACRO, "one;two;", "one;two;"),
        (PRINTS_JSON, '"one\\ntwo"', '"one\\ntwo"'),
    ],
)
@pytest.mark.parametrize("as_given", [PARTS, tuple(PARTS), ["one", {"text": "two"}], [{"type": "input_text", "text": t}
                                      for t in ("one", "two")]])  # fmt: skip
def test_parts_of_text_are_text_under_every_template(template: str, user: str, system: str, as_given: Any) -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": template}, named_tokens={"bos_token": "<s>"})
    text = ours.render_chat([{"role": "system", "content": as_given}, {"role": "user", "content": as_given}])
    if template is LLAMA2:
        assert "<<SYS>>\n" + system in text
    else:
        assert text.index(system) < text.rindex(user)
        assert text.replace(system, "").replace(user, "").count("one") == 0
    assert user in text and "type" not in text.replace("in type", "")


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS, BOTH, PARTS_ONLY, MACRO])
def test_a_string_is_read_under_every_template(template: str) -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": template}, named_tokens={"bos_token": "<s>"})
    assert "hello" in ours.render_chat([{"role": "user", "content": "hello"}])


def test_parts_reach_a_template_that_takes_them_as_in_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), chat_template=MACRO)
    pair = load(folder), AutoTokenizer.from_pretrained(folder)
    assert same_chat(pair, [{"role": "user", "content": PARTS}]) == "[user]one;two;"


# Long texts


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=200), st.sampled_from([" " * 90, "\u1112\u1161\u11ab" * 20, "a</s>  " * 9])))
def test_no_text_has_fewer_tokens_than_its_bound_says(make: Callable[[], tokenizers.Tokenizer], text: str) -> None:
    backend = make()
    for normalizer in (backend.normalizer, normalizers.NFC()):
        backend.normalizer = normalizer
        bound = text_bound(backend)
        assert bound is not None
        assert bound.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)


def test_composing_leaves_a_quarter_of_the_bytes() -> None:
    """For each character the longest text that composes to it, in bytes."""
    longest: dict[str, int] = {}
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    for character in characters:  # those that become another one by themselves
        composed = unicodedata.normalize("NFC", character)
        if len(composed) == 1:
            longest[composed] = max(longest.get(composed, 0), len(character.encode()))
    for character in characters:
        parts = unicodedata.normalize("NFD", character)
        size = max(longest.get(character, 0), sum(longest.get(part, len(part.encode())) for part in parts))
        assert size <= NFC_SHRINKS * len(character.encode()), character


@pytest.mark.parametrize("strips", ["lstrip", "rstrip"])
def test_whitespace_that_a_token_swallows_does_not_count(strips: str) -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|x|>", **{strips: True})])
    text = "   " * 10_000 + "<|x|>" + "   " * 10_000 + "\u2003\u0085\x1c"
    bound = text_bound(backend)
    assert bound is not None and not bound.with_spaces
    assert bound.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("make", [word_piece, plain_words, unigram])
def test_no_bound_where_a_token_may_stand_for_any_text(make: Callable[[], tokenizers.Tokenizer]) -> None:
    assert text_bound(make()) is None


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.text("abü \n\x1f\U000f0000", max_size=80)))
@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_bytes_that_the_vocabulary_lacks_do_not_count(unknown: str | None, text: str) -> None:
    """They are lost, or any number of them becomes one unknown token; SmolLM2's lacks some, too."""
    backend = byte_level()
    alphabet = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in "Ċüñ¼Ğò"]
    vocab = {character: i for i, character in enumerate(["<unk>", *sorted(alphabet), "ab"])}
    backend.model = models.BPE(vocab=vocab, merges=[("a", "b")], unk_token=unknown, fuse_unk=unknown is not None)
    bound = text_bound(backend)
    assert bound is not None and len(bound.lost) == 5  # ü is no byte of UTF-8
    assert bound.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)
    assert bound.least_tokens("x" * 10**6) > 10**4
    backend.normalizer = normalizers.NFC()
    assert text_bound(backend) is None


def test_no_bound_where_text_gets_lost() -> None:
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
    """Else encoding takes 400 bytes of memory for each of four million."""
    ours = Tokenizer(make())
    for text in ("x" * SHORT_TEXT_BYTES, "é" * (SHORT_TEXT_BYTES // 2)):
        ours.encode(text, max_tokens=100)  # short enough for any context
        ours.encode(text + "x", max_tokens=SHORT_TEXT_BYTES // MAX_BYTES_PER_TOKEN + 1)
        ours.encode(text + "x")
        backend, ours._backend = ours._backend, NoEncoding(ours._backend)  # type: ignore[assignment]
        with pytest.raises(RequestError, match=r"has 65,537 bytes\. This model's context has 4,096 tokens"):
            ours.encode(text + "x", max_tokens=4096)
        ours._backend = backend


class NoEncoding:
    """A tokenizer that fails a test that encodes with it."""

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


def test_malformed_variables() -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": CHATML})
    with pytest.raises(RequestError, match="tools must be a list"):
        ours.encode_chat(MESSAGES[0], tools=["wetter"])
    with pytest.raises(RequestError, match="continue_final_message"):
        ours.encode_chat(MESSAGES[0], continue_final_message=True)


def test_no_chat_template() -> None:
    with pytest.raises(RequestError, match="pass the prompt as text"):
        Tokenizer(byte_level()).encode_chat(MESSAGES[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(RequestError, match="could not render"):
        Tokenizer(byte_level(), chat_templates={"default": template}).render_chat(MESSAGES[0])


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "assistant", "content": "two", "reasoning": "hm", "tool_calls": None}]
    Tokenizer(byte_level(), chat_templates={"default": CHATML}).render_chat(messages)
    assert messages == [{"role": "assistant", "content": "two", "reasoning": "hm", "tool_calls": None}]


@pytest.mark.parametrize("layout", ["files", "list", "only named"])
def test_named_templates(tmp_path: Path, layout: str) -> None:
    named = {"default": CHATML, "tool_use": TOOLS, "rag": "R{{ messages[0].content }}"}
    if layout == "only named":
        del named["default"], named["tool_use"]
    save(tmp_path, byte_level(), chat_template=named)
    if layout == "list":
        for path in tmp_path.rglob("*.jinja"):
            path.unlink()
        path = tmp_path / "tokenizer_config.json"
        listed = [{"name": name, "template": template} for name, template in named.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    pair = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert pair[0].chat_templates == named
    assert same_chat(pair, MESSAGES[0], chat_template="rag") == "R" + MESSAGES[0][0]["content"]
    if layout == "only named":
        with pytest.raises(RequestError, match=r"named 'default': choose one of \['rag'\]"):
            pair[0].render_chat(MESSAGES[0])
    else:
        same_chat(pair, MESSAGES[0])
        assert "wetter" in same_chat(pair, MESSAGES[0], tools=[WEATHER])


def test_template_in_the_configuration_ranks_below_its_file(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), chat_template="file")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "configuration"}))
    assert load(tmp_path).render_chat(MESSAGES[0]) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    assert load(tmp_path).render_chat(MESSAGES[0]) == "configuration"


# What is refused


def test_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": {"lstrip": true}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", b'{"additional_special_tokens": [3]}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": 3}}'),
        ("special_tokens_map.json", b'"x"'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name if "jinja" in name else "json"):
        Tokenizer.load(tmp_path)


def test_template_with_a_syntax_error() -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": "\n{% if %}"})
    with pytest.raises(BundleError, match="line 2"):
        ours.render_chat(MESSAGES[0])


@pytest.mark.parametrize(("text", "words"), [("a\ud800", "position 1"), (b"a", "bytes"), (None, "NoneType")])
def test_text_that_is_none(text: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Tokenizer(byte_level()).encode(text)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_ids_that_are_none(token_id: int) -> None:
    ours = Tokenizer(byte_level())
    with pytest.raises(RequestError, match=str(token_id)):
        ours.decode([5, token_id])
    with pytest.raises(RequestError, match=str(token_id)):
        ours.token(token_id)


def test_jinja_is_imported_only_for_a_chat() -> None:
    code = (
        "import sys, medusa_runtime.text.tokenizer, medusa_runtime.text.stream;"
        "sys.exit(any(name in sys.modules for name in ('jinja2', 'torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
