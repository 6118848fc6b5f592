"""Training and held-out conversations: what ``distill`` wrote, or a file of one's own."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from medusa_export.errors import DatasetError
from medusa_export.training.conversations import Conversation, Sample, read_conversations, tokenize
from medusa_export.training.distillation import DESCRIPTION, SPLITS
from medusa_export.training.settings import read_settings
from medusa_runtime.listed_folder import FileFacts


@dataclass(frozen=True)
class DatasetSplit:
    """Conversations to train on, or to measure on."""

    name: str
    conversations: list[Conversation]

    def without(self, prompts: Set[str]) -> DatasetSplit:
        """What is left without the conversations that begin with one of these prompts, given as ``prompt_key``."""
        left = [conversation for conversation in self.conversations if conversation.prompt_key not in prompts]
        return DatasetSplit(self.name, left)

    def sample(self, limit: int) -> DatasetSplit:
        """At most so many of its conversations, whatever their order; a larger sample holds all of a smaller one."""
        if limit >= len(self.conversations):
            return self
        chosen = sorted(range(len(self.conversations)), key=lambda i: self.conversations[i].prompt_digest)[:limit]
        kept = [self.conversations[i] for i in sorted(chosen)]
        return DatasetSplit(self.name, kept)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """Its conversations as tokens.

        Raises:
            DatasetError: The chat template doesn't fit them.
        """
        return [tokenize(tokenizer, conversation) for conversation in self.conversations]


def load_splits(data: Path, *, heldout: float, limit: int | None = None) -> list[DatasetSplit]:
    """The splits ``train`` and ``heldout``.

    Args:
        data: A folder that ``distill`` wrote, or a file of conversations.
        heldout: The fraction of a file's prompts to set aside.
        limit: Conversations to train on, at most.

    Raises:
        DatasetError: The data can't be read, was altered, or is not finished; or a split is empty.
        SettingsError: The folder is not one that ``distill`` wrote.
    """
    if data.is_dir():
        splits = [_recorded(data, name) for name in SPLITS]
    else:
        found = read_conversations(data)
        splits = [
            DatasetSplit(name, [c for c in found if c.is_held_out(heldout) == (name == "heldout")]) for name in SPLITS
        ]
    for split in splits:
        _check_some(split, data)
    if limit is not None:
        splits[0] = splits[0].sample(limit)
    return splits


def load_sources(sources: Sequence[Path], *, heldout: float, limit: int | None = None) -> dict[str, list[DatasetSplit]]:
    """The splits of several data sets, by name. A prompt that one of them holds out is trained on in none.

    Args:
        sources: As for ``load_splits``.
        heldout: Likewise.
        limit: Likewise, of each.

    Raises:
        DatasetError: As ``load_splits``.
    """
    found: dict[str, list[DatasetSplit]] = {name: [] for name in SPLITS}
    for source in sources:
        for split in load_splits(source, heldout=heldout, limit=limit):
            found[split.name].append(split)
    held_out = {conversation.prompt_key for split in found["heldout"] for conversation in split.conversations}
    found["train"] = [split.without(held_out) for split in found["train"]]
    return found


def load_heldout(data: Path) -> DatasetSplit:
    """What to measure on: the held-out part of what ``distill`` wrote, or a file as a whole.

    Raises:
        DatasetError: The data can't be read, was altered, is not finished, or empty.
        SettingsError: As ``load_splits``.
    """
    if not data.is_dir():
        return DatasetSplit(data.stem, read_conversations(data))
    split = _recorded(data, "heldout")
    _check_some(split, data)
    return split


def _recorded(folder: Path, name: str) -> DatasetSplit:
    """A split of what ``distill`` wrote."""
    recorded = read_settings(folder / DESCRIPTION).get("splits")
    if recorded is None:
        raise DatasetError(f"The distillation in {folder} is not finished: run 'medusa-export distill' again.")
    path = folder / f"{name}.jsonl"
    if not path.is_file() or FileFacts.of(path).sha256 != recorded[name]["sha256"]:
        raise DatasetError(f"{path} is missing or altered: run 'medusa-export distill' again to restore it.")
    return DatasetSplit(name, read_conversations(path) if recorded[name]["rows"] else [])


def _check_some(split: DatasetSplit, data: Path) -> None:
    if not split.conversations:
        raise DatasetError(
            f"No conversation of {data} falls to the split {split.name!r}: give more, or another --heldout."
        )
