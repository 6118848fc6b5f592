"""Labels under published chat templates: exactly the tokens that the model wrote, as marked in ``chat_templates``."""

from __future__ import annotations

import re
from functools import cache
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation, Message, Sample
from medusa_export.training.generation import Writer
from medusa_export.training.labels import Labeller, decoded, tokenize
from medusa_export.training.templates import Thought, render
from support.chat_templates import PUBLISHED
from support.template_parts import TALKS, Published
from support.tiny_models import tiny_model

CASES = [(name, talk) for name, published in PUBLISHED.items() for talk in published.wrote]
_WORDS = ["Hello", "Fine", "Hi", " And you", " you", "user", "assistant", "Assistant", " Assistant", "model", "think"]
# As in Llama 3: a line break forms a token with punctuation before it, and line breaks with each other.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def trained(kind: str) -> Tokenizer:
    """Makes a small tokenizer of a kind; see ``Published``."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator([*_WORDS, "a\n\nb"] * 20, trainer)
        return tokenizer
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        spaces if kind == "bare pieces" else [normalizers.Prepend("▁"), *spaces]
    )
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<unk>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(_WORDS * 20, trainer)
    start = [decoders.Strip(" ", 1, 0)] if kind == "pieces" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *start]
    )
    return tokenizer


def tokenizer_of(published: Published) -> PreTrainedTokenizerBase:
    """Makes the tokenizer of a template."""
    bare = Tokenizer.from_str(trained(published.kind).to_str())
    bare.add_tokens([AddedToken(token, special=True, normalized=False) for token in published.special])
    bare.add_tokens([AddedToken(token, special=False, normalized=False) for token in published.plain_tokens])
    eos, bos, *_ = *published.special, None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = published.template
    return tokenizer


def by_hand(tokenizer: PreTrainedTokenizerBase, kind: str, marked: str) -> Sample:
    """The tokens of a text, and which of them are between the marks « and »."""
    parts = re.split("[«»]", marked)  # the model wrote every second part
    if kind == "bytes":
        pieces = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
        flags = [[place % 2 == 1] * len(piece) for place, piece in enumerate(pieces)]
        return Sample([*chain(*pieces)], [*chain(*flags)])
    # Tokenized alone, a part of a text would begin with a space.
    encoded = tokenizer("".join(parts), add_special_tokens=False, return_offsets_mapping=True)
    owners = [place % 2 == 1 for place, part in enumerate(parts) for _ in part]
    flags = []
    for first, last in encoded["offset_mapping"]:
        assert len(set(owners[first:last])) == 1, "a token belongs to both"
        flags.append(owners[first])
    return Sample(list(encoded["input_ids"]), flags)


@pytest.mark.parametrize(("name", "talk"), CASES)
def test_labels_are_what_the_model_wrote(name: str, talk: str) -> None:
    published = PUBLISHED[name]
    tokenizer = tokenizer_of(published)
    samples = tokenize(tokenizer, Conversation(tuple(TALKS[talk])))
    expected = [by_hand(tokenizer, published.kind, marked) for marked in published.wrote[talk]]
    shown = [
        [(tokenizer.decode([token]), label) for token, label in zip(*vars(s).values(), strict=True)] for s in samples
    ]
    assert shown == [
        [(tokenizer.decode([token]), label) for token, label in zip(*vars(s).values(), strict=True)] for s in expected
    ]
    assert samples == expected


def test_there_are_thirty_templates_and_two_kinds_of_tokenizers() -> None:
    assert len(PUBLISHED) >= 30
    assert {published.kind for published in PUBLISHED.values()} == {"bytes", "pieces", "bare pieces"}
    assert sum(len(published.wrote) > 1 for published in PUBLISHED.values()) >= 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_of_a_conversation_is_what_the_template_makes(name: str) -> None:
    """The text written by hand begins with the prompt that a server makes."""
    published = PUBLISHED[name]
    tokenizer = tokenizer_of(published)
    for talk, texts in published.wrote.items():
        prompt = render(tokenizer, TALKS[talk][:1], answering=True)
        stated = texts[0].partition("«")[0]
        assert prompt == stated or (prompt.startswith(stated) and Thought.at_end_of(prompt).opening)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_distill_wrote_is_learned_token_by_token(name: str) -> None:
    """The template may drop the thought of such an answer, or refuse it."""
    published = PUBLISHED[name]
    tokenizer = tokenizer_of(published)
    question = TALKS["plain"][0]
    prompt = tokenizer(render(tokenizer, [question], answering=True), add_special_tokens=False)["input_ids"]
    for texts in published.wrote.values():
        sample = by_hand(tokenizer, published.kind, texts[0])
        written = [token for token, label in zip(*vars(sample).values(), strict=True) if label]
        first = written[: sample.is_label[::-1].index(False)] if len(texts) == 1 else written
        for complete in (True, False):
            answer: Message = {"role": "assistant", "content": decoded(tokenizer, first[:-1] if complete else first)}
            (found,) = tokenize(tokenizer, Conversation((question, answer), complete, (tuple(first),)))
            assert found == Sample([*prompt, *first], [False] * len(prompt) + [True] * len(first))


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(PUBLISHED)),
    said=st.lists(st.text(st.sampled_from("aHi .\n<>:e"), min_size=1, max_size=20), min_size=1, max_size=3),
)
def test_labels_follow_a_prompt(name: str, said: list[str]) -> None:
    """For any answers: samples begin with a prompt, each answer is learned once, and the labels hold its words."""
    tokenizer = tokenizer_of(PUBLISHED[name])
    messages: list[Message] = []
    for text in said:
        messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    samples = Labeller(tokenizer).samples(Conversation(tuple(messages)))
    runs: list[list[int]] = []
    for sample in samples:
        before = False
        for token, label in zip(sample.input_ids, sample.is_label, strict=True):
            if label:
                runs[-1].append(token) if before else runs.append([token])
            before = label
    learned = ["".join(decoded(tokenizer, run).split()) for run in runs]
    expected = ["".join(text.split()) for text in said if text.strip()]
    assert len(learned) == len(expected)
    assert all(words in found for words, found in zip(expected, learned, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_writer_ends_where_a_bundle_does(name: str) -> None:
    """At the end tokens of both configurations, the tokenizer and the template."""
    published = PUBLISHED[name]
    tokenizer = tokenizer_of(published)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id, model.config.eos_token_id = 5, 6
    stated = published.wrote["plain"][-1].rpartition("»")[0].rpartition("«")[2]
    last = tokenizer(stated, add_special_tokens=False)["input_ids"][-1]
    ends = set(Writer(model, tokenizer)._stop_ids)
    assert {5, 6, tokenizer.eos_token_id} <= ends <= {5, 6, tokenizer.eos_token_id, last}
    assert last in ends or tokenizer.decode([last]).strip() == "."


def test_tags_that_open_and_close_a_thought() -> None:
    assert Thought.at_end_of("a <think>\n") == Thought("<think>", "</think>")
    assert Thought.at_end_of("a<seed:think>").closing == "</seed:think>"
    assert Thought.at_end_of("<|START_THINKING|>").closing == "<|END_THINKING|>"
    assert Thought.at_end_of("[THINK]").closing == "[/THINK]"
    assert Thought.at_end_of("<think>\n\n</think>\n\n").is_closed
    assert Thought.at_end_of("<|assistant|>\n") == Thought.at_end_of("[/INST]") == Thought()


def test_a_thought_behind_a_prompt_that_closed_it_is_not_learned() -> None:
    """For instance a system prompt turns thoughts off. The model writes none, although the data holds one."""
    published = PUBLISHED["Llama Nemotron Super"]
    tokenizer = tokenizer_of(published)
    tokenizer.chat_template = published.template.replace(
        "{% else %}{{ '' }}{% endif %}", "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
    for talk in ("plain", "tagged"):
        (sample,) = tokenize(tokenizer, Conversation(tuple(TALKS[talk][:2])))
        prompt = render(tokenizer, TALKS[talk][:1], answering=True)
        assert prompt.endswith("</think>\n\n")
        assert sample == by_hand(tokenizer, "bytes", f"{prompt}«Hello.<|eot_id|>»")


def test_an_unfinished_thought_is_learned() -> None:
    """An answer was cut off in its thought, so the template treats it as an answer without a thought."""
    tokenizer = tokenizer_of(PUBLISHED["Qwen3"])
    question = TALKS["plain"][0]
    cut = Conversation((question, {"role": "assistant", "content": "<think>\nHm"}), complete=False)
    prompt = render(tokenizer, [question], answering=True)
    assert tokenize(tokenizer, cut) == [by_hand(tokenizer, "bytes", f"{prompt}«<think>\nHm»")]


def test_an_answer_that_the_template_alters_is_refused() -> None:
    tokenizer = tokenizer_of(PUBLISHED["ChatML"])
    tokenizer.chat_template = PUBLISHED["ChatML"].template.replace("m.content", "m.content.replace('H', 'J')")
    with pytest.raises(DatasetError, match="alters the assistant's messages"):
        tokenize(tokenizer, Conversation(tuple(TALKS["plain"])))
