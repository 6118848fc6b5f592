"""Self-distillation: the model writes the data set that its heads are trained on (MEDUSA, section 2.3.2).

The job's folder holds ``distill.json`` (settings, prompts and model), finished parts while the job runs, and in the end
``train.jsonl`` and ``heldout.jsonl``. A part is a batch of prompts, or of their answers. Its random numbers depend only
on the job's seed and the part's number. So a job that was interrupted continues with the next part, and the result is
the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from medusa_export.common.errors import DatasetError, SettingsError
from medusa_export.common.files import is_unused, write_bytes, write_text
from medusa_export.common.progress import OnProgress, Task, ignore_progress
from medusa_export.training.conversations import Conversation, unique
from medusa_export.training.generation import Writer
from medusa_export.training.part_writer import DistillSettings, as_prompt, write_conversations, write_prompts
from medusa_export.training.parts import Parts, to_jsonl
from medusa_export.training.rows import Skipped
from medusa_export.training.settings import begin, note, read_settings

DESCRIPTION = "distill.json"
SPLITS = ("train", "heldout")
# The most batches of prompts to write, as a multiple of the batches wanted: some models only repeat themselves.
_PATIENCE = 4


@dataclass(frozen=True)
class Split:
    """A finished file: number of rows, number of tokens that the model wrote, and SHA-256."""

    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Distilled:
    """The result of a job.

    Attributes:
        splits: The finished files, by name.
        own_prompts: Number of prompts that the model wrote; fewer than wanted if it repeats itself.
        left_out: Number of prompts that leave no room for an answer.
        refused: Prompts that the chat template refuses, with its reasons.
        answers: Number of answered prompts.
        cut_off: Number of these answers that were cut off at the limit.
    """

    splits: dict[str, Split]
    own_prompts: int
    left_out: int
    refused: list[Skipped]
    answers: int
    cut_off: int


def write_dataset(
    folder: Path,
    settings: DistillSettings,
    prompts: Sequence[Conversation],
    open_writer: Callable[[], Writer],
    *,
    found: Mapping[str, Any] | None = None,
    strict: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Distilled:
    """Runs a job, or the rest of a job that was interrupted.

    Args:
        folder: The job's folder.
        settings: The settings that determine the data.
        prompts: Conversations. The model answers their user turns again.
        open_writer: Loads the model. It is not called if nothing is left to write.
        found: More facts about the prompts to keep, as JSON values.
        strict: True to fail if the chat template refuses a prompt. Otherwise such prompts are left out.
        on_progress: Receives reports on the job.

    Raises:
        DatasetError: The folder holds other files, a part is damaged or answers other prompts, there is nothing to
            answer, or the chat template doesn't fit the prompts or the first answers.
        SettingsError: The job began with other settings, or with another model of the same name.
        OutputError: A file can't be written.
    """
    _begin(folder, settings)
    note(folder / DESCRIPTION, **(found or {}))

    @cache
    def open_once() -> Writer:
        opened = open_writer()
        _check_weights(folder / DESCRIPTION, opened.fingerprint)
        return opened

    def writer(task: Task) -> Writer:
        open_once().on_progress = task.add
        return open_once()

    given = unique([as_prompt(prompt, settings) for prompt in prompts])
    written = _write_prompts(Parts(folder / "prompts"), given, settings, writer, on_progress)
    seeds = [*given, *written][: settings.limit]
    if not seeds:
        raise DatasetError("There are no prompts: give a file of them, or let the model write some with `magpie`.")
    # Rows of a batch are padded to the longest row, so prompts of similar length go together.
    seeds.sort(key=lambda seed: len("".join(seed.user_turns)))
    answers = Parts(folder / "answers")
    _write_answers(answers, seeds, settings, writer, on_progress, strict=strict)
    return _finish(folder, settings, seeds, list(answers.rows()), own_prompts=len(written))


def _write_prompts(
    parts: Parts,
    given: Sequence[Conversation],
    settings: DistillSettings,
    writer: Callable[[Task], Writer],
    on_progress: OnProgress,
) -> list[Conversation]:
    """Writes the parts of prompts that are missing. Returns the prompts that the model wrote."""

    def is_wanting() -> bool:
        if parts.first_missing < len(parts):  # a damaged part was deleted
            return True
        return len(_new(parts, given, settings)) < settings.magpie and len(parts) < _most_batches(settings)

    if is_wanting():
        done = len(_new(parts, given, settings))
        task = Task("writing prompts", settings.magpie, on_progress, done=done, unit="tokens")
        while is_wanting():
            number = parts.first_missing
            parts.write(number, write_prompts(writer(task), settings, number=number))
            task.reach(len(_new(parts, given, settings)))
    return _new(parts, given, settings)


def _write_answers(
    parts: Parts,
    seeds: Sequence[Conversation],
    settings: DistillSettings,
    writer: Callable[[Task], Writer],
    on_progress: OnProgress,
    *,
    strict: bool,
) -> None:
    """Writes the parts of answers that are missing. Checks prompts and answers with the first part."""
    batches = [seeds[i : i + settings.batch_size] for i in range(0, len(seeds), settings.batch_size)]
    _check_answers(parts, batches, settings)
    done = sum(number in parts for number in range(len(batches)))
    task = Task("answering", len(batches), on_progress, done=done, unit="tokens")
    for number, batch in enumerate(batches):
        if number in parts:
            continue
        is_first = not len(parts)
        if is_first:
            _check_prompts(writer(task), seeds, settings, strict=strict)
        made = write_conversations(writer(task), settings, batch, number)
        if is_first:
            _check_answered(writer(task), made, settings)
        parts.write(number, made)
        task.finish_piece()


def _finish(
    folder: Path,
    settings: DistillSettings,
    seeds: Sequence[Conversation],
    rows: Sequence[dict[str, Any]],
    *,
    own_prompts: int,
) -> Distilled:
    """Writes the data set, and returns the job's result.

    Raises:
        DatasetError: No prompt leaves room for an answer.
    """
    refused = [Skipped(_name(seeds[row["id"]]), row["refused"]) for row in rows if "refused" in row]
    left_out = len(seeds) - len(rows)
    answered = [row for row in rows if row["tokens"]]
    if not answered:
        raise DatasetError(
            f"None of {len(seeds):,} prompts leaves room for an answer of {settings.max_new_tokens} tokens in the "
            "model's context. Start again in another folder, with shorter prompts or a lower `max_new_tokens`."
        )
    splits = _write_splits(folder, settings, answered)
    note(folder / DESCRIPTION, left_out=left_out, refused=[str(prompt) for prompt in refused])
    cut_off = sum(not row["complete"] for row in answered)
    return Distilled(splits, own_prompts, left_out, refused, len(answered), cut_off)


def _name(prompt: Conversation) -> str:
    """A prompt's source, or its first words, for messages."""
    return prompt.source or f"the prompt {prompt.user_turns[0][:60]!r}"


