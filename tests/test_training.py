"""Distillation, label masks, features and Medusa-1."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, TrainingArguments

from medusa_export.calibration import Calibration
from medusa_export.cli import main
from medusa_export.errors import DatasetError, TrainingError
from medusa_export.head_files import load_heads
from medusa_export.head_writer import save_heads
from medusa_export.heads import MedusaHeads
from medusa_export.training import distillation
from medusa_export.training.conversations import (
    Conversation,
    Sample,
    load_chat_tokenizer,
    read_conversations,
    render,
    tokenize,
    unique,
)
from medusa_export.training.dataset import load_splits
from medusa_export.training.distillation import DistillSettings
from medusa_export.training.features import Features, _left, hidden_states, positions_of
from medusa_export.training.generation import Writer, Written, _choose
from medusa_export.training.job import SETTINGS
from medusa_export.training.medusa1 import HeadLoss, _Positions, places
from medusa_export.training.parts import Parts
from medusa_export.training.run import Schedule, run_training
from medusa_export.training.teacher import Teacher
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.lookup import DEEPEST_GUESS
from tiny_models import tiny_model
from tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer

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
    {"role": "assistant", "content": "yes"},  # the same words, so that only places can tell them apart
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


def labelled(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[str]:
    """The runs of tokens that are labels, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample.input_ids, sample.is_label, strict=True):
        if label:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "end"), [("plain", ""), ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("llama2", " <eos>"),
                          ("zephyr", "<eos>")]
)  # fmt: skip
def test_labels_are_what_the_assistant_says(template: str, end: str) -> None:
    tokenizer = tokenizer_with(template)
    assert labelled(tokenizer, tokenize(tokenizer, Conversation(TALK))) == [f"yes{end}", f"I think so.{end}"]
    cut = tokenize(tokenizer, Conversation(TALK, complete=False))
    assert labelled(tokenizer, cut) == [f"yes{end}", "I think so."]
    assert cut.is_label[-1]


def test_the_end_of_a_turn_is_a_label_whatever_its_role() -> None:
    """As in Phi-3: what ends a turn is special, but not what the tokenizer calls the end of a text."""
    tokenizer = make_tokenizer(260)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    assert "<|end|>" not in tokenizer.all_special_tokens
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    sample = tokenize(tokenizer, Conversation(TALK))
    assert labelled(tokenizer, sample) == ["yes<|end|>", "I think so.<|end|>"]


@pytest.mark.slow
def test_labels_under_the_chat_template_of_a_real_model(smollm2_gguf: str) -> None:
    tokenizer = load_chat_tokenizer(smollm2_gguf)
    whole = tokenize(tokenizer, Conversation(TALK))
    assert labelled(tokenizer, whole) == ["yes<|im_end|>", "I think so.<|im_end|>"]
    # What a step drafts after the prompt begins where the assistant's first word does.
    prompt = render(tokenizer, TALK[:1], answering=True)
    assert whole.is_label.index(True) == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_template_that_alters_answers_is_refused() -> None:
    tokenizer = tokenizer_with("plain")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(DatasetError, match="alters what the assistant says"):
        tokenize(tokenizer, Conversation(TALK))


