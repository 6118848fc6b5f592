"""Held-out texts to measure on, as tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from medusa_export.common import defaults
from medusa_export.common.errors import DatasetError
from medusa_export.common.progress import OnProgress
from medusa_export.models.checkpoints import load_tokenizer
from medusa_export.training.conversations import Sample
from medusa_export.training.dataset import load_heldout
from medusa_export.training.distill import distill
from medusa_export.training.options import DistillOptions
from medusa_export.training.templates import load_chat_tokenizer

# Answers are drawn from the model's own distribution: then the logarithm of the ratio of perplexities is the KL
# divergence on average, and neither looks better than it is.
_OWN_ANSWERS = DistillOptions(heldout=1.0, temperature=1.0, max_new_tokens=defaults.QUALITY_TOKENS)


def samples_of(
    model: str,
    data: Sequence[Path],
    texts: Sequence[Path],
    *,
    max_length: int,
    limit: int | None,
    text_only: bool,
    on_progress: OnProgress,
) -> list[Sample]:
    """Texts as tokens. Without ``data`` and ``texts`` they are the model's answers to the prompts of ``bench``.

    Args:
        model: The model whose tokenizer and chat template are used.
        data: Folders that ``distill`` wrote, of which the held-out part is used, or files of conversations.
        texts: Files of plain text, which are divided into pieces of ``max_length`` tokens. All their tokens count.
        max_length: Largest number of tokens of a text; the rest of a conversation is cut off.
        limit: Largest number of texts; None for all.
        text_only: Let the text model of a larger model answer.
        on_progress: Receives reports.

    Raises:
        CheckpointError: The tokenizer can't be read.
        DatasetError: The data can't be read, or hold nothing to measure.
        SettingsError: A folder of data was not written by ``distill``.
    """
    if not data and not texts:
        return _own_answers(model, max_length, on_progress, text_only=text_only)[:limit]
    samples = _conversations(model, data, max_length) if data else []
    samples += [piece for path in texts for piece in _pieces(model, path, max_length)]
    return samples[:limit]


def _conversations(model: str, data: Sequence[Path], max_length: int) -> list[Sample]:
    read = load_heldout(data).tokenized(load_chat_tokenizer(model), max_length)
    read.warn_of_skipped(stacklevel=4)
    return [sample.cut(max_length) for samples in read.samples["heldout"] for sample in samples]


def _own_answers(model: str, max_length: int, on_progress: OnProgress, *, text_only: bool) -> list[Sample]:
    prompts = files("medusa_export") / "data" / "bench_prompts.jsonl"
    with tempfile.TemporaryDirectory() as scratch, as_file(prompts) as path:
        folder = Path(scratch) / "answers"
        distill(model, folder, prompts=[path], options=_OWN_ANSWERS, text_only=text_only, on_progress=on_progress)
        return _conversations(model, [folder], max_length)


def _pieces(model: str, path: Path, max_length: int) -> list[Sample]:
    """The pieces of a file of plain text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The text in {path} can't be read: {error}.") from error
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise DatasetError(f"{model} has no tokenizer to read texts with: give `data` of a model that has one.")
    ids: list[int] = tokenizer(text)["input_ids"]
    pieces = [ids[first : first + max_length] for first in range(0, len(ids), max_length)]
    found = [Sample(piece, [False, *[True] * (len(piece) - 1)]) for piece in pieces if len(piece) > 1]
    if not found:
        raise DatasetError(f"{path} holds no text of two tokens or more.")
    return found
