"""Conversations: how prompts are read, and which tokens of them are labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation, Sample, unique
from medusa_export.training.dataset import load_splits
from medusa_export.training.features import digest_of_samples
from medusa_export.training.labels import tokenize
from medusa_export.training.rows import read_conversations
from medusa_export.training.templates import load_chat_tokenizer, render
from support.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer

TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
TALK = (
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},  # the same words twice: only their places differ
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "I think so."},
)


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(260)
    tokenizer.add_special_tokens({
        "bos_token": "<s>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"],
    })  # fmt: skip
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def labelled(tokenizer: PreTrainedTokenizerBase, samples: list[Sample]) -> list[str]:
    """The texts of consecutive labels."""
    runs: list[list[int]] = [[]]
    for sample in samples:
        for token, label in zip(sample.input_ids, sample.is_label, strict=True):
            if label:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [("plain", "", ""), ("chatml", "", "<|im_end|>"), ("llama3", "", "<|eot_id|>"), ("llama2", " ", " <eos>"),
     ("zephyr", "", "<eos>")]
)  # fmt: skip
def test_labels_are_the_assistants_tokens(template: str, start: str, end: str) -> None:
    tokenizer = tokenizer_with(template)
    whole = tokenize(tokenizer, Conversation(TALK))
    assert labelled(tokenizer, whole) == [f"{start}yes{end}", f"{start}I think so.{end}"]
    cut = tokenize(tokenizer, Conversation(TALK, complete=False))
    assert labelled(tokenizer, cut) == [f"{start}yes{end}", f"{start}I think so."]
    assert cut[-1].is_label[-1]


def test_the_token_that_ends_a_turn_is_a_label() -> None:
    """The template of Phi-3: a special token ends a turn, but it is not the tokenizer's end-of-sequence token."""
    tokenizer = make_tokenizer(260)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    assert "<|end|>" not in tokenizer.all_special_tokens
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    sample = tokenize(tokenizer, Conversation(TALK))
    assert labelled(tokenizer, sample) == ["yes<|end|>", "I think so.<|end|>"]


def test_short_answers_are_not_found_in_their_header() -> None:
    tokenizer = tokenizer_with("chatml")
    talk = ({"role": "user", "content": "an a or a t?"}, {"role": "assistant", "content": "a"})
    assert labelled(tokenizer, tokenize(tokenizer, Conversation(talk))) == ["a<|im_end|>"]


def test_answers_may_repeat_the_tag_that_opens_a_thought() -> None:
    """The prompt opens a thought, and the data repeats the tag. The model does not write it."""
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    talk = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nok\n</think>\nHo"})
    assert labelled(tokenizer, tokenize(tokenizer, Conversation(talk))) == ["ok\n</think>\nHo<|im_end|>"]


@pytest.mark.parametrize("kind", ["normalizer", "pre-tokenizer"])
def test_words_that_begin_with_a_space(kind: str) -> None:
    """The templates of Llama 2 and Mistral, where the space after ``[/INST]`` is part of the answer's first token."""
    words = ["<unk>", "▁[INST]", "▁[/INST]", "▁yes", "▁Really?", "▁I", "▁think", "▁so."]
    bare = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    if kind == "normalizer":
        bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bare.pre_tokenizer = Split("▁", "merged_with_next")
    else:
        bare.pre_tokenizer = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }} {% endif %}{% endfor %}"
    )
    (sample,) = tokenize(tokenizer, Conversation(TALK))
    assert sum(sample.is_label) == 1 + 1 + 3 + 1
    says = tokenizer.convert_ids_to_tokens([t for t, is_label in zip(*vars(sample).values(), strict=True) if is_label])
    assert says == ["▁yes", "</s>", "▁I", "▁think", "▁so.", "</s>"]


@pytest.mark.slow
def test_labels_under_the_chat_template_of_a_real_model(smollm2_gguf: str) -> None:
    tokenizer = load_chat_tokenizer(smollm2_gguf)
    whole = tokenize(tokenizer, Conversation(TALK))
    assert labelled(tokenizer, whole) == ["yes<|im_end|>", "I think so.<|im_end|>"]
    # The first draft after the prompt begins with the assistant's first word.
    prompt = render(tokenizer, TALK[:1], answering=True)
    assert whole[0].is_label.index(True) == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_template_that_alters_answers_is_refused() -> None:
    tokenizer = tokenizer_with("plain")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(DatasetError, match="alters the assistant's messages"):
        tokenize(tokenizer, Conversation(TALK))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"id": "1", "data": ["Hi", "Ho", "Ha"]},
        {"instruction": "Hi"},
        "Hi",
    ],
)
def test_shapes_of_prompts(tmp_path: Path, row: object) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "list.json").write_text(json.dumps([row]))
    for name in ("lines.jsonl", "list.json"):
        assert read_conversations(tmp_path / name).conversations[0].user_turns[0] == "Hi"


def test_texts_may_hold_other_line_breaks(tmp_path: Path) -> None:
    said = "one\u2028two\x0cthree\x85four"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": said}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "p.txt").write_text(f"{said}\nfive\n", encoding="utf-8")
    assert [talk.user_turns[0] for talk in read_conversations(tmp_path / "p.jsonl").conversations] == [said]
    assert [talk.user_turns[0] for talk in read_conversations(tmp_path / "p.txt").conversations] == [said, "five"]


def test_copies_of_a_prompt_are_one_and_go_to_one_split() -> None:
    said = ["What is it?", "what is  it", "WHAT is it!", "Something else"]
    talks = [Conversation(({"role": "user", "content": text},)) for text in said]
    assert [talk.user_turns[0] for talk in unique(talks)] == ["What is it?", "Something else"]
    for fraction in (0.1, 0.5, 0.9):
        assert len({talk.is_held_out(fraction) for talk in talks[:3]}) == 1
    many = [Conversation(({"role": "user", "content": f"prompt {i}"},)).is_held_out(0.2) for i in range(2000)]
    assert 0.17 < sum(many) / 2000 < 0.23


def test_a_limit_takes_a_sample_not_the_shortest_prompts(data: Path) -> None:
    whole, few, fewer = (load_splits(data, heldout=0, limit=limit)[0] for limit in (None, 8, 4))
    assert (len(few.conversations), len(fewer.conversations)) == (8, 4)
    places = [whole.conversations.index(conversation) for conversation in few.conversations]
    assert places == sorted(places) != list(range(8))  # distill sorts prompts by length
    assert {c.prompt_key for c in fewer.conversations} < {c.prompt_key for c in few.conversations}
    assert load_splits(data, heldout=0, limit=1000)[0] == whole


def test_digests_depend_on_samples_and_their_labels() -> None:
    """Otherwise hidden states of other samples would be reused."""
    some = [Sample([1, 2], [False, True]), Sample([3], [True])]
    others = ([some[0]], [some[1], some[0]], [Sample([1, 2], [True, True]), some[1]], [Sample([1, 2, 3], [True] * 3)])
    assert len({digest_of_samples(samples) for samples in (some, list(some), *others)}) == 5