def test_positions() -> None:
    sample = Sample([10, 11, 12, 13, 14, 15, 16], [False, False, True, True, True, False, True])
    positions, targets = positions_of(sample, 3)
    # From 11 the model says 12 and the heads 13 and 14; beyond that the turn has ended.
    assert positions == [1, 2]
    assert targets == [[13, 14, -1], [14, -1, -1]]


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
        assert read_conversations(tmp_path / name)[0].user_turns[0] == "Hi"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"pro', "line 2 is not valid JSON"),
        ('{"text2": "a"}', "has the keys 'text2'"),
        ('{"messages": [{"role": "alien", "content": "a"}]}', "holds the turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no message of a user"),
        ("", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_conversations(tmp_path / "p.jsonl")


def test_texts_may_hold_other_line_breaks(tmp_path: Path) -> None:
    said = "one\u2028two\x0cthree\x85four"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": said}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "p.txt").write_text(f"{said}\nfive\n", encoding="utf-8")
    assert [talk.user_turns[0] for talk in read_conversations(tmp_path / "p.jsonl")] == [said]
    assert [talk.user_turns[0] for talk in read_conversations(tmp_path / "p.txt")] == [said, "five"]


def test_copies_of_a_prompt_are_one_and_go_to_one_split() -> None:
    said = ["What is it?", "what is  it", "WHAT is it!", "Something else"]
    talks = [Conversation(({"role": "user", "content": text},)) for text in said]
    assert [talk.user_turns[0] for talk in unique(talks)] == ["What is it?", "Something else"]
    for fraction in (0.1, 0.5, 0.9):
        assert len({talk.is_held_out(fraction) for talk in talks[:3]}) == 1
    many = [Conversation(({"role": "user", "content": f"prompt {i}"},)).is_held_out(0.2) for i in range(2000)]
    assert 0.17 < sum(many) / 2000 < 0.23


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e9, 2.0]])
    expected = torch.softmax(logits[0] / 0.5, -1)
    draws = _choose(logits.expand(20_000, 4), 0.5, torch.rand(20_000, generator=torch.Generator().manual_seed(1)))
    seen = torch.bincount(draws, minlength=4) / 20_000
    torch.testing.assert_close(seen, expected, atol=0.015, rtol=0)
    assert seen[2] == 0


def test_a_batch_writes_what_each_row_would_alone() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 7
    writer = Writer(model, make_tokenizer())
    prompts = ["a", "some longer prompt", "and", "the fourth of them"]
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    together = writer.answer(talks, max_new_tokens=24, temperature=0, seed=0)
    alone = [writer.answer([talk], max_new_tokens=24, temperature=0, seed=0)[0] for talk in talks]
    assert together == alone
    drawn = [writer.answer(talks, max_new_tokens=24, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({answer.tokens for answer in drawn[0]}) > 1  # rows ended at different times


def distilled(model: Path, folder: Path, *options: object) -> tuple[int, str]:
    arguments = ["distill", model, "-o", folder, "--batch-size", 4, "-n", 12, "--heldout", 0.3, *options]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"Prompt number {i}, {'very ' * (i % 5)}good" for i in range(22)))
    return path


@pytest.fixture(scope="module")
def data(tiny_model_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    code, output = distilled(tiny_model_folder, folder, "--prompts", prompts, "--temperature", 1)
    assert code == 0, output
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for name in ("train", "heldout") for line in (folder / f"{name}.jsonl").open()]
    return sorted(found, key=lambda row: row["id"])


def test_distilled_data(data: Path) -> None:
    rows = rows_of(data)
    assert [row["id"] for row in rows] == list(range(22))
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    splits = load_splits(data, heldout=0)
    assert {split.name: len(split.conversations) > 0 for split in splits} == {"train": True, "heldout": True}


def test_a_limit_takes_a_sample_not_the_shortest_prompts(data: Path) -> None:
    whole, few, fewer = (load_splits(data, heldout=0, limit=limit)[0] for limit in (None, 8, 4))
    assert (len(few.conversations), len(fewer.conversations)) == (8, 4)
    assert len({split.sha256 for split in (whole, few, fewer)}) == 3
    places = [whole.conversations.index(conversation) for conversation in few.conversations]
    assert places == sorted(places) != list(range(8))  # what distill writes is sorted by the length of prompts
    assert {c.prompt_key for c in fewer.conversations} < {c.prompt_key for c in few.conversations}
    assert load_splits(data, heldout=0, limit=1000)[0] == whole


