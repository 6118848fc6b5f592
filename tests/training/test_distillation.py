"""Distillation: a model answers prompts, also across interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from datasets import load_dataset

from medusa_export.cli import main
from medusa_export.common.errors import DatasetError
from medusa_export.training import distillation
from medusa_export.training.conversations import Conversation
from medusa_export.training.dataset import DatasetSplit, load_sources, load_splits
from medusa_export.training.generation import Writer, Written, _choose
from medusa_export.training.part_writer import DistillSettings
from medusa_export.training.parts import Parts
from medusa_export.training.rows import read_conversations
from medusa_export.training.templates import load_chat_tokenizer
from support.distilling import distilled
from support.full_disk import no_file_larger_than
from support.tiny_models import tiny_model
from support.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e9, 2.0]])
    expected = torch.softmax(logits[0] / 0.5, -1)
    draws = _choose(logits.expand(20_000, 4), 0.5, torch.rand(20_000, generator=torch.Generator().manual_seed(1)))
    seen = torch.bincount(draws, minlength=4) / 20_000
    torch.testing.assert_close(seen, expected, atol=0.015, rtol=0)
    assert seen[2] == 0


def test_a_batch_writes_the_same_as_each_row_alone() -> None:
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


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for name in ("train", "heldout") for line in (folder / f"{name}.jsonl").open()]
    return sorted(found, key=lambda row: row["id"])


def test_distilled_data(data: Path) -> None:
    rows = rows_of(data)
    assert [row["id"] for row in rows] == list(range(22))
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    splits = load_splits(data, heldout=0)
    assert {split.name: len(split.conversations) > 0 for split in splits} == {"train": True, "heldout": True}


def test_an_interrupted_distillation_continues(
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
    assert rows_of(folder) == rows_of(data)  # no row is lost, repeated or changed
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


def test_a_job_killed_before_its_first_byte_can_start_again(
    data: Path, tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".distill.123.partial.json").write_text("{")
    code, output = distilled(tiny_model_folder, tmp_path / "data", "--prompts", prompts, "--temperature", 1)
    assert code == 0, output
    assert rows_of(tmp_path / "data") == rows_of(data)


def test_answers_belong_to_their_prompts(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Parts have only numbers, so prompts in another order would get the answers of other prompts."""
    folder = tmp_path / "data"
    options = ("--prompts", prompts, "--temperature", 1)
    assert distilled(tiny_model_folder, folder, *options)[0] == 0
    answers = Parts(folder / "answers")
    ours, others = answers.read(1), answers.read(2)
    foreign = [row | {"messages": other["messages"]} for row, other in zip(ours, others, strict=True)]
    for rows in (foreign, others, [*ours, others[0]]):
        answers.path(1).unlink()
        answers.write(1, rows)
        code, output = distilled(tiny_model_folder, folder, *options)
        assert code == 1
        assert f"{answers.path(1)} answers other prompts than the present ones" in output