def _check_prompts(writer: Writer, prompts: Sequence[Conversation], settings: DistillSettings, *, strict: bool) -> None:
    """Checks that the chat template accepts a prompt; if ``strict``, all prompts.

    Raises:
        DatasetError: It refuses all prompts; if ``strict``, one of them.
    """
    reason = ""
    for prompt in prompts:
        found = writer.refusal([*prompt.system, {"role": "user", "content": prompt.user_turns[0]}])
        if found is None and not strict:
            return
        if found is not None and strict:
            raise DatasetError(f"With `strict=True`, no prompt may be refused. {_name(prompt)}: {found}")
        reason = reason or found or ""
    if not reason:
        return
    remedy = "without `system`" if settings.system is not None else "with other prompts"
    raise DatasetError(
        f"None of {len(prompts):,} prompts can be answered. {reason} Start again in another folder, {remedy}."
    )


def _check_answered(writer: Writer, rows: Sequence[dict[str, Any]], settings: DistillSettings) -> None:
    """Checks that a training can use the first answers, before hours are spent on the others.

    Raises:
        DatasetError: The chat template refuses the model's own answers, or a training wouldn't learn all their tokens.
    """
    ended = [row for row in rows if row.get("ended")]
    if ended and len(ended) == sum(row["tokens"] > 0 for row in rows):
        raise DatasetError(
            f"No conversation can continue after the model's answer. {ended[0]['ended']} Start again in another "
            "folder, with `turns=1`."
        )
    for row in rows:
        if not row["tokens"]:
            continue
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        wanted = sum(len(ids) for text, ids in zip(said, row["written"], strict=True) if text.strip())
        written = tuple(tuple(ids) for ids in row["written"])
        learned = writer.learnable(Conversation(tuple(row["messages"]), row["complete"], written))
        if learned != wanted:
            raise DatasetError(
                f"A training would learn {learned} of the {wanted} tokens that the model wrote after "
                f"{row['messages'][-2]['content'][:60]!r}: the tokenizer doesn't fit the model."
            )