def test_an_interrupted_distillation_goes_on(
    data: Path, tiny_model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    real = Parts.write

    def fail(self: Parts, number: int, rows: Any) -> None:
        if number == 3:
            raise OSError(28, "No space left on device")
        real(self, number, rows)

    options = ("--prompts", prompts, "--temperature", 1)
    monkeypatch.setattr(distillation.Parts, "write", fail)
    code, output = distilled(tiny_model_folder, folder, *options)
    assert code == 1
    assert "No space left on device" in output
    monkeypatch.undo()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "answers").iterdir()}
    assert len(kept) == 3
    code, output = distilled(tiny_model_folder, folder, *options, "--turns", 2)
    assert code == 1
    assert "begun with turns = 1" in output
    code, output = distilled(tiny_model_folder, folder, *options)
    assert code == 0, output
    assert rows_of(folder) == rows_of(data)  # nothing lost, nothing twice, nothing else
    assert all((folder / "answers" / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_damaged_data_is_found(data: Path, tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    options = ("--prompts", prompts, "--temperature", 1)
    assert distilled(tiny_model_folder, folder, *options)[0] == 0
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text()[:-60])
    with pytest.raises(DatasetError, match="missing or altered"):
        load_splits(folder, heldout=0)
    part = sorted((folder / "answers").iterdir())[1]
    part.write_bytes(part.read_bytes().replace(b"Prompt", b"prompt"))
    code, output = distilled(tiny_model_folder, folder, *options)
    assert code == 1
    assert "is damaged: delete it" in output
    part.unlink()
    assert distilled(tiny_model_folder, folder, *options)[0] == 0
    assert rows_of(folder) == rows_of(data)


def test_a_deleted_part_of_prompts_is_made_anew(tmp_path: Path) -> None:
    """The others after it keep their numbers, and what was answered its prompts."""
    settings = DistillSettings("model", {}, 6, None, 1, None, 12, 0.0, 1.0, 0.3, 4, 0, "float32")
    folder = tmp_path / "data"
    calls: list[int] = []

    class Author(Parrot):
        """Writes four prompts, another four with each seed."""

        def user_turns(self, conversations: list[object], *, seed: int = 0, **_: object) -> list[Written]:
            calls.append(seed)
            return [Written(f"What about {seed} and {i}?", complete=True, tokens=5) for i in range(len(conversations))]

    def run() -> None:
        distillation.distill(folder, settings, [], Author, quiet=True)  # type: ignore[arg-type]

    run()
    expected, parts = rows_of(folder), sorted((folder / "prompts").iterdir())
    assert len(expected) == 6
    assert len(parts) == 2
    parts[0].unlink()
    run()
    assert sorted((folder / "prompts").iterdir()) == parts
    assert rows_of(folder) == expected


def test_conversations_end_where_the_model_has_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 7
    model.config.max_position_embeddings = 40
    writer = Writer(model, make_tokenizer())
    talks = [[{"role": "user", "content": text}] for text in ("a", "b" * 50, "c")]
    answers = writer.answer(talks, max_new_tokens=8, temperature=0, seed=0)
    assert [answer is None for answer in answers] == [False, True, False]
    assert answers[2] == writer.answer(talks[2:], max_new_tokens=8, temperature=0, seed=0)[0]
    assert writer.answer(talks[1:2], max_new_tokens=8, temperature=0, seed=0) == [None]
    settings = DistillSettings("model", {}, 0, None, 9, None, 8, 0.0, 1.0, 0.3, 4, 0, "float32")
    prompts = [Conversation(({"role": "user", "content": text},) * 9) for text in ("a", "b" * 50)]
    made = distillation.distill(tmp_path / "data", settings, prompts, lambda: writer, quiet=True)
    assert made.left_out == 1
    (row,) = rows_of(tmp_path / "data")
    assert len(row["messages"]) % 2 == 0
    with pytest.raises(DatasetError, match="None of 1 prompts leaves room"):
        distillation.distill(tmp_path / "none", settings, prompts[1:], lambda: writer, quiet=True)


def test_a_model_writes_its_own_prompts_over_several_turns(tiny_model_folder: Path, tmp_path: Path) -> None:
    code, output = distilled(tiny_model_folder, tmp_path / "d", "--magpie", 5, "--turns", 2, "--system", "Be kind")
    assert code in (0, 1), output
    if code == 1:  # a random model may never end a turn
        assert "There are no prompts" in output
        return
    for row in rows_of(tmp_path / "d"):
        assert row["messages"][0] == {"role": "system", "content": "Be kind"}


class Parrot:
    """Writes one prompt over and over."""

    told: Callable[[int], None]

    def user_turns(self, conversations: list[object], **_: object) -> list[Written]:
        return [Written("Polly wants a cracker?", complete=True, tokens=5)] * len(conversations)

    answer = user_turns


def test_a_model_that_repeats_itself_is_told_of(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_export.training.generation.Writer", lambda *_: Parrot())
    code, output = distilled(tiny_model_folder, tmp_path / "d", "--magpie", 5)
    assert code == 0
    assert "of 5 prompts the model wrote 1" in output
    assert len(rows_of(tmp_path / "d")) == 1


def test_soft_targets_are_the_base_models_distribution_at_the_targets_place() -> None:
    """With the base model's own projection, a head that knew the state ahead would have the least loss possible."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 16)
    lm_head, embedding = torch.nn.Linear(16, 30, bias=False), torch.nn.Embedding(30, 16)
    left = torch.tensor(_left([0, 1, 2, 3, 7, 8, 9, 10, 11]))
    features = Features(hidden, torch.arange(9), torch.randint(30, (9, 2)), left)
    assert features.left.tolist() == [3, 2, 1, 0, 4, 3, 2, 1, 0]
    ahead = _Positions(features, ahead=True).__getitems__(range(9))["ahead"]
    assert torch.equal(ahead[0], hidden[1:3])
    assert ahead[3].isnan().all()
    assert torch.equal(ahead[2, 0], hidden[3]) and ahead[2, 1].isnan().all()
    loss = HeadLoss(MedusaHeads.fresh(2, lm_head), embedding, 30, teacher=lm_head, soft=1.0).train()
    teacher = torch.softmax(lm_head(hidden[1:3]), -1)
    own = torch.log_softmax(lm_head(hidden[0]), -1)  # a fresh head copies the base model
    got = loss(hidden[:1], features.next_tokens[:1], features.targets[:1], ahead[:1])["loss"]
    torch.testing.assert_close(got, -(teacher * own).sum(-1) @ torch.tensor([0.8, 0.64]))  # head k counts 0.8^k


def test_a_batch_reaches_the_projection_as_one_product() -> None:
    """Given other strides, torch copies the projection's weight for each row: 14 GB for a batch of 2,048."""
    lm_head = torch.nn.Linear(64, 300, bias=False)
    heads = MedusaHeads.fresh(3, lm_head, conditioned=True, token_map=torch.arange(200))
    seen: list[torch.Tensor] = []
    assert heads.common_projection is not None
    heads.common_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = torch.randn(128, 64)
    assert heads(states, states).shape == (128, 3, 200)
    assert seen[0].is_contiguous()


def test_places() -> None:
    logits = torch.tensor([[[0.1, 0.9, 0.5], [1.0, 2.0, 3.0]]])
    assert places(logits, torch.tensor([[1, 0]]), torch.tensor([[5, 6]])).tolist() == [[0, 2]]
    # A target outside of the draft vocabulary counts as missed; one that doesn't exist does not count.
    assert places(logits, torch.tensor([[-1, -1]]), torch.tensor([[5, -1]])).tolist() == [[10, -1]]


@pytest.mark.parametrize(
    "options",
    [
        ("--conditioned", "--num-layers", 2, "--draft-vocab", 40, "--soft", 0.5),
        pytest.param(("--plain",), marks=pytest.mark.slow),
        pytest.param(("--plain", "--own-projections", "--draft-vocab", 60), marks=pytest.mark.slow),
    ],
)
def test_trained_heads_learn_and_decode_losslessly(
    data: Path, tiny_model_folder: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    out = tmp_path / "heads"
    arguments = [
        "train", tiny_model_folder, "--data", data, "-o", out, "--num-heads", 2, "--epochs", 12, "--batch-size", 16,
        "-q", *options,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    losses = [entry["loss"] for entry in json.loads((out / "training.json").read_text())["training"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (out / "training.png").stat().st_size > 1000
    model = tiny_model("llama")
    heads = load_heads(out, model)
    assert heads.config.conditioned == ("--conditioned" in options)
    bundle = tmp_path / "bundle"
    arguments = ["onnx", tiny_model_folder, "--heads", out, "--top-k", 4, "-o", bundle, "-q"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    with MedusaEngine.load(bundle) as engine:
        tokens = [
            engine.generate("A prompt", max_new_tokens=32, tree_size=size).token_ids
            for size in (1, 3, engine.bundle.tree.size)
        ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_training_goes_on_from_its_checkpoint(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", tiny_model_folder, "--data", data, "--num-heads", 2, "--batch-size", 16, "-q"]

    def train(folder: Path, epochs: int) -> dict[str, torch.Tensor]:
        command = [str(a) for a in (*arguments, "-o", folder, "--epochs", epochs)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (result.output, result.exception)
        return dict(load_heads(folder, tiny_model("llama")).state_dict())

    whole = train(tmp_path / "whole", 2)
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert len(checkpoints) == 2
    # As after a kill in the second epoch.
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / SETTINGS, tmp_path / "again")
    checkpoints[0].rename(tmp_path / "again" / "checkpoints" / checkpoints[0].name)
    again = train(tmp_path / "again", 2)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, msg=name)


def test_a_training_goes_on_as_the_same_one_only(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """It would take the checkpoints of the one before for its own, and pass its heads off as trained anew."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "train.jsonl").read_text() + (data / "heldout.jsonl").read_text())
    out = tmp_path / "out"

    def train(*options: object) -> Result:
        command = ["train", tiny_model_folder, "-o", out, "--num-heads", 2, "--batch-size", 16, *options]
        return CliRunner().invoke(main, [*map(str, command), "--epochs", "2", "-q"])

    first = ("--data", rows, "--heldout", 0.3)
    assert train(*first).exit_code == 0
    assert train(*first, "--save-dtype", "fp32").exit_code == 0
    for options, words in [
        ((*first, "--learning-rate", 0.5), "learning_rate = 0.002, not 0.5"),
        ((*first, "--draft-vocab", 30), "draft_vocab = None, not 30"),
        ((*first, "--heads", out), "heads = "),
        (("--data", rows, "--heldout", 0.4), "heldout = 0.3, not 0.4"),
        (("--data", data, "--heldout", 0.3), "data = "),
    ]:
        result = train(*options)
        assert result.exit_code == 1
        assert f"was begun with {words}" in result.output
    (out / SETTINGS).unlink()
    result = train(*first)
    assert result.exit_code == 1
    assert "holds checkpoints but no settings.json" in result.output


def test_another_held_out_part_is_other_data(prompts: Path) -> None:
    """Or else hidden states of prompts that are held out now would be taken for training."""
    splits = [load_splits(prompts, heldout=heldout) for heldout in (0.3, 0.5)]
    assert len({split.sha256 for pair in splits for split in pair}) == 4


def test_a_loss_that_is_no_number_is_an_error(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["train", tiny_model_folder, "--data", data, "-o", out, "--num-heads", 2, "--learning-rate", 1e38, "-q"]
    result = CliRunner().invoke(main, [*map(str, command), "--batch-size", "16", "--epochs", "4"])
    assert result.exit_code == 1
    assert "no longer a number" in result.output
    assert not (out / "medusa_lm_head.safetensors").exists()


@pytest.mark.parametrize("family", ["llama", "cohere", "granite", "gemma2"])
def test_the_teacher_says_what_the_model_says(family: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor([[5, 9, 33, 7]])
    everywhere = torch.ones_like(ids)
    with torch.no_grad():
        hidden, logits = hidden_states(model, ids, everywhere, everywhere.bool())
        torch.testing.assert_close(Teacher(model, None)(hidden[0]), logits[0].float(), rtol=1e-4, atol=1e-6)
        few = torch.tensor([3, 20, 21])
        torch.testing.assert_close(Teacher(model, few)(hidden[0]), logits[0][:, few].float(), rtol=1e-4, atol=1e-6)


def test_a_model_that_no_teacher_is_known_for_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: 3 * logits)
    with pytest.raises(TrainingError, match="without --soft"):
        Teacher(model, None)


class Scale(torch.nn.Module):
    """As little as there is to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (self.weight * targets - 1).square().mean()
        return {"loss": loss} if self.training else {"loss": loss, "places": targets}


def test_one_process_trains_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it sees: transformers would give each of them a batch."""

    def with_two(**options: Any) -> TrainingArguments:
        arguments = TrainingArguments(**options)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr("medusa_export.training.run.TrainingArguments", with_two)
    history = run_training(
        Scale(),
        [torch.tensor([0.5])] * 16,
        [torch.tensor([0.5])] * 4,
        Schedule(epochs=1, learning_rate=0.1, batch_size=4),
        tmp_path,
        collate=lambda batch: {"targets": torch.stack(batch)},
        metrics=lambda *_: {},
        device=torch.device("cpu"),
        quiet=True,
    )
    assert history[-1]["step"] == 4


def test_soft_targets_need_hidden_states_that_are_kept(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    command = ["train", tiny_model_folder, "--data", data, "-o", tmp_path / "out", "--soft", 0.5, "-q"]
    result = CliRunner().invoke(main, [*map(str, command), "--hidden-states", "online"])
    assert result.exit_code == 1
    assert "--soft" in result.output
    # As the sentence says, in the same folder: nothing there depends on other options yet.
    result = CliRunner().invoke(main, [*map(str, command), "--epochs", "1", "--hidden-states", "cached"])
    assert result.exit_code == 0, result.output


def test_more_tokens_than_there_are_are_refused(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    command = ["train", tiny_model_folder, "--data", data, "-o", tmp_path / "out", "--draft-vocab", 10**6, "-q"]
    result = CliRunner().invoke(main, [*map(str, command)])
    assert result.exit_code == 1
    assert "can't propose 1,000,000 tokens" in result.output


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a disk that fills up: every write beyond the limit fails, whichever library makes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_distillation_with_no_room_goes_on(
    data: Path, tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    options = ("--prompts", prompts, "--temperature", 1)
    with no_file_larger_than(1024):  # enough for the parts, but not for what they make together
        code, output = distilled(tiny_model_folder, tmp_path / "data", *options)
    assert code == 1
    assert "train.jsonl can't be written" in output
    assert distilled(tiny_model_folder, tmp_path / "data", *options)[0] == 0
    assert rows_of(tmp_path / "data") == rows_of(data)


# Sizes are such that the first file to reach the limit is the one named.
@pytest.mark.parametrize(
    ("limit", "words", "options"),
    [
        (20_000, "000000.safetensors can't be written", ()),
        # Its weights, by safetensors.
        pytest.param(60_000, "A checkpoint can't be written", (), marks=pytest.mark.slow),
        (90_000, "A checkpoint can't be written", ("--hidden-states", "online")),  # its optimizer, by torch
        pytest.param(
            180_000, "The model can't be written", ("--recipe", "medusa2", "--lora-rank", 1), marks=pytest.mark.slow
        ),
    ],
)
def test_a_training_with_no_room_goes_on(
    data: Path, tiny_model_folder: Path, tmp_path: Path, limit: int, words: str, options: tuple[object, ...]
) -> None:
    def train(folder: Path) -> Result:
        command = ["train", tiny_model_folder, "--data", data, "-o", folder, "--num-heads", 2, "--epochs", 2, *options]
        return CliRunner().invoke(main, [*map(str, command), "-q"])

    with no_file_larger_than(limit):
        result = train(tmp_path / "full")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list((tmp_path / "full").rglob("*.partial*"))
    assert all((checkpoint / "trainer_state.json").is_file() for checkpoint in tmp_path.rglob("checkpoint-*"))
    for folder in ("full", "whole"):
        result = train(tmp_path / folder)
        assert result.exit_code == 0, (result.output, result.exception)
    expected = load_file(tmp_path / "whole" / "medusa_lm_head.safetensors")
    for name, tensor in load_file(tmp_path / "full" / "medusa_lm_head.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def flip_a_byte(path: Path) -> None:
    """In its last quarter, where a file of tensors holds their values."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_byte, pytest.param(cut, marks=pytest.mark.slow)])
def test_damage_to_what_a_training_keeps_is_found(
    data: Path, tiny_model_folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    command = ["train", tiny_model_folder, "--data", data, "-o", out, "--num-heads", 2, "--epochs", 2, "-q"]

    def train() -> Result:
        return CliRunner().invoke(main, list(map(str, command)))

    assert train().exit_code == 0
    shard = next((out / "features").glob("train-*/000000.safetensors"))
    damage(shard)
    result = train()
    assert result.exit_code == 1
    assert f"{shard} is damaged" in result.output
    shard.unlink()
    assert train().exit_code == 0
    last = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    for name in ("model.safetensors", "optimizer.pt"):
        cut(last / name)
        result = train()
        assert result.exit_code == 1
        assert f"{last} is damaged" in result.output
    shutil.rmtree(last)
    assert train().exit_code == 0


def test_from_heads_to_a_calibrated_bundle(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    heads = MedusaHeads.fresh(2, tiny_model("llama").lm_head)
    save_heads(heads, tmp_path / "heads", base_model_name_or_path="base")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    common = ("calibrate", tiny_model_folder, "--heads", tmp_path / "heads", "-q")
    run(*common, "--data", data, "-o", tmp_path / "once.json", "--plot", tmp_path / "c.png")
    run(*common, "--data", data, "--data", data, "-o", tmp_path / "twice.json")
    run(*common, "--data", data, "--no-lookup", "-o", tmp_path / "alone.json")
    once, twice, alone = (Calibration.load(tmp_path / f"{name}.json") for name in ("once", "twice", "alone"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "to and fro, " * 9}]
    (tmp_path / "again.jsonl").write_text(json.dumps({"messages": turns}))
    run(*common, "--data", tmp_path / "again.jsonl", "-o", tmp_path / "again.json")
    again = Calibration.load(tmp_path / "again.json")
    assert 0 < again.guess_share < 1 and not alone.guessed
    assert again.guessed[(0,) * DEEPEST_GUESS] > 0.5 > again.guessed.get((1,), 0)
    assert alone.accuracies == once.accuracies
    assert twice.positions == 2 * once.positions
    assert twice.accuracies == once.accuracies
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert "tokens" in run("tree", tmp_path / "once.json", "--size", 6, "-o", tmp_path / "tree.json", "-q")
    run("onnx", tiny_model_folder, "--heads", tmp_path / "heads", "--calibration", tmp_path / "once.json",
        "--tree", tmp_path / "tree.json", "-o", tmp_path / "bundle", "-q")  # fmt: skip
    acceptance = Bundle.load(tmp_path / "bundle").acceptance
    assert acceptance.source == "calibrated"
    assert acceptance.node_values[0] == 1 and len(acceptance.node_values) == 6
