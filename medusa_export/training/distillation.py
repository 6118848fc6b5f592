"""Self-distillation: a data set that the model writes itself (MEDUSA, section 2.3.2).

Its folder holds ``distill.json`` (what was asked, and of what), finished parts while the job goes on, and
in the end ``train.jsonl`` and ``heldout.jsonl``. A part is a batch. Its randomness comes from the job's
seed and its number alone, so a job that was interrupted continues with the next part as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medusa_export.errors import DatasetError
from medusa_export.files import write_bytes, write_text
from medusa_export.progress import Bar, progress_bar
from medusa_export.training.conversations import Conversation, Message, unique
from medusa_export.training.generation import Writer
from medusa_export.training.parts import Parts, to_jsonl

DESCRIPTION = "distill.json"
SPLITS = ("train", "heldout")
# A model that repeats itself has said all it can: batches per batch wanted, at most.
_PATIENCE = 4
_USER_TURN_TOKENS = 256


@dataclass(frozen=True)
class DistillSettings:
    """What shapes the data; a job goes on only under the settings that it began with.

    Attributes:
        model: The model's name.
        prompts: Digest of each file of prompts.
        magpie: Prompts that the model writes itself.
        limit: Conversations at most, None for all.
        turns: User turns per conversation, at most; the model writes those that a prompt lacks.
        system: A system message for conversations without one; None for none.
        max_new_tokens: Of an answer.
        temperature: Of answers; 0 is greedy.
        prompt_temperature: Of the user turns that the model writes.
        heldout: The fraction of prompts set aside.
        batch_size: Conversations per part.
        seed: What all randomness derives from.
        dtype: Of the weights.
    """

    model: str
    prompts: dict[str, str]
    magpie: int
    limit: int | None
    turns: int
    system: str | None
    max_new_tokens: int
    temperature: float
    prompt_temperature: float
    heldout: float
    batch_size: int
    seed: int
    dtype: str


@dataclass(frozen=True)
class Split:
    """A finished file: rows, tokens that the model wrote, and its SHA-256."""

    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Distilled:
    """What a job came to.

    Attributes:
        splits: The finished files, by name.
        own_prompts: Prompts that the model wrote; less than wanted where it repeats itself.
    """

    splits: dict[str, Split]
    own_prompts: int


def distill(
    folder: Path,
    settings: DistillSettings,
    prompts: Sequence[Conversation],
    open_writer: Callable[[], Writer],
    *,
    quiet: bool = False,
) -> Distilled:
    """Runs a job, or what is left of it.

    Args:
        folder: Its folder.
        settings: What to make.
        prompts: Conversations of which the user turns are answered anew.
        open_writer: Loads the model; not called if nothing is left to write.
        quiet: No progress.

    Raises:
        DatasetError: The folder is another job's, or a part is damaged.
        OutputError: A file can't be written.
    """
    _begin(folder, settings)
    open_once = cache(open_writer)

    def writer(bar: Bar) -> Writer:
        open_once().told = bar.add
        return open_once()

    seeds = unique([_as_prompt(prompt, settings) for prompt in prompts])
    own = Parts(folder / "prompts")
    if (missing := settings.magpie - len(_new(own, seeds, settings))) > 0 and len(own) < _most_batches(settings):
        done = settings.magpie - missing
        with progress_bar("writing prompts", settings.magpie, done=done, unit="tokens", quiet=quiet) as bar:
            while bar.done < bar.total and len(own) < _most_batches(settings):
                own.write(len(own), _own_prompts(writer(bar), settings, number=len(own)))
                bar.reach(len(_new(own, seeds, settings)))
    written = _new(own, seeds, settings)
    seeds = [*seeds, *written][: settings.limit]
    if not seeds:
        raise DatasetError("There are no prompts: give a file of them, or let the model write some with --magpie.")

    # Rows of a batch are padded to the longest, so the like go together.
    seeds.sort(key=lambda seed: len("".join(seed.user_turns)))
    answers = Parts(folder / "answers")
    batches = [seeds[i : i + settings.batch_size] for i in range(0, len(seeds), settings.batch_size)]
    done = sum(number in answers for number in range(len(batches)))
    with progress_bar("answering", len(batches), done=done, unit="tokens", quiet=quiet) as bar:
        for number, batch in enumerate(batches):
            if number not in answers:
                answers.write(number, _answer(writer(bar), settings, batch, number))
                bar.finish_piece()
    return Distilled(_finish(folder, settings, answers), len(written))


def _begin(folder: Path, settings: DistillSettings) -> None:
    path = folder / DESCRIPTION
    asked = asdict(settings)
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise DatasetError(f"{folder} holds other files and no {DESCRIPTION}: give an empty or new folder.")
        write_text(path, json.dumps({"settings": asked, "made_by": _made_by()}, indent=1) + "\n")
        return
    known = read_description(folder)["settings"]
    changed = [name for name, value in asked.items() if known.get(name) != value]
    if changed:
        name = changed[0]
        raise DatasetError(
            f"{folder} was begun with {name} = {known.get(name)!r}, not {asked[name]!r}: go on with the same settings, "
            "or give another folder."
        )


def read_description(folder: Path) -> dict[str, Any]:
    """What ``distill.json`` says.

    Raises:
        DatasetError: It is missing or damaged.
    """
    path = folder / DESCRIPTION
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} can't be read ({error}): is {folder} the folder of a distillation?") from error
    return data


def _made_by() -> dict[str, str]:
    return {package: version(package) for package in ("medusa-export", "torch", "transformers", "tokenizers")}


def _as_prompt(conversation: Conversation, settings: DistillSettings) -> Conversation:
    """The user's turns alone, as many as are asked for, behind a system message."""
    system: tuple[Message, ...] = conversation.system
    if not system and settings.system is not None:
        system = ({"role": "system", "content": settings.system},)
    users = tuple({"role": "user", "content": said} for said in conversation.user_turns[: settings.turns])
    return Conversation((*system, *users))