def _begin(folder: Path, settings: DistillSettings) -> None:
    path = folder / DESCRIPTION
    if not path.is_file() and not is_unused(folder):
        raise DatasetError(f"{folder} holds other files and no {DESCRIPTION}: give an empty or new folder.")
    begin(path, asdict(settings))


def _check_weights(path: Path, fingerprint: str) -> None:
    """Records which model writes, or compares it with the model that began the job."""
    described = read_settings(path)
    if described.setdefault("writer", fingerprint) != fingerprint:
        raise SettingsError(
            f"{path.parent} was begun by a model of the same name with other weights or another chat template: "
            "continue with that model, or give another folder."
        )
    write_text(path, json.dumps(described, indent=1) + "\n")


def _check_answers(answers: Parts, batches: Sequence[Sequence[Conversation]], settings: DistillSettings) -> None:
    """Checks that each part answers the prompts that have its number now.

    Raises:
        DatasetError: A part answers other prompts.
    """
    for number in answers:
        batch = batches[number] if number < len(batches) else ()
        for row in answers.read(number):
            place = row["id"] - number * settings.batch_size
            said = Conversation(tuple(row["messages"])).user_turns
            asked = batch[place].user_turns if 0 <= place < len(batch) else ()
            if not asked or said[: len(asked)] != asked[: len(said)]:
                raise DatasetError(
                    f"{answers.path(number)} answers other prompts than the present ones. This happens if a part of "
                    f"prompts was made again on another machine. Delete the folder {answers.path(number).parent}, and "
                    "run again."
                )


def _most_batches(settings: DistillSettings) -> int:
    return _PATIENCE * -(-settings.magpie // settings.batch_size)


def _new(own: Parts, seeds: Sequence[Conversation], settings: DistillSettings) -> list[Conversation]:
    """The prompts that the model wrote, without repeated and given ones; at most the number wanted."""
    known = {seed.prompt_key for seed in seeds}
    prompts = [as_prompt(Conversation(({"role": "user", "content": text},)), settings) for text in own.rows()]
    found = [prompt for prompt in unique(prompts) if prompt.prompt_key and prompt.prompt_key not in known]
    return found[: settings.magpie]


def _write_splits(folder: Path, settings: DistillSettings, rows: Sequence[dict[str, Any]]) -> dict[str, Split]:
    """Divides rows into splits, writes a file for each, and records them in the description."""
    divided: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in rows:
        held_out = Conversation(tuple(row["messages"])).is_held_out(settings.heldout)
        divided["heldout" if held_out else "train"].append({name: row[name] for name in row if name != "ended"})
    splits = {}
    for name, own in divided.items():
        data = to_jsonl(own)
        write_bytes(folder / f"{name}.jsonl", data)
        splits[name] = Split(len(own), sum(row["tokens"] for row in own), hashlib.sha256(data).hexdigest())
    description = read_settings(folder / DESCRIPTION) | {
        "splits": {name: asdict(split) for name, split in splits.items()}
    }
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return splits
