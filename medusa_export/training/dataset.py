"""Training and held-out conversations, from a folder that ``distill`` wrote or from any file of conversations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from medusa_export.common.errors import DatasetError, MedusaWarning
from medusa_export.training.conversations import Conversation, Sample
from medusa_export.training.distillation import DESCRIPTION, SPLITS
from medusa_export.training.labels import Labeller
from medusa_export.training.rows import Reading, Skipped, check_skipped, facts, read_conversations, summary
from medusa_export.training.settings import read_settings
from medusa_runtime.bundles.listed_folder import FileFacts


@dataclass(frozen=True)
class Labelled:
    """The samples of a split's conversations.

    Attributes:
        samples: The samples.
        skipped: Conversations that give no sample.
    """

    samples: list[Sample]
    skipped: list[Skipped]


@dataclass(frozen=True)
class DatasetSplit:
    """A split of a data set: conversations to train on (``train``) or to measure on (``heldout``)."""

    name: str
    conversations: list[Conversation]

    def without(self, prompts: Set[str]) -> DatasetSplit:
        """The split without the conversations of some prompts, which are given by their ``prompt_key``."""
        left = [conversation for conversation in self.conversations if conversation.prompt_key not in prompts]
        return DatasetSplit(self.name, left)

    def sample(self, limit: int) -> DatasetSplit:
        """At most ``limit`` conversations of the split.

        The choice does not depend on the order of conversations. A larger sample contains every smaller one.
        """
        if limit >= len(self.conversations):
            return self
        chosen = sorted(range(len(self.conversations)), key=lambda i: self.conversations[i].prompt_digest)[:limit]
        kept = [self.conversations[i] for i in sorted(chosen)]
        return DatasetSplit(self.name, kept)

    def labelled(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Labelled:
        """Turns the conversations into samples. Conversations that give no sample are skipped.

        Args:
            tokenizer: A fast tokenizer with a chat template.
            max_length: The most tokens of a sample; None for any number.
        """
        labeller = Labeller(tokenizer)
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        for conversation in self.conversations:
            try:
                found = labeller.samples(conversation, max_length)
            except DatasetError as error:
                skipped.append(Skipped(conversation.source, str(error)))
                continue
            samples += found
            if not found:
                skipped.append(Skipped(conversation.source, _nothing_in(conversation, max_length)))
        return Labelled(samples, skipped)


def _nothing_in(conversation: Conversation, max_length: int | None) -> str:
    """The reason why a conversation gives no samples."""
    answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    if not any(answer.strip() for answer in answers):
        return "its answers are empty" if answers else "it has no answer to learn from"
    return f"its first answer begins after the first {max_length:,} tokens (max_length)"


@dataclass(frozen=True)
class Source:
    """The content of one or several data sets.

    Attributes:
        splits: The splits of each data set, by the split's name.
        rows: Number of rows in the data sets.
        skipped: Rows that could not be read.
    """

    splits: dict[str, list[DatasetSplit]] = field(default_factory=dict)
    rows: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, strict: bool = False
    ) -> TokenizedData:
        """Turns the conversations into samples.

        Args:
            tokenizer: A fast tokenizer with a chat template.
            max_length: The most tokens of a sample; None for any number.
            strict: True to refuse data with rows that can't be used. Otherwise such rows are skipped.

        Raises:
            DatasetError: A split has nothing to learn from, or a row can't be used and ``strict`` is set.
        """
        found = {name: [split.labelled(tokenizer, max_length) for split in self.splits[name]] for name in self.splits}
        unlearned = [row for parts in found.values() for part in parts for row in part.skipped]
        skipped = sorted([*self.skipped, *unlearned], key=lambda row: row.order)
        check_skipped(skipped, self.rows, strict=strict)
        for name, parts in found.items():
            if not any(part.samples for part in parts):
                why = f": {summary(skipped, self.rows)}" if skipped else ""
                raise DatasetError(f"The split {name!r} holds nothing to learn from{why}.")
        samples = {name: [part.samples for part in parts if part.samples] for name, parts in found.items()}
        return TokenizedData(samples, self.rows, skipped)


@dataclass(frozen=True)
class TokenizedData:
    """Data sets as tokens.

    Attributes:
        samples: The samples of each data set, by the name of the split.
        rows: Number of rows in the data sets.
        skipped: Rows that are not used.
    """

    samples: dict[str, list[list[Sample]]]
    rows: int
    skipped: list[Skipped]

    def warn_of_skipped(self, *, stacklevel: int) -> None:
        """Warns of skipped rows, if there are any.

        Args:
            stacklevel: The frame that the warning is for, as ``warnings.warn`` would count from the caller.
        """
        if self.skipped:
            warnings.warn(summary(self.skipped, self.rows), MedusaWarning, stacklevel=stacklevel + 1)

    @property
    def facts(self) -> dict[str, Any]:
        """Number and reasons of skipped rows, as JSON values for a job's description."""
        return facts(self.skipped, self.rows)