def _most_batches(settings: DistillSettings) -> int:
    return _PATIENCE * -(-settings.magpie // settings.batch_size)


def _seed(settings: DistillSettings, *place: object) -> int:
    digest = hashlib.sha256(repr((settings.seed, *place)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _own_prompts(writer: Writer, settings: DistillSettings, number: int) -> list[str]:
    before = _as_prompt(Conversation(()), settings).messages
    written = writer.user_turns(
        [before] * settings.batch_size,
        max_new_tokens=_USER_TURN_TOKENS,
        temperature=settings.prompt_temperature,
        seed=_seed(settings, "prompts", number),
    )
    # A prompt that was cut off is half a sentence.
    return [turn.text.strip() for turn in written if turn.complete and turn.text.strip()]


def _new(own: Parts, seeds: Sequence[Conversation], settings: DistillSettings) -> list[Conversation]:
    """The model's own prompts, each once and none that is there already; no more than are wanted."""
    known = {seed.prompt_key for seed in seeds}
    prompts = [_as_prompt(Conversation(({"role": "user", "content": text},)), settings) for text in own.rows()]
    found = [prompt for prompt in unique(prompts) if prompt.prompt_key and prompt.prompt_key not in known]
    return found[: settings.magpie]


def _answer(
    writer: Writer, settings: DistillSettings, batch: Sequence[Conversation], number: int
) -> list[dict[str, Any]]:
    """The rows of a part: each conversation played turn by turn, until it is cut off or has its turns."""
    users = [list(prompt.user_turns) for prompt in batch]
    talks: list[list[Message]] = [list(prompt.system) for prompt in batch]
    complete = [True] * len(batch)
    tokens = [0] * len(batch)
    for turn in range(settings.turns):
        going = [row for row in range(len(batch)) if complete[row]]
        lacking = [row for row in going if turn >= len(users[row])]
        if lacking:
            written = writer.user_turns(
                [talks[row] for row in lacking],
                max_new_tokens=_USER_TURN_TOKENS,
                temperature=settings.prompt_temperature,
                seed=_seed(settings, "user", number, turn),
            )
            for row, said in zip(lacking, written, strict=True):
                if said.complete and said.text.strip():
                    users[row].append(said.text.strip())
        going = [row for row in going if turn < len(users[row])]
        if not going:
            break
        for row in going:
            talks[row].append({"role": "user", "content": users[row][turn]})
        answers = writer.answer(
            [talks[row] for row in going],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=_seed(settings, "answers", number, turn),
        )
        for row, answer in zip(going, answers, strict=True):
            talks[row].append({"role": "assistant", "content": answer.text})
            complete[row] = answer.complete
            tokens[row] += answer.tokens
    first = number * settings.batch_size
    return [
        {"id": first + row, "messages": talks[row], "complete": complete[row], "tokens": tokens[row]}
        for row in range(len(batch))
    ]


def _finish(folder: Path, settings: DistillSettings, answers: Parts) -> dict[str, Split]:
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in answers.rows():
        held_out = Conversation(tuple(row["messages"])).is_held_out(settings.heldout)
        rows["heldout" if held_out else "train"].append(row)
    splits = {}
    for name, own in rows.items():
        data = to_jsonl(own)
        write_bytes(folder / f"{name}.jsonl", data)
        splits[name] = Split(len(own), sum(row["tokens"] for row in own), hashlib.sha256(data).hexdigest())
    description = {
        "settings": asdict(settings),
        "made_by": read_description(folder)["made_by"],
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return splits