def test_the_order_and_content_of_prompt_files_matter(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / prompts.name
    other.write_text("Something else")
    code, output = distilled(tiny_model_folder, tmp_path / "d", "--prompts", prompts, "--prompts", other)
    assert code == 0, output
    for files in ((other, prompts), (other,), (prompts,)):
        code, output = distilled(tiny_model_folder, tmp_path / "d", *(x for file in files for x in ("--prompts", file)))
        assert code == 1
        assert "was begun with prompts = " in output


def test_other_weights_under_one_name_are_another_model(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    model = tmp_path / "other" / tiny_model_folder.name
    shutil.copytree(tiny_model_folder, model)
    tiny_model("llama", seed=1).save_pretrained(model)
    assert distilled(tiny_model_folder, tmp_path / "d", "--prompts", prompts)[0] == 0
    next((tmp_path / "d" / "answers").iterdir()).unlink()
    code, output = distilled(model, tmp_path / "d", "--prompts", prompts)
    assert code == 1
    assert "of the same name with other weights" in output


def test_the_datasets_library_reads_it(data: Path, tmp_path: Path) -> None:
    files = {split: str(data / f"{split}.jsonl") for split in ("train", "heldout")}
    found = load_dataset("json", data_files=files, cache_dir=str(tmp_path))
    rows = sorted((row for split in found.values() for row in split), key=lambda row: row["id"])
    assert rows == rows_of(data)


def test_a_deleted_part_of_prompts_is_made_again(tmp_path: Path) -> None:
    """Later parts keep their numbers, and answers keep their prompts."""
    settings = DistillSettings("model", [], 6, None, 1, None, 12, 0.0, 1.0, 0.3, 4, 0, "float32")
    folder = tmp_path / "data"
    calls: list[int] = []

    class Author(Parrot):
        """Writes four prompts, which depend on the seed."""

        def user_turns(self, conversations: list[object], *, seed: int = 0, **_: object) -> list[Written]:
            calls.append(seed)
            return [
                Written(f"What about {seed} and {i}?", complete=True, ids=(1, 2, 3, 4, 5))
                for i in range(len(conversations))
            ]

    def run() -> None:
        distillation.write_dataset(folder, settings, [], Author)  # type: ignore[arg-type]

    run()
    expected, parts = rows_of(folder), sorted((folder / "prompts").iterdir())
    assert len(expected) == 6
    assert len(parts) == 2
    parts[0].unlink()
    run()
    assert sorted((folder / "prompts").iterdir()) == parts
    assert rows_of(folder) == expected


def test_a_model_without_an_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = None, "{{ messages[0].content }}"
    with pytest.raises(DatasetError, match="answers would never end"):
        Writer(tiny_model("llama"), tokenizer)


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
    settings = DistillSettings("model", [], 0, None, 9, None, 8, 0.0, 1.0, 0.3, 4, 0, "float32")
    prompts = [Conversation(({"role": "user", "content": text},) * 9) for text in ("a", "b" * 50)]
    made = distillation.write_dataset(tmp_path / "data", settings, prompts, lambda: writer)
    assert made.left_out == 1
    (row,) = rows_of(tmp_path / "data")
    assert len(row["messages"]) % 2 == 0
    with pytest.raises(DatasetError, match="None of 1 prompts leaves room"):
        distillation.write_dataset(tmp_path / "none", settings, prompts[1:], lambda: writer)


def test_a_model_writes_its_own_prompts_over_several_turns(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(7, 27))  # so that it ends its turns
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--magpie", 5, "--turns", 2, "--system", "Be kind")
    code, output = distilled(tmp_path / "model", tmp_path / "d", *options)
    assert code == 0, output
    talks = [[message["role"] for message in row["messages"]] for row in rows_of(tmp_path / "d")]
    assert len(talks) == 5
    turns = ["user", "assistant"]
    assert {tuple(talk) for talk in talks} <= {("system", *turns), ("system", *turns, *turns)}
    assert ["system", *turns, *turns] in talks
    assert all(row["messages"][0]["content"] == "Be kind" for row in rows_of(tmp_path / "d"))


class Parrot:
    """Always writes the same prompt."""

    on_progress: Callable[[int], None]
    fingerprint = "feathers"

    def refusal(self, _: object) -> None:
        """Accepts every prompt."""

    def learnable(self, conversation: Conversation) -> int:
        """Counts all tokens of the answers."""
        return sum(map(len, conversation.written))

    def user_turns(self, conversations: list[object], **_: object) -> list[Written]:
        return [Written("Polly wants a cracker?", complete=True, ids=(1, 2, 3, 4, 5))] * len(conversations)

    answer = user_turns


def test_a_model_that_repeats_itself_is_reported(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_export.training.distill.Writer", lambda *_: Parrot())
    code, output = distilled(tiny_model_folder, tmp_path / "d", "--magpie", 5)
    assert code == 0
    assert "The model wrote 1 of 5 prompts" in output
    assert len(rows_of(tmp_path / "d")) == 1


def test_a_distillation_continues_after_a_full_disk(
    data: Path, tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    options = ("--prompts", prompts, "--temperature", 1)
    with no_file_larger_than(1024):  # enough for each part, but not for the whole data set
        code, output = distilled(tiny_model_folder, tmp_path / "data", *options)
    assert code == 1
    assert "train.jsonl can't be written" in output
    assert distilled(tiny_model_folder, tmp_path / "data", *options)[0] == 0
    assert rows_of(tmp_path / "data") == rows_of(data)


# Templates that can't render the model's answers: the prompt opens a thought, and answers are refused or lose it.
STRIPPED = CHAT_TEMPLATE.replace("message['content']", "message['content'][-2:]").replace(
    "[assistant]", "[assistant]<think>"
)
REFUSED = CHAT_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}",
)


def model_with(folder: Path, template: str, source: Path) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("template", [STRIPPED, REFUSED], ids=["stripped", "refused"])
def test_answers_are_learned_even_if_the_template_alters_them(
    tiny_model_folder: Path, prompts: Path, tmp_path: Path, template: str
) -> None:
    model = model_with(tmp_path / "model", template, tiny_model_folder)
    code, output = distilled(model, tmp_path / "data", "--prompts", prompts, "--temperature", 1)
    assert code == 0, output
    assert "were cut off at 12 tokens" in output
    rows = rows_of(tmp_path / "data")
    assert all(sum(map(len, row["written"])) == row["tokens"] for row in rows)
    tokenizer = load_chat_tokenizer(str(model))
    tokenized = load_sources([tmp_path / "data"], heldout=0).tokenized(tokenizer, strict=True)
    samples = [sample for parts in tokenized.samples.values() for part in parts for sample in part]
    learned = [[t for t, label in zip(*vars(sample).values(), strict=True) if label] for sample in samples]
    assert sorted(learned) == sorted(ids for row in rows for ids in row["written"])
    assert all(tokenizer.decode(sample.input_ids).find("[assistant]") > 0 for sample in samples)
    result = CliRunner().invoke(
        main,
        ["train", str(model), "--data", str(tmp_path / "data"), "-o", str(tmp_path / "heads"), "--epochs", "1", "-q"],
    )
    assert result.exit_code == 0, (result.output, result.exception)


def test_a_template_that_refuses_the_models_answers_is_found_at_the_first(
    tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    model = model_with(tmp_path / "model", REFUSED, tiny_model_folder)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": list(range(60))}))
    code, output = distilled(model, tmp_path / "data", "--prompts", prompts, "--turns", 2)
    assert code == 1
    assert "No conversation can continue after the model's answer. The chat template can't render" in output
    assert "--turns 1" in output
    assert not (tmp_path / "data" / "answers").exists()


def test_answers_of_earlier_versions_are_learned_by_their_text(data: Path, tmp_path: Path) -> None:
    """Earlier versions didn't record tokens. Answers that were changed since are learned by their text, too."""
    rows = [json.loads(line) for line in (data / "train.jsonl").open()]
    for name, change in {
        "old": lambda row: {key: row[key] for key in row if key != "written"},
        "changed": lambda row: row | {"messages": [row["messages"][0], {"role": "assistant", "content": "Other."}]},
        "foreign": lambda row: row | {"written": [[10**6] * 3]},
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
        labelled = DatasetSplit("train", read_conversations(path).conversations).labelled(make_tokenizer())
        assert len(labelled.samples) == len(rows), labelled.skipped
        for row, sample in zip(map(change, rows), labelled.samples, strict=True):
            ids = [token for token, label in zip(*vars(sample).values(), strict=True) if label]
            assert ids == make_tokenizer()(row["messages"][1]["content"], add_special_tokens=False)["input_ids"]