def load_source(data: Path, *, heldout: float, limit: int | None = None) -> Source:
    """Reads a data set with the splits ``train`` and ``heldout``.

    Args:
        data: A folder that ``distill`` wrote, or a file of conversations.
        heldout: The fraction of a file's prompts to hold out.
        limit: The most conversations to train on; None for all.

    Raises:
        DatasetError: The data can't be read, was altered, or is not finished; or a split is empty.
        SettingsError: The folder was not written by ``distill``.
    """
    if data.is_dir():
        readings = [_recorded(data, name) for name in SPLITS]
        splits = [DatasetSplit(name, found.conversations) for name, found in zip(SPLITS, readings, strict=True)]
    else:
        readings = [read_conversations(data)]
        splits = [
            DatasetSplit(name, [c for c in readings[0].conversations if c.is_held_out(heldout) == (name == "heldout")])
            for name in SPLITS
        ]
    for split in splits:
        _check_some(split, data)
    if limit is not None:
        splits[0] = splits[0].sample(limit)
    return _source(splits, readings)


def load_splits(data: Path, *, heldout: float, limit: int | None = None) -> list[DatasetSplit]:
    """The splits ``train`` and ``heldout`` of a data set, without rows that can't be read. See ``load_source``."""
    return [split for parts in load_source(data, heldout=heldout, limit=limit).splits.values() for split in parts]


def load_sources(sources: Sequence[Path], *, heldout: float, limit: int | None = None) -> Source:
    """Reads several data sets. If one of them holds out a prompt, the prompt is removed from all training splits.

    Args:
        sources: Folders and files, as for ``load_source``.
        heldout: The fraction of a file's prompts to hold out.
        limit: The most conversations of each data set to train on; None for all.

    Raises:
        DatasetError: As in ``load_source``.
        SettingsError: As in ``load_source``.
    """
    found = _joined([load_source(source, heldout=heldout, limit=limit) for source in sources])
    held_out = {conversation.prompt_key for split in found.splits["heldout"] for conversation in split.conversations}
    found.splits["train"] = [split.without(held_out) for split in found.splits["train"]]
    return found


def load_heldout(sources: Sequence[Path]) -> Source:
    """Reads conversations to measure on: the held-out part of a folder that ``distill`` wrote, or a whole file."""
    return load_split(sources, "heldout")


def load_split(sources: Sequence[Path], name: str) -> Source:
    """Reads one split of data sets: of folders that ``distill`` wrote, or all of files of conversations.

    Args:
        sources: Folders and files.
        name: The split, ``train`` or ``heldout``.

    Raises:
        DatasetError: The data can't be read, was altered, is not finished, or is empty.
        SettingsError: As in ``load_source``.
    """
    found = []
    for data in sources:
        reading = _recorded(data, name) if data.is_dir() else read_conversations(data)
        split = DatasetSplit(name, reading.conversations)
        _check_some(split, data)
        found.append(_source([split], [reading]))
    return _joined(found)


def _source(splits: Sequence[DatasetSplit], readings: Sequence[Reading]) -> Source:
    skipped = [row for reading in readings for row in reading.skipped]
    return Source({split.name: [split] for split in splits}, sum(reading.rows for reading in readings), skipped)


def _joined(sources: Sequence[Source]) -> Source:
    names = dict.fromkeys(name for source in sources for name in source.splits)
    return Source(
        {name: [split for source in sources for split in source.splits[name]] for name in names},
        sum(source.rows for source in sources),
        [row for source in sources for row in source.skipped],
    )


def _recorded(folder: Path, name: str) -> Reading:
    """A split of a folder that ``distill`` wrote."""
    recorded = read_settings(folder / DESCRIPTION).get("splits")
    if recorded is None:
        raise DatasetError(f"The distillation in {folder} is not finished: run 'medusa-export distill' again.")
    path = folder / f"{name}.jsonl"
    if not path.is_file() or FileFacts.of(path).sha256 != recorded[name]["sha256"]:
        raise DatasetError(f"{path} is missing or altered: run 'medusa-export distill' again to restore it.")
    return read_conversations(path) if recorded[name]["rows"] else Reading([], [])


def _check_some(split: DatasetSplit, data: Path) -> None:
    if not split.conversations:
        raise DatasetError(
            f"The split {split.name!r} of {data} has no conversations: give more conversations, or change `heldout`."
        )
